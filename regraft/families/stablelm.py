"""StableLM 2 (arXiv 2402.17834): Llama with layer norms, a quarter of whose heads turns.

The class has hidden = heads * head_dim.
"""

from ..core.anatomy import Anatomy, norm
from .llama import DEFAULTS, LAYER, SIZES, kv_heads
from .llama import parts as llama

# The head dim has no key of its own.
COUPLED = (*(pair for pair in SIZES if pair[1] != "dim"), ("hidden_size", "kv group dim"))


anatomy = Anatomy(
    family="stablelm",
    parts={
        **llama("use_qkv_bias", False, False),
        **norm("norm.attn", f"{LAYER}.input_layernorm", bias=True),
        **norm(
            "norm.mlp",
            f"{LAYER}.post_attention_layernorm",
            bias=True,
            unless="use_parallel_residual",
        ),
        **norm("norm.final", "model.norm", bias=True, writes="head"),
    },
    sizes=COUPLED,
    slot=f"{LAYER}.self_attn",
    defaults={
        **{key: value for key, value in DEFAULTS.items() if key != "head_dim"},
        "num_key_value_heads": kv_heads(32),
        "use_qkv_bias": False,
        "use_parallel_residual": False,
        "layer_norm_eps": 1e-5,
        "_rotary_share": {"partial_rotary_factor": 0.25},
    },
    eps="layer_norm_eps",
)
