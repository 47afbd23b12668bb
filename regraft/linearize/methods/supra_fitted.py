"""Ours for SUPRA (Mercat et al., arXiv 2405.06640) without a window: fitted, then aligned.

Decays start, head by head, at the half-lives that fit the teacher best, and learn. An output gate
lets a head be silent, which SUPRA's norm alone forbids: there every token's output has the same
length, while softmax heads rest on a sink. Five elevenths of the budget align layers, which costs a
third of the work per token, at twelve times the rates of what follows; the rest matches the
teacher's distribution with all weights. A patent application claims the norm, see `methods/supra`.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare
from .auto import RATES

ALIGN = {"lr_new": 6e-3, "lr_mixer": 1.5e-3}

method = Method(
    RemixOptions("supra", "every:4", window=0, options={"decays": "learned", "gate": "sigmoid"}),
    (
        StageShare("align", 5 / 11, ALIGN),
        StageShare("distil", 6 / 11, RATES | {"lr_body": 1.25e-5}),
    ),
    calibration=8192,
)
