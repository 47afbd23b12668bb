"""GLM-4 of 2025 (Zhipu AI): GLM with a second norm at the end of each branch."""

from dataclasses import replace
from typing import Any

from ..core.anatomy import linear, norm
from . import glm
from .llama import LAYER

AFTER: dict[str, Any] = {"reads": "branch", "writes": "stream"}
OUT, DOWN = f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj"

anatomy = replace(
    glm.anatomy,
    family="glm4",
    parts={
        **glm.parts(),
        **linear("attn.o", OUT, "kv group dim -> hidden", writes="branch"),
        **norm("norm.attn_post", f"{LAYER}.post_self_attn_layernorm", **AFTER),
        **linear("mlp.down", DOWN, "ffn -> hidden", writes="branch"),
        **norm("norm.mlp_post", f"{LAYER}.post_mlp_layernorm", **AFTER),
    },
)
