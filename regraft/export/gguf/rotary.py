"""Rotary positions in llama.cpp's words: metadata, and factors by frequency where it takes them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .architecture import GGUFArchitecture

# Rotary parameters that each kind reads; others would be lost.
READ = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
SHARED = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
# Numbers that say what yarn does by itself.
USUAL = {"truncate": True, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
WHY = {
    "dynamic": "llama.cpp does not scale by the length of a text",
    "longrope": "llama.cpp takes long factors by the context it was started with, not by the text",
}


def rope_of(stock: Any) -> dict[str, Any]:
    """The rotary parameters of layers that see everything."""
    rope = getattr(stock, "rope_parameters", None) or {}
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def find_rope_misfits(stock: Any, architecture: GGUFArchitecture) -> list[str]:
    """What of the rotary positions an architecture does not compute, a line each."""
    rope = rope_of(stock)
    kind = rope.get("rope_type", "default")
    if kind not in architecture.ropes:
        reason = WHY.get(kind, f"llama.cpp's {architecture.name} has no such positions")
        return [f"rope_type is {kind}: {reason}"]
    found = [
        f"{key} of rope_parameters is {value}, which llama.cpp does not read"
        for key, value in rope.items()
        if key not in (*SHARED, *READ[kind], *architecture.reads) and not is_usual(kind, key, value)
    ]
    share = rope.get("partial_rotary_factor")
    if share not in (None, 1, 1.0) and not architecture.partial:
        found.append(
            f"partial_rotary_factor is {share:g}, llama.cpp's {architecture.name} rotates whole"
            " heads"
        )
    return found


def is_usual(kind: str, key: str, value: Any) -> bool:
    """Whether a parameter says nothing: null, or what yarn does by itself."""
    return value is None or kind == "yarn" and USUAL.get(key, key) == value


def find_rope_keys(stock: Any, dim: int) -> dict[str, Any]:
    """Metadata of the rotary positions.

    Args:
        stock: config of transformers.
        dim: width of a head.
    """
    rope = rope_of(stock)
    if not rope:
        return {}
    keys: dict[str, Any] = {
        "rope.dimension_count": int(dim * (rope.get("partial_rotary_factor") or 1)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or stock.max_position_embeddings
        keys |= {
            "rope.scaling.original_context_length": int(original),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
        }
    return keys


def compute_frequency_factors(stock: Any) -> Tensor | None:
    """What each frequency is divided by (rotary dims / 2), as transformers computes `llama3`;
    None for other kinds.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = rope_of(stock)
    if rope.get("rope_type") != "llama3":
        return None
    plain = copy.deepcopy(stock)
    dim = getattr(stock, "head_dim", None) or stock.hidden_size // stock.num_attention_heads
    base = float(rope["rope_theta"])
    usual = base ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](plain, torch.device("cpu"))
    return usual / scaled
