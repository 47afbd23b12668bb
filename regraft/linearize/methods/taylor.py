"""Taylor-Calibrate (arXiv 2606.16429): gated delta rule with gates from attention statistics.

No window; every fourth layer is kept. Alignment, then distillation. Differs from the paper, on
purpose: grouped heads are broadcast per head with their biases and rotary embedding (its converter
repeats rows, drops biases and rotary embedding and adds SiLU), and each head's output is fitted by
a ridge map instead of one scale. Its 300 steps of alignment per layer are the first stage here. Its
code has no licence file; none of it is used here.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

method = Method(
    RemixOptions(window=0, options={"grouped": False}),
    (
        StageShare("align", 0.25, {"lr_mixer": 1e-4}),
        StageShare("distil", 0.75, {"lr_mixer": 1e-4, "lr_body": 1e-5}),
    ),
    calibration=8192,
)
