"""Mistral (arXiv 2310.06825): Llama without biases."""

from ..core.anatomy import Anatomy
from .llama import DEFAULTS, LAYER, SIZES, parts

anatomy = Anatomy(
    family="mistral",
    parts=parts(qkv_bias=False, o_bias=False, mlp_bias=False),
    sizes=SIZES,
    slot=f"{LAYER}.self_attn",
    defaults=DEFAULTS,
)
