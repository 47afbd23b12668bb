"""Objectives: losses equal transformers' own, corruption is BERT's, wrong data is refused in one
line.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers.tiny import ARCHITECTURES, GROWABLE, tiny
from helpers.training import CLASSIFIERS, MASK, images, text

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.images import read_images
from regraft.errors import RegraftError
from regraft.train.objectives import Packed, build_targets, compute_loss, evaluate_objective

DECODERS = [family for family in GROWABLE if family not in ARCHITECTURES]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", DECODERS)
def test_next_token_loss_is_that_of_the_class(family: str) -> None:
    _, model = tiny(family)
    rows = replace(text(), position_ids=torch.arange(24).repeat(6, 1))
    with torch.no_grad():
        expected = model(input_ids=rows.input_ids, labels=rows.input_ids, use_cache=False).loss
        torch.testing.assert_close(compute_loss(model, "next", rows), expected)
    found = evaluate_objective(model, "next", rows, batch=4)
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5) and 0 <= found["accuracy"] <= 1


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_masked_loss_is_that_of_the_class(family: str) -> None:
    _, model = tiny(family)
    corrupted, labels = build_targets(model, "mask", text(), draws())
    assert isinstance(corrupted, Packed)
    expected = model(input_ids=corrupted.input_ids, labels=labels)
    torch.testing.assert_close(
        compute_loss(model, "mask", text(), generator=draws()), expected.loss
    )
    right = (expected.logits.argmax(-1) == labels)[labels != -100].float().mean()
    for batch in (1, 4, 16):
        found = evaluate_objective(model, "mask", text(), batch)
        assert found["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        assert found["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_image_loss_is_that_of_the_class(family: str) -> None:
    config, model = tiny(family, architecture=CLASSIFIERS[family])
    rows = images(config)
    expected = model(pixel_values=rows.pixel_values, labels=rows.labels)
    torch.testing.assert_close(compute_loss(model, "image", rows), expected.loss)
    right = (expected.logits.argmax(-1) == rows.labels).float().mean()
    assert evaluate_objective(model, "image", rows, 4)["accuracy"] == pytest.approx(float(right))


def test_corruption_is_eighty_ten_ten_of_plain_tokens() -> None:
    _, model = tiny("bert", max_position_embeddings=1100)
    rows = text(40, 1000)
    corrupted, labels = build_targets(model, "mask", rows, draws(), 0.3)
    assert isinstance(corrupted, Packed)
    chosen = labels != -100
    assert torch.equal(labels[chosen], rows.input_ids[chosen]) and not bool(chosen[:, 0].any())
    assert torch.equal(corrupted.input_ids[~chosen], rows.input_ids[~chosen])
    assert set(chosen.sum(1).tolist()) == {300}  # 0.3 of 999
    now, was = corrupted.input_ids[chosen], rows.input_ids[chosen]
    shares = [float((now == MASK).float().mean()), float((now == was).float().mean())]
    assert shares == pytest.approx([0.8, 0.1 + 0.1 / 92], abs=0.02)
    words = now[(now != MASK) & (now != was)]
    assert int(words.min()) >= 5 and words.unique().numel() == 92
    again, other = (build_targets(model, "mask", rows, draws(seed), 0.3)[1] for seed in (0, 1))
    assert torch.equal(again, labels) and not torch.equal(other, labels)


def test_documents_do_not_foretell_each_other() -> None:
    _, model = tiny("llama")
    _, labels = build_targets(model, "next", text())
    assert bool((labels[:, 9] == -100).all()) and int((labels == -100).sum()) == 6


def test_wrong_data_is_refused() -> None:
    config, vit = tiny("vit")
    bert, llama, rows = tiny("bert")[1], tiny("llama")[1], text()
    pictures = images(config)
    cases: list[tuple[Any, Any, Any, str]] = [
        (bert, "mask", pictures, "'mask' was given 6 rows of images: give text"),
        (vit, "image", rows, "'image' was given 6 rows of text: give images"),
        (llama, "mask", rows, "LlamaForCausalLM has no head for 'mask'"),
        (bert, "next", rows, "BertForMaskedLM has no head for 'next'"),
        (tiny("bert", architecture="BertModel")[1], "mask", rows, "BertModel has no head"),
        (tiny("vit", architecture="ViTModel")[1], "image", pictures, "ViTModel has no head"),
        (bert, "mask", replace(rows, mask=None), "no mask token"),
        (bert, "mask", replace(rows, special=tuple(range(97))), "nothing but special tokens"),
        (bert, "mask", text(2, 42), "42 tokens are longer than the model's 41 positions"),
        (tiny("roberta")[1], "mask", text(2, 41), "41 tokens are longer than the model's 40"),
        (llama, "next", replace(rows, input_ids=rows.input_ids + 40), "beyond the model's 97"),
        (
            vit,
            "image",
            replace(pictures, labels=pictures.labels + 2),
            "label 7 is none of the model's 7 classes",
        ),
        (vit, "image", replace(pictures, labels=pictures.labels - 1), "label -1 is none"),
        (
            vit,
            "image",
            replace(pictures, pixel_values=pictures.pixel_values[..., :10]),
            r"\[3, 15, 10\] .* \[3, 15, 15\]",
        ),
    ]
    for model, kind, data, message in cases:
        with pytest.raises(RegraftError, match=message):
            compute_loss(model, kind, data)


def test_roberta_takes_rows_up_to_its_last_position() -> None:
    _, model = tiny("roberta", pad_token_id=1)
    assert torch.isfinite(compute_loss(model, "mask", text(2, 39), generator=draws()))


def test_reading_images(tmp_path: Path) -> None:
    pixels, labels = numpy.zeros((4, 3, 5, 5), "float64"), numpy.arange(4)
    numpy.savez(tmp_path / "good.npz", pixel_values=pixels, labels=labels)
    rows = read_images(tmp_path / "good.npz")
    assert (
        rows.pixel_values.dtype == torch.float32
        and rows.labels.tolist() == [0, 1, 2, 3]
        and len(rows[:2]) == 2
    )
    bad: dict[str, tuple[dict[str, Any], str]] = {
        "nolabels": ({"pixel_values": pixels}, "no array 'labels'"),
        "bytes": ({"pixel_values": pixels.astype("uint8"), "labels": labels}, "uint8"),
        "flat": ({"pixel_values": pixels[0], "labels": labels}, r"\[3, 5, 5\]"),
        "few": ({"pixel_values": pixels, "labels": labels[:3]}, "for each of the 4 images"),
        "parts": ({"pixel_values": pixels, "labels": labels / 2}, "float64"),
    }
    for name, (arrays, message) in bad.items():
        numpy.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(RegraftError, match=message):
            read_images(tmp_path / f"{name}.npz")
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    for name, message in {
        "broken.npz": "no readable",
        "missing.npz": "no images at",
        "text.txt": "cannot read",
    }.items():
        with pytest.raises(RegraftError, match=message):
            read_images(tmp_path / name)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "bert", "vit"])
def test_a_fresh_model_is_that_of_the_library(family: str, tmp_path: Path) -> None:
    config, model = tiny(family)
    before = torch.random.get_rng_state()
    made = modeling.build_random_model(config.to_dict(), seed=3)
    assert (
        torch.equal(torch.random.get_rng_state(), before)
        and type(made) is type(model)
        and not made.training
    )
    torch.manual_seed(3)
    own = type(model)(config)
    for a, b in zip(made.parameters(), own.parameters(), strict=True):
        assert torch.equal(a, b)
    made.save_pretrained(tmp_path)
    assert torch.equal(
        next(modeling.materialize(Checkpoint.open(tmp_path)).parameters()), next(made.parameters())
    )


@pytest.mark.parametrize("family", GROWABLE)
def test_names_of_files_and_of_running_models(family: str, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    model = modeling.materialize(source)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    filed = modeling.to_checkpoint_names(model, named)
    assert set(source.names.values()) <= set(filed)
    for key, name in source.names.items():
        assert torch.equal(filed[name], source.tensors[key].read())
    back = modeling.from_checkpoint_names(
        model, {name: filed[name] for name in source.names.values()}
    )
    assert set(back) == set(named) and all(torch.equal(back[name], named[name]) for name in named)
