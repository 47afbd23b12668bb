"""Ours: gated delta rule beside attention seen through a window, from a closed-form start.

The mixer works in the source's own heads, beside the source's attention seen through a window.
Grouped heads, biases, query/key norms and rotary embedding stay as the source has them; there is no
convolution, activation or output norm that it lacks (RADLADS' ablations, arXiv 2505.03005). Gates,
decays, write strengths and value maps are set in closed form on 8,192 tokens. A quarter of the
budget aligns layers with the teacher's outputs, the rest matches its distribution with all weights.
A quarter of the layers keeps softmax: those whose loss costs most recall, measured on the text
(`select_layers.recall`).
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

RATES = {"lr_new": 1.25e-4, "lr_mixer": 3e-5}

method = Method(
    RemixOptions(keep="recall:25%", past_window=True),
    (StageShare("align", 0.25, RATES), StageShare("distil", 0.75, RATES | {"lr_body": 3e-6})),
    calibration=8192,
    unmeasured="every:4",
)
