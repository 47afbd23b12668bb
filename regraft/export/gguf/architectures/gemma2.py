"""gemma2: caps on scores and logits, every second layer slides."""

from __future__ import annotations

from typing import Any

from ..architecture import GELU, GGUFArchitecture

LARGEST = 46  # layers of the size for which llama.cpp scales scores in another way


def find_keys(stock: Any) -> dict[str, Any]:
    """The caps."""
    return {
        "attn_logit_softcapping": float(stock.attn_logit_softcapping),
        "final_logit_softcapping": float(stock.final_logit_softcapping),
    }


def find_misfits(stock: Any) -> list[str]:
    """Caps that are switched off, which llama.cpp cannot do."""
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    return [f"{key} is null, llama.cpp always caps" for key in caps if getattr(stock, key) is None]


def find_scale(stock: Any) -> float:
    """The factor on the scores, which depends on the number of layers."""
    if stock.num_hidden_layers == LARGEST:
        return float((stock.hidden_size // stock.num_attention_heads) ** -0.5)
    return float(stock.head_dim**-0.5)


architecture = GGUFArchitecture(
    name="gemma2",
    families=("gemma2",),
    names="GEMMA2",
    activations=GELU,
    reads=("attn_logit_softcapping", "final_logit_softcapping"),
    ropes=("default",),
    windows=True,
    tied=True,
    scale=find_scale,
    keys=find_keys,
    find_misfits=find_misfits,
)
