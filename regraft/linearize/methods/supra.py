"""SUPRA (Mercat et al., arXiv 2405.06640): linear attention with a learned feature map and a norm.

Decays are fixed. The whole model is trained on the next token, without a teacher. As released: one
dense feature map over all heads, initialised as PyTorch initialises a linear layer; nothing is
calibrated. The paper warms up for 2 of 20 billion tokens and then decays along a cosine from 3e-5
to 1e-5; here the rate is constant and then falls linearly. A published patent application
(US20250307633A1) claims the norm; `options: {norm: false}` leaves it out. The released code is MIT;
none of it is used here.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

method = Method(
    RemixOptions(
        mixer="supra", keep="none", window=0, options={"feature": "dense", "start": "uniform"}
    ),
    (StageShare("next", 1.0, {"lr_new": 3e-5, "lr_mixer": 3e-5, "lr_body": 3e-5, "warmup": 0.1}),),
)
