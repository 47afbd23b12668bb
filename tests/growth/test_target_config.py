"""`--to`: every key of the target is what the result has, or is refused by name; nothing is
dropped, and what is carried over changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import GROWABLE, inputs, max_relative_difference, outputs, tiny

from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.sizes_to_steps import Growth
from regraft.growth.target_config import NEUTRAL, find_reason, read_with_defaults

# Values for keys whose default is null, or of which not every other value is one.
OTHERS: dict[str, Any] = {
    "dtype": "bfloat16",
    "architectures": ["LlamaModel"],
    "problem_type": "regression",
    "classifier_dropout": 0.4,
    "use_bidirectional_attention": True,
    "summary_activation": "tanh",
    "summary_type": "last",
    "sliding_window": 8,
    "pad_token_id": 5,
    "id2label": None,
    "label2id": None,
    "layer_types": None,
    "stage_names": None,
    "out_features": ["stage1"],
    "out_indices": [1],
    "pooler_act": "relu",
}


def change(key: str, value: Any) -> Any:
    """Another value of a config key, that its class takes."""
    if isinstance(value, dict) and key == "rope_parameters":
        return json.loads(json.dumps(value).replace("10000", "20000").replace("1000000", "2"))
    if key in ("id2label", "label2id"):
        return {k: f"other {v}" for k, v in value.items()} if key == "id2label" else None
    if key == "layer_types":
        other = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
        return [other[value[0]], *value[1:]]
    if OTHERS.get(key) is not None and value != OTHERS[key]:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if key in ("hidden_act", "hidden_activation", "activation_function"):
        return "relu"
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.5 + 0.05
    return None


def save(family: str, folder: Path, **keys: Any) -> tuple[Any, Any]:
    config, model = tiny(family, **keys)
    model.save_pretrained(folder)
    return config, model


def write_target(folder: Path, fields: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def larger_fields(family: str) -> dict[str, Any]:
    ffn = {"mixtral": 64, "dinov2": 108}.get(family, 60)
    return json.loads(tiny(family, ffn=ffn, layers=4)[0].to_json_string(use_diff=False))


@pytest.mark.parametrize("family", GROWABLE)
def test_no_key_of_a_target_is_dropped(family: str, tmp_path: Path) -> None:
    config, model = save(family, tmp_path / "source")
    source, base = Checkpoint.open(tmp_path / "source"), larger_fields(family)
    sizes = {key for key, _ in source.anatomy.sizes}
    accepted, refused = {}, []
    for key in base:
        value = change(key, base[key])
        if value is None or key in ("model_type", "transformers_version"):
            continue
        to = write_target(tmp_path / "target", base | {key: value})
        try:
            grown = Growth(to=to)(source)
        except RegraftError as error:
            named = key in str(error) or key in sizes or key == "rope_parameters"
            assert named or "growth does not change" in str(error), (key, error)
            assert "\n" not in str(error)
            refused.append(key)
            continue
        if find_reason(key, NEUTRAL) is None:
            wanted = read_with_defaults(base | {key: value})
            assert read_with_defaults(grown.config)[key] == wanted[key], key
            if key not in sizes:
                accepted[key] = value
    assert accepted and refused

    # All that was accepted, together.
    to = write_target(tmp_path / "target", base | accepted)
    Growth(to=to)(source).save(tmp_path / "out")
    stock = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    given = inputs(config)
    before, after = outputs(model, given), outputs(stock, given)
    bound = 1e-3 if family in ("bert", "roberta", "olmo2") else 2e-5
    for name, value in before.items():
        assert max_relative_difference(value, after[name]) < bound, (name, accepted)
