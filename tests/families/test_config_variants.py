"""Configs as people have them: null and missing keys, lists by layer, ties, windows, few positions.

The law: such a model is grown, or refused in one line; if it is grown, stock transformers computes
from the result what it computes from the source.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import ARCHITECTURES, CONFIGS, inputs, max_relative_difference, outputs, tiny

import regraft
from regraft.checks.growth import difference_bound
from regraft.core.anatomy import find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.core.stock_config import TAKEN_AS_NULL, find_layer_lists
from regraft.errors import RegraftError
from regraft.growth.depth import EXACT, ORDERS, build_layer_order
from regraft.growth.ligo_options import Ligo
from regraft.growth.steps.ligo import Learned
from regraft.growth.steps.transplant import Transplant
from regraft.io.files import read_json, write_json

WINDOW, LENGTH = 8, 40
S, F = "sliding_attention", "full_attention"
# Config keys -> kinds of the three layers that the class makes of them.
WINDOWED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, [F, S, S]),
    "qwen3": ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, [F, F, S]),
    "qwen3, stated": ("qwen3", {"use_sliding_window": True, "layer_types": [S, F, F]}, [S, F, F]),
    "gemma2": ("gemma2", {}, [S, F, S]),
    "gemma3": ("gemma3_text", {"sliding_window_pattern": 2, "layer_types": None}, [S, F, S]),
    "ministral": ("ministral", {"layer_types": [F, S, F]}, [F, S, F]),
}


def save(folder: Path, family: str, **keys: Any) -> Path:
    """A tiny model as stock transformers saves it."""
    tiny(family, **keys)[1].save_pretrained(folder)
    return folder


def edit(folder: Path, drop: Any = (), **keys: Any) -> None:
    """Change config.json."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {k: v for k, v in config.items() if k not in drop} | keys)


def stock(folder: Path) -> Any:
    """The model that `from_pretrained` gives."""
    config = read_json(folder / "config.json")
    encoder = config["model_type"] in ARCHITECTURES
    kind = (
        getattr(transformers, config["architectures"][0])
        if encoder
        else transformers.AutoModelForCausalLM
    )
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def rows(model: Any) -> dict[str, torch.Tensor]:
    """Inputs longer than the windows, or as long as there are positions."""
    given = inputs(model.config)
    if "input_ids" in given:
        # RoBERTa counts positions from two.
        length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH) - 2)
        generator = torch.Generator().manual_seed(1)
        given = {"input_ids": torch.randint(3, 97, (2, length), generator=generator)}
    return given


def compute(folder: Path) -> dict[str, torch.Tensor]:
    """The outputs of the stock model."""
    model = stock(folder)
    return outputs(model, rows(model))


def expect_same(source: Path, result: Path, before: Checkpoint, after: Checkpoint) -> None:
    """Stock source and stock result compute the same."""
    old, new = compute(source), compute(result)
    bound = difference_bound(before, after)
    assert old and all(max_relative_difference(old[key], new[key]) < bound for key in old)


def grow(folder: Path, step: Any = None) -> tuple[Checkpoint, Checkpoint, Path]:
    """Source, result and where it was saved."""
    source = Checkpoint.open(folder)
    result = (step or regraft.Deepen(5))(source)
    out = folder.parent / f"{folder.name}-out"
    result.save(out)
    return source, result, out


def field_names(family: str) -> list[str]:
    """Public keys of a config class."""
    kind = getattr(transformers, CONFIGS[family])
    return [f.name for f in dataclasses.fields(kind) if not f.name.startswith("_")]


def takes(family: str, **keys: Any) -> bool:
    """Whether the class takes the keys."""
    try:
        getattr(transformers, CONFIGS[family]).from_dict(keys)
    except Exception:
        return False
    return True


# Sizes: the table says which are missing.
def required(family: str) -> set[str]:
    return find_anatomy({"model_type": family}).required_keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_table_defaults_are_those_of_the_class(family: str) -> None:
    """Every key of the table, missing or null."""
    kind, anatomy = getattr(transformers, CONFIGS[family]), find_anatomy({"model_type": family})
    bare = {key: getattr(kind(), key) for key in anatomy.required_keys()}
    keys = {key for key in anatomy.defaults if not key.startswith("_")} & set(field_names(family))
    assert {anatomy.eps, *(key for key, _ in anatomy.sizes if not key.startswith("_"))} <= (
        keys | set(bare) | {"head_dim"}
    )
    filled, full = anatomy.fill_defaults(bare), kind.from_dict(bare)
    expected = {key: getattr(full, key) for key in keys}
    if family == "ministral":
        expected["head_dim"] = 4096 // 32  # the class cannot be built without
    assert {key: filled[key] for key in keys} == expected

    for key in sorted(keys):
        if takes(family, **bare, **{key: None}):
            null = getattr(kind.from_dict({**bare, key: None}), key)
            assert anatomy.fill_defaults({**bare, key: None})[key] == null or key in anatomy.not_null
    assert all(takes(family, **{key: None}) for key in TAKEN_AS_NULL)


@pytest.mark.parametrize("family", CONFIGS)
def test_null_means_what_it_means_to_the_class(family: str, tmp_path: Path) -> None:
    """All keys at once that the class takes as null, and all that it does not."""
    names = [name for name in field_names(family) if name not in required(family)]
    keep = ("architectures", "num_key_value_heads", "sliding_window", "layer_types", "head_dim")
    taken = [name for name in names if takes(family, **{name: None}) and name not in keep]
    refused = [name for name in names if not takes(family, **{name: None}) and name not in keep]
    kind = getattr(transformers, CONFIGS[family])
    keys = {} if family == "vit" else {"architecture": None}
    folder = save(tmp_path / "taken", family, **keys)
    want = compute(folder)
    assert taken and refused and want
    edit(folder, **dict.fromkeys(taken), quantization_config=None)
    source, result, out = grow(folder)
    assert read_json(out / "config.json")["model_type"] == family
    print(kind, taken, refused)
