"""llama: Llama, and Mistral and Mixtral where all layers see everything."""

from __future__ import annotations

from typing import Any

from ..architecture import GGUFArchitecture


def find_keys(stock: Any) -> dict[str, Any]:
    """The numbers of Mixtral's experts."""
    if not hasattr(stock, "num_local_experts"):
        return {}
    return {
        "expert_count": stock.num_local_experts,
        "expert_used_count": stock.num_experts_per_tok,
    }


architecture = GGUFArchitecture(
    name="llama",
    families=("llama", "mistral", "ministral", "mixtral"),
    names="LLAMA",
    biases="attn.q attn.k attn.v attn.o mlp.gate mlp.up mlp.down",
    reads=("num_local_experts", "num_experts_per_tok"),
    ropes=("default", "linear", "yarn", "llama3"),
    interleaved=True,
    keys=find_keys,
)
