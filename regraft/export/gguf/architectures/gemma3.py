"""gemma3: the text model of Gemma 3."""

from __future__ import annotations

from typing import Any

from ..architecture import GELU, GGUFArchitecture

LARGEST = 62  # layers of the size for which llama.cpp scales scores in another way


def find_keys(stock: Any) -> dict[str, Any]:
    """The base of the rotary positions in layers that slide, and the cap on logits."""
    sliding = stock.rope_parameters["sliding_attention"]
    keys = {"rope.freq_base_swa": float(sliding["rope_theta"])}
    if stock.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(stock.final_logit_softcapping)
    return keys


def find_misfits(stock: Any) -> list[str]:
    """A cap on scores, and rotary positions of sliding layers that are scaled."""
    found = []
    if stock.attn_logit_softcapping is not None:
        found.append(
            f"attn_logit_softcapping is {stock.attn_logit_softcapping:g}, llama.cpp has none here"
        )
    kind = stock.rope_parameters["sliding_attention"].get("rope_type", "default")
    if kind != "default":
        found.append(f"sliding layers have the rope_type {kind}, llama.cpp scales full layers only")
    return found


def find_scale(stock: Any) -> float:
    """The factor on the scores, which depends on the number of layers."""
    if stock.num_hidden_layers == LARGEST:
        return float((stock.hidden_size // stock.num_attention_heads) ** -0.5)
    return float(stock.head_dim**-0.5)


architecture = GGUFArchitecture(
    name="gemma3",
    families=("gemma3_text",),
    names="GEMMA3",
    activations=GELU,
    reads=("attn_logit_softcapping", "final_logit_softcapping"),
    ropes=("default", "linear"),
    windows=True,
    scale=find_scale,
    keys=find_keys,
    find_misfits=find_misfits,
)
