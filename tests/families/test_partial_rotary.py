"""Heads of which a part turns, and norms that keep heads as wide as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import tiny, tokens

from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen
from regraft.io import files

BOUND = 2e-5
SIZES: dict[str, Any] = {"heads": 3, "kv": 3, "dim": 16, "hidden": 48}


def turning(share: float, **keys: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 500.0,
            "partial_rotary_factor": share,
        }
        | keys
    }


def saved(folder: Path, family: str, **keys: Any) -> Checkpoint:
    tiny(family, **keys)[1].save_pretrained(folder / "source")
    return Checkpoint.open(folder / "source")


@torch.no_grad()
def difference(folder: Path, out: str) -> float:
    """max |logit difference| / max |logit| of two directories, read by their stock classes."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = [load(folder / name, dtype=torch.float32).eval() for name in ("source", out)]
    before, after = (model(tokens(2, 24)).logits for model in models)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("dim", [17, 23, 32])
@pytest.mark.parametrize(
    "keys",
    [
        turning(0.25),
        turning(1.0),
        turning(0.5, rope_type="linear", factor=3.0),
        turning(0.5, rope_type="dynamic", factor=2.0),
        turning(1.0, rope_type="yarn", factor=2.0, original_max_position_embeddings=16),
    ],
    ids=["quarter", "whole", "linear", "dynamic", "yarn"],
)
def test_wider_heads_keep_the_part_that_turns(
    keys: dict[str, Any], dim: int, tmp_path: Path
) -> None:
    """Of any type and width, odd ones too: new coordinates join those that do not turn."""
    Widen(head_dim=dim)(saved(tmp_path, "phi", **SIZES, **keys)).save(tmp_path / "out")
    assert difference(tmp_path, "out") < BOUND


@pytest.mark.parametrize("dim", [18, 22, 32, 48])
@pytest.mark.parametrize("share", [0.5, 0.45, 1.0])
def test_proportional_positions_follow_wider_heads(share: float, dim: int, tmp_path: Path) -> None:
    source = saved(tmp_path, "starcoder2", **SIZES, **turning(share, rope_type="proportional"))
    made = Widen(head_dim=dim)(source)
    made.save(tmp_path / "out")
    assert difference(tmp_path, "out") < BOUND
    theta = made.config["rope_parameters"]["rope_theta"]
    assert theta == 500.0 if dim % 16 == 0 else theta == pytest.approx(500.0 ** (dim / 16))


def test_growth_after_growth_and_files_in_between(tmp_path: Path) -> None:
    """Saved models repeat rotary parameters under older keys; all of them have to follow."""
    for family, keys in (
        ("phi", turning(0.5, rope_type="linear", factor=3.0)),
        ("starcoder2", turning(0.5, rope_type="proportional")),
    ):
        folder = tmp_path / family
        Widen(head_dim=22)(saved(folder, family, **SIZES, **keys)).save(folder / "once")
        Widen(head_dim=30)(Checkpoint.open(folder / "once")).save(folder / "twice")
        assert difference(folder, "once") < BOUND and difference(folder, "twice") < BOUND


def test_frequencies_beyond_float32_are_refused(tmp_path: Path) -> None:
    source = saved(
        tmp_path, "starcoder2", **SIZES, **turning(0.5, rope_type="proportional", rope_theta=1e24)
    )
    with pytest.raises(RegraftError, match=r"1e\+24 \*\* 1.75, beyond float32"):
        Widen(head_dim=28)(source)
    Widen(head_dim=32)(source).save(tmp_path / "out")
    assert difference(tmp_path, "out") < BOUND


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_the_share_that_turns_is_the_class_default_when_the_config_says_none(
    family: str, tmp_path: Path
) -> None:
    saved(tmp_path, family, **SIZES)
    config = files.read_json(tmp_path / "source" / "config.json")
    del config["rope_parameters"]
    files.write_json(tmp_path / "source" / "config.json", config)
    Widen(head_dim=24, hidden=72)(Checkpoint.open(tmp_path / "source")).save(tmp_path / "out")
    assert difference(tmp_path, "out") < BOUND


def test_heads_stay_narrow_under_norms_that_subtract_their_mean(tmp_path: Path) -> None:
    source = saved(tmp_path, "phi", hidden=72, qk_layernorm=True)
    for step in (Widen(head_dim=12), Widen(head_dim=16, hidden=144)):
        with pytest.raises(
            RegraftError, match="leave it at 8 and grow --heads, --hidden, --ffn or --layers"
        ):
            step(source)
    for number, step in enumerate(
        (Widen(hidden=79), Widen(heads=12, hidden=96), Widen(ffn=60), Deepen(4))
    ):
        step(source).save(tmp_path / str(number))
        assert difference(tmp_path, str(number)) < BOUND
