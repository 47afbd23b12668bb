"""Nemotron-4 and Minitron (NVIDIA, arXiv 2402.16819): layer norms whose gains are stored minus one,
a plain MLP under a squared ReLU, and rotary positions on half a head.
"""

from ..core.anatomy import norm
from .arcee import without_gate
from .llama import LAYER, variant

anatomy = variant(
    "nemotron",
    {"norm_eps": 1e-5, "_rotary_share": {"partial_rotary_factor": 0.5}},
    parts={
        **without_gate(),
        **norm("norm.attn", f"{LAYER}.input_layernorm", unit=True, bias=True),
        **norm("norm.mlp", f"{LAYER}.post_attention_layernorm", unit=True, bias=True),
        **norm("norm.final", "model.norm", unit=True, bias=True, writes="head"),
    },
    eps="norm_eps",
)
