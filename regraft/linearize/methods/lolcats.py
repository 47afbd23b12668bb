"""LoLCATs (Zhang et al., arXiv 2410.10254): Hedgehog features and a window, one denominator.

First the feature maps alone match the attention's outputs, then the model learns the next token.
Half the tokens each, as in the paper (20 M and 20 M). The second stage trains low-rank additions of
rank 8 to the attention's projections and nothing else that was there. The released code is
Apache-2.0; none of it is used here.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

method = Method(
    RemixOptions(mixer="lolcats", keep="none", window=0, options={"window": 64}),
    (
        StageShare("align", 0.5, {"learn": "new", "lr_new": 1e-2}),
        StageShare("next", 0.5, {"rank": 8, "lr_new": 1e-4, "lr_mixer": 1e-4}),
    ),
)
