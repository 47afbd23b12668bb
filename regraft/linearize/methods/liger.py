"""Liger (Lan et al., arXiv 2503.01496): gated linear attention with gates made from the keys.

There are no new weights. Linear attention and a softmax window are mixed half and half; low-rank
additions learn the next token. The mix stays at one half (the gate starts there and does not
learn); rank 8 as in the paper, on the attention's projections. The released pooling of the keys is
the identity, and so it is here. The released code is Apache-2.0; none of it is used here.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

GLA = {
    "gate_from": "keys",
    "activation": "softmax",
    "norm": "none",
    "gate": "none",
    "grouped": True,
}

method = Method(
    RemixOptions(
        mixer="gla",
        keep="none",
        window=64,
        sinks=0,
        options=GLA,
        gate=0.0,
    ),
    (StageShare("next", 1.0, {"rank": 8, "lr_new": 0.0, "lr_mixer": 1e-4}),),
)
