"""HALO's recipe for HypeNet (arXiv 2601.22156): fixed-decay linear attention, aligned, distilled.

The mixer has a norm and an output gate. A quarter of the layers is kept, where recall depends on
them. Outputs are aligned, then the distribution is matched, then rows get longer: shares of the
paper's 2.3 billion tokens are about 0.3, 1 and 1. Differs from the paper: layers are scored on the
closed-form start and on repeated pairs of tokens, not after a first stage and on benchmarks; kept
layers keep their rotary embedding, which the paper removes.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

method = Method(
    RemixOptions(
        mixer="lightning", keep="halo:25%", window=0, options={"norm": "rms", "gate": "sigmoid"}
    ),
    (
        StageShare("align", 0.14),
        StageShare("distil", 0.43),
        StageShare("next", 0.43, {"lr_new": 1e-4, "lr_mixer": 1e-4, "lr_body": 1e-5}, longer=4),
    ),
)
