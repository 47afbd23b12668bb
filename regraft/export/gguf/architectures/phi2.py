"""phi2: Phi-1, Phi-1.5 and Phi-2."""

from __future__ import annotations

from typing import Any

from ..architecture import GELU, GGUFArchitecture


def find_misfits(stock: Any) -> list[str]:
    """Norms of queries and keys."""
    return (
        ["qk_layernorm is true, llama.cpp's phi2 has no such norms"] if stock.qk_layernorm else []
    )


architecture = GGUFArchitecture(
    name="phi2",
    families=("phi",),
    names="PHI2",
    activations=GELU,
    biases="attn.q attn.k attn.v attn.o mlp.up mlp.down head",
    ropes=("default", "linear"),
    partial=True,
    square=True,
    own_head=True,
    find_misfits=find_misfits,
)
