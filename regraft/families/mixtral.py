"""Mixtral (arXiv 2401.04088): Mistral with experts behind a router in place of the MLP.

Files hold the tensors of each expert apart. The grouped products over experts need rows of 16
bytes: in bfloat16, hidden and ffn in multiples of 8.
"""

from ..core.anatomy import Anatomy, linear
from ..core.anatomy_defaults import read_aliases
from .llama import DEFAULTS, LAYER, SIZES, kv_heads
from .llama import parts as llama

MOE = f"{LAYER}.block_sparse_moe"
EXPERT = f"{MOE}.experts.{{e}}"


anatomy = Anatomy(
    family="mixtral",
    parts={
        **{
            role: part
            for role, part in llama(False, False, False).items()
            if not role.startswith("mlp.")
        },
        **linear("mlp.router", f"{MOE}.gate", "hidden -> expert"),
        **linear("mlp.{e}.gate", f"{EXPERT}.w1", "hidden -> ffn", at="routed"),
        **linear("mlp.{e}.up", f"{EXPERT}.w3", "hidden -> ffn", at="routed"),
        **linear("mlp.{e}.down", f"{EXPERT}.w2", "ffn -> hidden", at="routed"),
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
    multiples={"hidden": 8, "ffn": 8},
    routed="num_experts_per_tok",
)
