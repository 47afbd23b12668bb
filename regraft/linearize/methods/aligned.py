"""Ours for mixers without a window, which start far from the teacher: aligned long and hard first.

Five elevenths of the budget align each layer's outputs with the teacher's (as MOHAWK's second
stage, arXiv 2408.10189), which costs a third of the work per token, at twelve times the rates of
what follows; the rest matches the teacher's distribution with all weights. It is how `regraft
linearize --for` trains forms whose layers have no window.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

ALIGN = {"lr_new": 6e-3, "lr_mixer": 1.5e-3}
# Four times those of `auto`, whose students start much nearer to the teacher.
DISTIL = {"lr_new": 5e-4, "lr_mixer": 1.25e-4, "lr_body": 1.25e-5}

method = Method(
    RemixOptions("gated_deltanet", "recall:25%", window=0),
    (
        StageShare("align", 5 / 11, ALIGN),
        StageShare("distil", 6 / 11, DISTIL),
    ),
    calibration=8192,
    unmeasured="every:4",
)
