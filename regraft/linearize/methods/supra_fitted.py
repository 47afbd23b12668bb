"""Ours for SUPRA (Mercat et al., arXiv 2405.06640) without a window: fitted, then aligned.

Decays start, head by head, at the half-lives that fit the teacher best, and learn. An output gate
lets a head be silent, which SUPRA's norm alone forbids: there every token's output has the same
length, while softmax heads rest on a sink. Training is that of `aligned`. A patent application
claims the norm, see `methods/supra`.
"""

from . import aligned

method = aligned.method.with_remix(
    mixer="supra", options={"decays": "learned", "gate": "sigmoid"}, keep="every:4"
)
