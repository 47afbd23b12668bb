"""gptneox: GPT-NeoX and Pythia."""

from __future__ import annotations

from typing import Any

from ..architecture import GELU, GGUFArchitecture


def find_keys(stock: Any) -> dict[str, Any]:
    """Whether attention and MLP read the same input."""
    return {"use_parallel_residual": bool(stock.use_parallel_residual)}


architecture = GGUFArchitecture(
    name="gptneox",
    families=("gpt_neox",),
    names="GPTNEOX",
    activations=GELU,
    biases="attn.qkv attn.o mlp.up mlp.down",
    needed="attn.qkv attn.o",
    reads=("rotary_pct", "rotary_emb_base"),
    ropes=("default", "linear"),
    partial=True,
    own_head=True,
    keys=find_keys,
)
