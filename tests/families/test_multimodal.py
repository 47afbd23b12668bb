"""What holds for every model around a language model: it grows inside, and reads images as before.

A type is a case in `helpers.wrappers.WRAPPERS`, nothing else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import max_relative_difference, tokens
from helpers.wrappers import WRAPPERS, build_wrapper

import regraft
from regraft.core.anatomy import find_anatomy, read_as_auto
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.families.multimodal import wrappers
from regraft.growth import depth
from regraft.io.files import read_json
from regraft.mixers.remix import Remix
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

    heads = None if "kv" in source.anatomy.closed else 8
    wide = regraft.Widen(hidden=64, ffn=32, heads=heads)(source)
    grown = regraft.Deepen(6)(wide)
    grown.save(tmp_path / "grown")
    assert compare(before, tmp_path / "grown") < BOUND
    assert Checkpoint.open(tmp_path / "grown").sizes == grown.sizes

    carried = [key for key in source.tensors if key[0].startswith("carried.")]
    same = [key for key in carried if grown.tensors[key].provenance.kind == "copied"]
    assert len(same) > len(carried) // 2
    for key in same:
        assert torch.equal(source.tensors[key].read(), grown.tensors[key].read())


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
def test_check_compares_images_and_the_text_part(family: str, tmp_path: Path) -> None:
    """Receipts of a grown model, and of its language model taken out and linearized."""
    build_wrapper(family)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    regraft.Deepen(4)(regraft.Widen(ffn=32)(source)).save(tmp_path / "grown")
    receipts = regraft.check(tmp_path / "source", tmp_path / "grown")
    assert receipts["holds"], receipts["failed"]
    assert "logits with an image" in receipts["compared"]

    regraft.TakeText()(source).save(tmp_path / "text")
    receipts = regraft.check(tmp_path / "source", tmp_path / "text")
    assert receipts["holds"] and receipts["rel_logit_diff"] == 0, receipts["failed"]
    text = Checkpoint.open(tmp_path / "text")
    assert text.anatomy.continues_text(text.config)
    Remix(mixer="window", window=64, keep="0")(text)
    with pytest.raises(RegraftError, match="regraft convert --part text takes out"):
        Remix(mixer="window", window=64, keep="0")(source)
    with pytest.raises(RegraftError, match="no language model among other parts"):
        regraft.TakeText()(text)


def test_layers_that_get_features_stay_the_first(tmp_path: Path) -> None:
    """A new layer among those that DeepStack adds to changes what is said of images alone."""
    build_wrapper("qwen3_vl")[1].save_pretrained(tmp_path / "source")
    source, before = Checkpoint.open(tmp_path / "source"), compute(tmp_path / "source")
    order = depth.build_layer_order("identity", 3, 5)
    assert order != depth.build_layer_order("identity", 3, 5, first=2)
    config = source.anatomy.resize_config(source.config, source.sizes | {"depth": 5})
    tensors = depth.deepen_tensors(source, config, {"depth": order}, "identity", 0)
    names = {key: part.name for key, part in source.anatomy.place(config).items()}
    sizes = source.anatomy.solve(config)
    wrong = dataclasses.replace(source, config=config, sizes=sizes, tensors=tensors, names=names)
    wrong.save(tmp_path / "wrong")
    after = compute(tmp_path / "wrong")
    assert max_relative_difference(before["text"], after["text"]) < BOUND
    assert max_relative_difference(before["image"], after["image"]) > 1e-3


def test_sizes_that_grow_in_no_exact_way_are_refused(tmp_path: Path) -> None:
    build_wrapper("qwen3_vl")[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    with pytest.raises(RegraftError, match="cannot grow its dim from 8 .M-RoPE shares"):
        regraft.Widen(head_dim=16)(source)


def test_configs_as_they_are_published() -> None:
    """Sizes that files leave out are the class's; older files have them beside the others."""
    sparse: dict[str, Any] = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    read = read_as_auto(sparse)
    assert find_anatomy(sparse).solve(read)["hidden"] == read["text_config"]["hidden_size"] == 4096

    flat: dict[str, Any] = {
        "model_type": "qwen2_vl",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 80,
        "vocab_size": 99,
        "rope_theta": 1e5,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "vision_config": {"hidden_size": 64, "embed_dim": 32, "depth": 1},
    }
    read = read_as_auto(flat)
    sizes = find_anatomy(flat).solve(read)
    assert (sizes["hidden"], sizes["depth"], sizes["ffn"]) == (64, 3, 80)
    assert "hidden_size" not in read and read["tie_word_embeddings"] is True
    wide = find_anatomy(read).resize_config(read, sizes | {"hidden": 128, "group": 4})
    assert wide["vision_config"]["hidden_size"] == wide["text_config"]["hidden_size"] == 128
    text = wide["text_config"]["rope_parameters"]
    assert text["mrope_section"] == [2, 3, 3] and text["rope_theta"] == 1e5
