"""What holds for models with a tower for texts and one for images: each tower grows by itself.

A type is a case in `helpers.zoo.TWO_TOWERS`, nothing else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.cli import as_json, refused
from helpers.tiny import inputs, max_relative_difference, tokens
from helpers.zoo import TWO_TOWERS, build_towers

import regraft
from regraft.checks.check import check
from regraft.core.anatomy import find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.growth.steps.grow_tower import GrowTower

BOUND = 2e-5


@torch.no_grad()
def compute(family: str, folder: Path) -> torch.Tensor:
    """Scores of texts and images by the stock class, in float64: scores are small differences."""
    kind = getattr(transformers, TWO_TOWERS[family][0])
    model = kind.from_pretrained(folder, dtype=torch.float64).eval()
    pixels = inputs(model.config.vision_config)
    return model(input_ids=tokens(3, 11), **pixels).logits_per_image


def save(family: str, folder: Path, **top: Any) -> None:
    build_towers(family)[1].save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | top))


@pytest.mark.parametrize("family", TWO_TOWERS)
def test_both_towers_grow(family: str, tmp_path: Path) -> None:
    """Layers, MLP, heads and stream of both; scores, receipts and the recorded steps agree."""
    save(family, tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    assert not source.dropped
    assert source.anatomy.resize_config(source.config, source.sizes) == source.config
    grown = source
    for tower, layers in (("text", 5), ("vision", 4)):
        grown = GrowTower(tower=tower, hidden=64, ffn=40, layers=layers)(grown)
    grown.save(tmp_path / "grown")
    assert Checkpoint.open(tmp_path / "grown").sizes == grown.sizes
    assert (grown.sizes["depth"], grown.sizes["vision_depth"]) == (5, 4)
    assert (grown.sizes["hidden"], grown.sizes["vision_hidden"]) == (64, 64)

    before, after = (compute(family, tmp_path / name) for name in ("source", "grown"))
    assert max_relative_difference(before, after) < BOUND
    receipts = check(tmp_path / "source", tmp_path / "grown")
    assert receipts["holds"] and receipts["unequal"] == [] and receipts["locked"] == 0, receipts


def test_flags_say_which_tower_grows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One number is for both towers where they are equally large."""
    save("clip", tmp_path / "clip")
    plan = as_json(capsys, "plan", tmp_path / "clip", "--layers", 6)["target"]
    assert (plan["depth"], plan["vision_depth"]) == (6, 6)
    flags = ("--ffn", 50, "--tower", "vision")
    plan = as_json(capsys, "plan", tmp_path / "clip", *flags)["target"]
    assert (plan["ffn"], plan["vision_ffn"]) == (24, 50)

    message = refused(capsys, "plan", tmp_path / "clip", "--ffn", 50)
    assert "ffn 24 in its tower for texts and 28 in that for images" in message
    message = refused(capsys, "plan", tmp_path / "clip", "--vocab", 200)
    assert "--vocab 200 is not for clip" in message
    message = refused(capsys, "plan", tmp_path / "clip", "--layers", 9, "--tower", "left")
    assert "--tower 'left' is none of text, vision" in message
    message = refused(capsys, "linearize", tmp_path / "clip", tmp_path / "out")
    assert "reads in both directions" in message


def test_other_models_have_no_towers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save("siglip", tmp_path / "siglip")
    with pytest.raises(regraft.RegraftError, match="which grow one by one: use GrowTower"):
        regraft.Deepen(9)(Checkpoint.open(tmp_path / "siglip"))
    build_towers("siglip")[1].text_model.save_pretrained(tmp_path / "text")
    message = refused(capsys, "plan", tmp_path / "text", "--layers", 9, "--tower", "text")
    assert "is a siglip_text_model, which has no towers" in message


def test_files_may_leave_sizes_out_or_have_them_twice() -> None:
    """The class fills in what is missing, and takes `..._config_dict` where files have both."""
    bare = {"model_type": "clip", "text_config": {}, "vision_config": {"hidden_size": 96}}
    sizes = find_anatomy(bare).solve(regraft.core.anatomy.read_as_auto(bare))
    assert (sizes["hidden"], sizes["vision_hidden"], sizes["pool"]) == (512, 96, 512)
    twice = bare | {"text_config_dict": {"hidden_size": 64, "num_attention_heads": 4}}
    config = regraft.core.anatomy.read_as_auto(twice)
    assert config["text_config"]["hidden_size"] == 64 and "text_config_dict" not in config
