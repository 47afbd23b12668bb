"""T2R (Kasai et al., arXiv 2103.13076): a learned ReLU feature map with its denominator.

All weights are fine-tuned on the next token in one stage, without a teacher. The map starts as
PyTorch initialises a linear layer, one per head for queries and keys (shared by the heads of a
group's keys where there are groups). It can be merged into the projections afterwards
(`linearize/merge.py`).
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

method = Method(
    RemixOptions(mixer="t2r", keep="none", window=0, options={"start": "uniform"}),
    (StageShare("next", 1.0, {"lr_new": 3e-5, "lr_mixer": 3e-5, "lr_body": 3e-5, "warmup": 0.1}),),
)
