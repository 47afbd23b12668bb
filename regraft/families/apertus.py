"""Apertus (Swiss AI, arXiv 2509.14233): Llama with norms on queries and keys, and a plain MLP under
xIELU, whose two factors are learned.
"""

from ..core.anatomy import Part, norm
from .arcee import without_gate
from .llama import LAYER, variant

ATTENTION, ACTIVATION = f"{LAYER}.self_attn", f"{LAYER}.mlp.act_fn"
LEARNED = ("alpha_n", "alpha_p")  # of shape (1,)
FIXED = ("beta", "eps")  # scalars that the class stores too

anatomy = variant(
    "apertus",
    {"rms_norm_eps": 1e-5},
    parts={
        **without_gate(),
        **norm("norm.attn", f"{LAYER}.attention_layernorm"),
        **norm("norm.mlp", f"{LAYER}.feedforward_layernorm"),
        **norm("attn.q_norm", f"{ATTENTION}.q_norm", "dim"),
        **norm("attn.k_norm", f"{ATTENTION}.k_norm", "dim"),
        **{f"mlp.act.{name}": Part(f"{ACTIVATION}.{name}", "scale one") for name in LEARNED},
        **{f"mlp.act.{name}": Part(f"{ACTIVATION}.{name}", "scalar") for name in FIXED},
    },
)
