"""What holds for every model around a language model: it grows inside, and reads images as before.

A type is a case in `helpers.wrappers.WRAPPERS`, nothing else.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from helpers.tiny import max_relative_difference, tokens
from helpers.wrappers import WRAPPERS, build_wrapper

import regraft
from regraft.core.checkpoint import Checkpoint
from regraft.families.multimodal import wrappers
from regraft.io.files import read_json
from regraft.modeling import image_inputs

BOUND = 2e-5


@torch.no_grad()
def compute(folder: Path) -> dict[str, torch.Tensor]:
    """Logits of text alone and of text with an image, by the stock class of a folder's config."""
    config = read_json(folder / "config.json")
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    given = {"text": {"input_ids": tokens(2, 23) % 96}}
    given["image"] = image_inputs(Checkpoint.open(folder), model)
    pixels = given["image"]["pixel_values"].flip(-1)
    given["mirrored"] = given["image"] | {"pixel_values": pixels}
    return {name: model(**inputs).logits for name, inputs in given.items()}


def compare(before: dict[str, torch.Tensor], folder: Path) -> float:
    """Largest relative difference of a folder's model from logits."""
    after = compute(folder)
    return max(max_relative_difference(before[name], after[name]) for name in before)


def test_every_wrapper_has_a_case() -> None:
    assert WRAPPERS.keys() == wrappers.WRAPPERS.keys()


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_language_model_grows_inside(family: str, tmp_path: Path) -> None:
    """Layers, MLP, heads and stream at once; what stands beside the language model is carried."""
    build_wrapper(family)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    assert not source.dropped
    assert source.anatomy.resize_config(source.config, source.sizes) == source.config
    before = compute(tmp_path / "source")
    assert max_relative_difference(before["image"], before["mirrored"]) > 0.01  # pixels count

    wide = regraft.Widen(hidden=64, ffn=32, heads=8)(source)
    grown = regraft.Deepen(6)(wide)
    grown.save(tmp_path / "grown")
    assert compare(before, tmp_path / "grown") < BOUND
    assert Checkpoint.open(tmp_path / "grown").sizes == grown.sizes

    carried = [key for key in source.tensors if key[0].startswith("carried.")]
    same = [key for key in carried if grown.tensors[key].provenance.kind == "copied"]
    assert len(same) > len(carried) // 2
    for key in same:
        assert torch.equal(source.tensors[key].read(), grown.tensors[key].read())
