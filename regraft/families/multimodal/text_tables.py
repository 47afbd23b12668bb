"""Tables of language models that stand in multimodal models alone."""

from __future__ import annotations

from dataclasses import replace

from ...core.anatomy import Anatomy
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
