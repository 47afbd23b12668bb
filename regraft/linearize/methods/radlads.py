"""RADLADS (Goldstein et al., arXiv 2505.03005): RWKV-6 without what the teacher lacks.

Outputs are aligned, then the distribution is matched with all weights, then the next token is
learned on longer rows: shares of its 100 + 500 + 100 million tokens for a 7B. Its RWKV-7 variant,
the better one, is not here. Official code is Apache-2.0; none of it is used here.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

RWKV = {
    "shift": False,
    "bonus": False,
    "balance": True,
    "norm": "none",
    "gate": "sigmoid",
    "grouped": True,
}

method = Method(
    RemixOptions(mixer="rwkv6", keep="none", window=0, options=RWKV | {"rotary": True}),
    (
        StageShare("align", 0.15, {"lr_mixer": 1e-3}),
        StageShare("distil", 0.7, {"lr_new": 1e-4, "lr_mixer": 1e-4, "lr_body": 1e-5}),
        StageShare("next", 0.15, {"lr_new": 1e-5, "lr_mixer": 1e-5, "lr_body": 1e-5}, longer=2),
    ),
)
