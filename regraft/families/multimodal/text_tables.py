"""Tables of language models that stand in multimodal models alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...core.anatomy import Anatomy
from ...errors import RegraftError
from .. import qwen2, qwen3
from ..helium import COUPLED
from ..llama import SIZES

# M-RoPE turns queries and keys of text as rotary positions do; images are the classes' business.
QWEN2 = replace(qwen2.anatomy, sizes=(*SIZES, COUPLED))
# Type -> (name of the file whose table it is like, its table).
TEXT_TABLES: dict[str, tuple[str, Anatomy]] = {
    "qwen2_vl_text": ("qwen2", replace(QWEN2, family="qwen2_vl_text")),
    "qwen2_5_vl_text": ("qwen2", replace(QWEN2, family="qwen2_5_vl_text")),
    "qwen3_vl_text": ("qwen3", replace(qwen3.anatomy, family="qwen3_vl_text")),
}


def find_causal_class(family: str) -> str:
    """Name of the class that holds a language model alone; RegraftError when there is none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)
    if not isinstance(found, str):
        raise RegraftError(
            f"transformers has no class that holds a {family} alone: grow it inside its model"
        )
    return found


def drop_sections(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters without M-RoPE's sections, which turn text as plain ones do.

    Args:
        rope: of a language model that stands in a multimodal one.
    """
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope")}
    return {key: "default" if value == "mrope" else value for key, value in kept.items()}
