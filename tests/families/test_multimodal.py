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
from helpers.cli import run_main
from helpers.tiny import byte_tokenizer, max_relative_difference, tokens, write_text
from helpers.wrappers import WRAPPERS, build_wrapper

import regraft
from regraft import modeling
from regraft.core.anatomy import find_anatomy, read_as_auto
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.families.multimodal import wrappers
from regraft.growth import depth
from regraft.mixers.remix import Remix
from regraft.modeling import image_inputs
from regraft.modeling.text_part import run_text_part

BOUND = 2e-5


def load(folder: Path) -> Any:
    """The model in a folder, as its users load it."""
    auto = transformers.AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def compute(folder: Path) -> dict[str, torch.Tensor]:
    """Logits of text alone and of text with an image, by the class that Auto takes for a folder."""
    model = load(folder)
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
    with pytest.raises(RegraftError, match="no language model among other parts"):
        regraft.TakeText()(text)


@pytest.mark.parametrize("family", WRAPPERS)
def test_a_language_model_is_linearized_inside(family: str, tmp_path: Path) -> None:
    """A window as long as the row is the source, of text and of images, also when it is reloaded.

    Types for which it is not, and those alone, are refused.
    """
    build_wrapper(family)[1].save_pretrained(tmp_path / "source")
    source, remix = Checkpoint.open(tmp_path / "source"), Remix("window", "0", window=96, sinks=0)
    before = compute(tmp_path / "source")
    if "layers with a state" in source.anatomy.keeps_softmax:
        with pytest.raises(RegraftError, match="convert --part text"):
            remix(source)
        remix(regraft.TakeText()(source))
        return
    if source.anatomy.keeps_softmax:
        own = source.anatomy.closed.get("attention", "reads images in both directions")
        with pytest.raises(RegraftError, match=own):
            remix(source)
        if "attention" in source.anatomy.closed:
            return  # nor is its language model alone
        text = source.anatomy.text_config(source.config)
        if text.get("use_bidirectional_attention"):
            return  # so does its language model alone
        open_to_mixers = dataclasses.replace(source.anatomy, keeps_softmax="")
        remix(dataclasses.replace(source, anatomy=open_to_mixers)).save(tmp_path / "linear")
        assert compare(before, tmp_path / "linear") > 1e-3
        return

    made = remix(source)
    made.save(tmp_path / "linear")
    assert compare(before, tmp_path / "linear") < BOUND
    again = Checkpoint.open(tmp_path / "linear")
    carried = [key for key in source.tensors if key[0].startswith("carried.")]
    assert carried and not again.dropped
    for key in carried:
        assert torch.equal(source.tensors[key].read(), again.tensors[key].read())

    models = load(tmp_path / "source"), load(tmp_path / "linear")
    inputs = image_inputs(source, models[0])
    padded = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    padded = {
        name: torch.nn.functional.pad(value, (3, 0)) if value.shape == (1, 16) else value
        for name, value in padded.items()
    }
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for given in (inputs, padded):
        texts = [model.generate(**given, **options) for model in models]
        assert torch.equal(*texts)
    made = models[1].generate(**inputs, **options, return_dict_in_generate=True)
    kinds = [modeling.cache.is_mixer_state(layer) for layer in made.cache.layers]
    assert kinds == [False, True, True]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_check_proves_a_linearized_model_with_images(family: str, tmp_path: Path) -> None:
    build_wrapper(family)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    linear = Remix("gla", "0", window=8)(source)
    linear.save(tmp_path / "linear")
    receipts = regraft.check(tmp_path / "source", tmp_path / "linear")
    assert receipts["holds"], receipts["failed"]
    assert receipts["image_vs_stock"] < BOUND
    assert {"logits with an image", "cache with an image"} <= set(receipts["compared"])

    # It grows, and its language model is taken out, with the mixers.
    regraft.Deepen(4)(Checkpoint.open(tmp_path / "linear")).save(tmp_path / "grown")
    receipts = regraft.check(tmp_path / "linear", tmp_path / "grown")
    assert receipts["holds"] and "logits with an image" in receipts["compared"]
    regraft.TakeText()(Checkpoint.open(tmp_path / "linear")).save(tmp_path / "text")
    models = [modeling.load(tmp_path / name) for name in ("linear", "text")]
    with torch.no_grad():
        whole, text = (model(tokens(2, 23) % 96).logits for model in models)
    assert torch.equal(whole, text)


def test_a_linearized_model_is_trained_on_text(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Mixers move, what stands beside the language model does not, and its files are carried."""
    source, out = tmp_path / "source", tmp_path / "out"
    build_wrapper("qwen2_5_vl", vocab_size=300)[1].save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "Some"}')
    data = write_text(tmp_path / "text.txt")
    flags = ("--mixer", "gla", "--keep", "0", "--window", "8", "--data", data)
    flags += ("--tokens", "128", "--length", "32")
    code, _, said = run_main(capsys, "linearize", source, out, *flags, "--json")
    assert code == 0, said
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    untrained = Remix("gla", "0")(before)
    moved = {
        key[0].partition(".")[0]
        for key, lazy in after.tensors.items()
        if not torch.equal(lazy.read(), untrained.tensors[key].read())
    }
    assert "mixer" in moved and "carried" not in moved
    assert (out / "preprocessor_config.json").read_text() == '{"image_processor_type": "Some"}'
    assert load(out).config.mixers[1:] == after.config["mixers"][1:]


@pytest.mark.parametrize("family", WRAPPERS)
def test_documents_of_a_row_are_apart_in_training(family: str) -> None:
    """Classes with M-RoPE read where documents begin in another way than the others."""
    model, ids = build_wrapper(family)[1], tokens(1, 20) % 96
    if "linear_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ()):
        pytest.skip("states of the stock class run on from one document into the next")
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with torch.no_grad():
        both = run_text_part(model, positions, input_ids=ids)[0][:, 12:]
        alone = run_text_part(model, positions[:, 12:], input_ids=ids[:, 12:])[0]
    assert max_relative_difference(alone, both) < BOUND


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
