"""Mamba in the Llama (Wang et al., arXiv 2408.15237): Mamba blocks made from attention.

Their C, B, x and output come from the attention's queries, keys, values and output. Every other
layer is kept; all weights are distilled at once. Only the paper's later form, distillation end to
end: no replacement in steps, no supervised tuning or preferences after it. The released code is
Apache-2.0; none of it is used here.
"""

from ...mixers.remix_options import RemixOptions
from ..method import Method, StageShare

method = Method(
    RemixOptions(mixer="mamba", keep="every:2", window=0, options={"layout": "attention"}),
    (StageShare("distil", 1.0, {"lr_new": 1e-3, "lr_mixer": 1e-4, "lr_body": 2e-5}),),
)
