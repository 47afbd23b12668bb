"""Mixtral (arXiv 2401.04088): Mistral with experts behind a router in place of the MLP.

Files hold the tensors of each expert apart. The grouped products over experts need rows of 16
bytes: in bfloat16, hidden and ffn in multiples of 8.
"""

from ..core.anatomy import Anatomy
from ..core.anatomy_defaults import read_aliases
from .llama import DEFAULTS, LAYER, SIZES, kv_heads
from .llama import parts as llama
from .qwen2_moe import MULTIPLES, experts, without_mlp

BLOCK = f"{LAYER}.block_sparse_moe"

anatomy = Anatomy(
    family="mixtral",
    parts={
        **without_mlp(llama(False, False, False)),
        **experts(BLOCK, names=("w1", "w3", "w2")),
    },
    sizes=(*SIZES, ("num_local_experts", "expert")),
    slot=f"{LAYER}.self_attn",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": kv_heads(8),
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    rewrite=read_aliases({"num_experts": "num_local_experts"}),
    multiples=MULTIPLES,
    routed="num_experts_per_tok",
)
