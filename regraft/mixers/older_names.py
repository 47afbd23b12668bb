"""What earlier versions called the tensors of a linearized model, and what they are called now;
what they left unsaid in its config.

Files say by their names which version wrote them: a name of today is no older name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Modules in a mixer or in a branch of one. Earlier versions kept projections in a module `qkv`.
MODULES = {
    "qkv.q": "q_proj",
    "qkv.k": "k_proj",
    "qkv.v": "v_proj",
    "qkv.q_norm": "q_norm",
    "qkv.k_norm": "k_norm",
    "o": "o_proj",
}
# In the names of low-rank additions, slashes stand for dots.
INSIDE = r"([./]mixer[./](?:\w+[./])*)"

# Pattern -> replacement, in the form of the `key_mapping` of transformers. All names stood behind
# "host." once.
OLDER_NAMES = {r"(^|[./])host[./]": r"\1"} | {
    rf"{INSIDE}{old.replace('.', '[./]')}(?=[./])": rf"\1{new}" for old, new in MODULES.items()
}


def rename_older(name: str) -> str:
    """The name that a tensor has now, from the one in a file of any version."""
    for pattern, replacement in OLDER_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def first_name(name: str) -> str:
    """The name that version 0.1.0 gave a tensor of a mixer.

    Random numbers are drawn by it, so that `check` repeats those in files of any version.
    """
    for old, new in MODULES.items():
        name = re.sub(rf"{INSIDE}{new}(?=[./])", rf"\1{old}", name)
    return f"host.{name}"


def leave_out_caps(attention: Sequence[Mapping[str, Any] | None]) -> list[Mapping[str, Any] | None]:
    """Fields of attention from version 0.1.0, whose mixers left out the cap that the source has.

    Args:
        attention: by layer, None where softmax attention is kept.
    """
    return [fields if fields is None else {"softcap": None, **fields} for fields in attention]
