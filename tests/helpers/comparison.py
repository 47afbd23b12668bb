"""A comparison of some seconds: its recipe and its text."""

from __future__ import annotations

from pathlib import Path

import yaml

from regraft.recipes import schema as settings

RECIPES = Path(settings.__file__).parent


LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip


TINY = {
    "task": "next",
    "source": LLAMA,
    "target": {"hidden": 24, "ffn": 48, "heads": 2, "layers": 2},
    "vocabulary": 260,
    "pretrain": {"tokens": 1280, "length": 16, "batch": 8},
    "train": {"tokens": 1280, "length": 16, "batch": 8},
    "arms": [
        {"name": "scratch", "scratch": True},
        {"name": "pad", "grow": {"width_init": "pad", "depth_init": "stack"}},
    ],
    "seeds": [0, 1],
    "every": 5,
    "rows": 8,
}


def recipe(tmp_path: Path, **changes) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(TINY | changes), encoding="utf-8")
    return str(file)
