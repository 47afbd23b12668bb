"""Liveness: growth leaves nothing dead or locked unless exactness forces it, and what is dead or
locked is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import ARCHITECTURES, GROWABLE, tiny
from torch import Tensor

from regraft.checks.liveness import check_liveness, format_ranges
from regraft.core.anatomy import Key
from regraft.core.checkpoint import Checkpoint
from regraft.core.fused import fused_maps, split_fused
from regraft.errors import RegraftError
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen
from regraft.io import files
from regraft.mixers.remix import Remix

COUPLED = ("gpt2", "gpt_neox", "bert", "roberta")


def opened(family: str, folder: Path, **keys: Any) -> Checkpoint:
    """A tiny source on disk."""
    tiny(family, **keys)[1].save_pretrained(folder / "source")
    return Checkpoint.open(folder / "source")


def grown(
    family: str, folder: Path, *steps: Callable[[Checkpoint], Checkpoint], **keys: Any
) -> dict[str, Any]:
    """What liveness says of a tiny model after some steps."""
    made = opened(family, folder, **keys)
    for step in steps:
        made = step(made)
    return check_liveness(made)


def wider(family: str) -> Widen:
    """Hidden and ffn to sizes that the family can hold and that are no multiples, if it has such."""
    if family in COUPLED:
        return Widen(hidden=144 if family in ("bert", "roberta") else 96, ffn=61)
    return {"mixtral": Widen(hidden=64, ffn=72), "dinov2": Widen(hidden=54, ffn=108)}.get(
        family, Widen(45, 61)
    )


def edited(change: Callable[[Key, Tensor], None]) -> Callable[[Checkpoint], Checkpoint]:
    """A step that changes values in place, seen as files store them."""

    def step(source: Checkpoint) -> Checkpoint:
        tensors = dict(source.tensors)
        for key, lazy in source.tensors.items():
            value = lazy.read().clone()
            change(key, value)
            tensors[key] = replace(lazy, read=lambda value=value: value)
        return replace(source, tensors=tensors, in_memory=True)

    return step


def deaf(old: int) -> Callable[[Checkpoint], Checkpoint]:
    """New coordinates of the stream are not read: the zero reads that growth must not make."""

    def step(made: Checkpoint) -> Checkpoint:
        place = made.anatomy.place(made.config)

        def change(key: Key, value: Tensor) -> None:
            part = place[key].part
            if part.axes.kind == "map" and "hidden" in part.axes.inputs:
                for piece in split_fused(value, part, made.sizes):
                    piece[:, old:] = 0

        return edited(change)(made)

    return step


def healthy(found: dict[str, Any]) -> bool:
    """Nothing dead, nothing locked."""
    return found["dead"]["entries"] == 0 == found["locked"]["units"]


@pytest.mark.parametrize("family", GROWABLE)
def test_default_growth_is_alive_in_every_family(family: str, tmp_path: Path) -> None:
    assert healthy(grown(family, tmp_path, wider(family), Deepen(5), Deepen(6, "llama_pro")))


@pytest.mark.parametrize("family", ["bert", "roberta", "vit", "dinov2"])
def test_default_growth_is_alive_in_every_class(family: str, tmp_path: Path) -> None:
    for number, name in enumerate(ARCHITECTURES[family]):
        found = grown(family, tmp_path / str(number), Deepen(4), wider(family), architecture=name)
        assert healthy(found), (name, found)


@pytest.mark.parametrize(
    "how", ["pad", "zero_in", "pair", "split", "tile", "duplicate", "aki", "lemon"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
def test_every_operator_on_neurons_is_alive(family: str, how: str, tmp_path: Path) -> None:
    assert healthy(grown(family, tmp_path, Widen(ffn=112 if family == "mixtral" else 104, how=how)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["pad", "tile", "duplicate", "lemon", "aki"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_operator_on_the_stream_is_alive(
    family: str, how: str, tied: bool, tmp_path: Path
) -> None:
    hidden = 144 if family == "gpt2" else 72
    assert healthy(grown(family, tmp_path, Widen(hidden=hidden, how=how), tie_word_embeddings=tied))


@pytest.mark.parametrize("how", ["pad", "zero_in", "pair", "split", "tile", "duplicate"])
@pytest.mark.parametrize("kv", [3, 6, 9])
def test_every_operator_on_heads_is_alive(kv: int, how: str, tmp_path: Path) -> None:
    assert healthy(grown("llama", tmp_path, Widen(heads=18, kv_heads=kv, how=how)))


@pytest.mark.parametrize("how", ["identity", "llama_pro"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3_text", "olmo2", "bert"])
def test_new_layers_are_alive(family: str, how: str, tmp_path: Path) -> None:
    assert healthy(grown(family, tmp_path / "a", Deepen(5, how)))
    # Behind a gain of zero, rows of zeros from an earlier growth would never learn.
    assert healthy(grown(family, tmp_path / "b", wider(family), Deepen(5, how)))


def test_zero_gains_before_zero_rows_are_found(tmp_path: Path) -> None:
    def silent(key: Key, value: Tensor) -> None:
        if key == ("norm.mlp_post.weight", 1):
            value.fill_(-1.0)
        if key == ("mlp.down.weight", 1):
            value[36:] = 0

    found = grown("gemma2", tmp_path, Widen(hidden=45), edited(silent))["dead"]
    rows = {row["role"]: (row["dead"], row["where"]) for row in found["tensors"]}
    assert rows == {
        "mlp.down.weight": (9 * 52, "output hidden coordinates 36..44"),
        "norm.mlp_post.weight": (9, "hidden coordinates 36..44"),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_a_third_of_a_model_that_does_not_read_its_new_coordinates_is_dead(
    tied: bool, tmp_path: Path
) -> None:
    found = grown("llama", tmp_path, Widen(hidden=54), deaf(36), tie_word_embeddings=tied)
    assert (
        found["dead"]["share"] == pytest.approx(1 / 3, abs=1e-3) and found["locked"]["units"] == 0
    )
    hints = {row["role"]: row["where"] for row in found["dead"]["tensors"]}
    assert hints["attn.q.weight"] == "input hidden coordinates 36..53"
    assert hints["mlp.down.weight"] == hints["embed.weight"] == "output hidden coordinates 36..53"
    assert hints["norm.final.weight"] == "hidden coordinates 36..53"


@pytest.mark.parametrize("family", ["mixtral", "vit", "dinov2", "phi3", "gpt2", "gpt_neox"])
def test_dead_entries_have_the_names_that_files_give_them(family: str, tmp_path: Path) -> None:
    source = opened(family, tmp_path)
    old, new = source.sizes["ffn"], source.sizes["ffn"] + (36 if family == "dinov2" else 8)
    made = Widen(ffn=new)(source)
    place = made.anatomy.place(made.config)

    def change(key: Key, value: Tensor) -> None:
        part = place[key].part
        for (role, _, _), piece in zip(
            fused_maps(part, key[0]), split_fused(value, part, made.sizes), strict=True
        ):
            if ".up." in role:
                piece[old:] = 0

    found = check_liveness(edited(change)(made))
    rows = found["dead"]["tensors"]
    names = {made.names[key] for key, spot in place.items() if "ffn" in spot.part.signature}
    assert {row["name"] for row in rows} == names and found["locked"]["units"] == 0
    assert {row["where"].removeprefix("input ").removeprefix("output ") for row in rows} == {
        f"neurons {old}..{new - 1}"
    }


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "olmo2"])
def test_normed_heads_of_other_than_a_multiple_are_dead_and_named(
    family: str, tmp_path: Path
) -> None:
    found = grown(family, tmp_path, Widen(head_dim=12))
    names = {"attn.q.weight", "attn.k.weight", "attn.q_norm.weight", "attn.k_norm.weight"}
    assert {row["role"] for row in found["dead"]["tensors"]} == names and len(
        found["dead"]["tensors"]
    ) == 12
    for row in found["dead"]["tensors"]:
        assert 3 * row["dead"] == row["of"] and row["where"].endswith(
            "coordinates 4..5, 10..11 of each head"
        ), row
    assert found["locked"]["units"] == 0


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "olmo2"])
def test_normed_heads_of_a_multiple_are_alive(family: str, tmp_path: Path) -> None:
    assert healthy(grown(family, tmp_path, Widen(head_dim=16)))


def test_neurons_of_zero_inputs_are_dead_under_relu_and_alive_under_gelu(tmp_path: Path) -> None:
    def silent(key: Key, value: Tensor) -> None:
        if key[0] in ("mlp.up.weight", "mlp.up.bias"):
            value[..., 52:] = 0
        if key[0] == "mlp.up.bias":
            value[:52] += 20  # of the old ones some would be asleep too
        if key[0] == "mlp.down.weight":
            value[52:] = 0.1

    found = grown(
        "gpt2", tmp_path / "relu", Widen(ffn=64), edited(silent), activation_function="relu"
    )["dead"]
    assert {(row["role"], row["where"]) for row in found["tensors"]} == {
        ("mlp.up.weight", "output neurons 52..63"),
        ("mlp.up.bias", "neurons 52..63"),
        ("mlp.down.weight", "input neurons 52..63"),
    }

    def awake(key: Key, value: Tensor) -> None:
        silent(key, value)
        if key[0] == "mlp.down.weight":
            value[52:] = torch.randn(value[52:].shape, generator=torch.Generator().manual_seed(0))

    assert healthy(grown("gpt2", tmp_path / "gelu", Widen(ffn=64), edited(awake)))


@pytest.mark.parametrize(
    ("family", "step", "axis", "units", "where"),
    [
        (
            "llama",
            Widen(hidden=72, how="tile", noise=0.0),
            "hidden",
            36,
            "hidden coordinates 36..71 repeat 0..35",
        ),
        (
            "vit",
            Widen(hidden=72, how="tile", noise=0.0),
            "hidden",
            36,
            "hidden coordinates 36..71 repeat 0..35",
        ),
        (
            "llama",
            Widen(ffn=104, how="tile", noise=0.0),
            "ffn",
            3 * 52,
            "neurons 52..103 repeat 0..51",
        ),
        (
            "mixtral",
            Widen(ffn=112, how="tile", noise=0.0),
            "ffn",
            9 * 56,
            "neurons 56..111 repeat 0..55",
        ),
        (
            "llama",
            Widen(heads=18, kv_heads=6, how="tile", noise=0.0),
            "kv",
            3 * 3,
            "heads 3..5 repeat 0..2",
        ),
        (
            "llama",
            Widen(heads=18, kv_heads=3, how="tile", noise=0.0),
            "group",
            3 * 3,
            "queries 3..5 of each group rep",
        ),
    ],
)
def test_copies_without_noise_are_locked(
    family: str, step: Widen, axis: str, units: int, where: str, tmp_path: Path
) -> None:
    found = grown(family, tmp_path, step)
    assert found["locked"]["units"] == units and found["dead"]["entries"] == 0
    assert all(
        row["axis"] == axis and row["where"].startswith(where) for row in found["locked"]["tensors"]
    )
    seen = {row["role"].split(".")[-2] for row in found["locked"]["tensors"]}
    assert {
        "hidden": {"embed", "q", "down"},
        "ffn": {"up", "down"},
        "kv": {"q", "k", "v", "o"},
    }.get(axis, {"q"}) <= seen


@pytest.mark.parametrize("noise", [None, 0.0])
def test_bert_twice_as_wide_needs_noise(noise: float | None, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"architecture": "BertForSequenceClassification"}
    found = grown("bert", tmp_path, Widen(hidden=144, heads=18, how="tile", noise=noise), **keys)
    # 72 of the stream, 72 of the pooled vector, 9 heads in each of three layers
    assert found["locked"]["units"] == (0 if noise is None else 72 + 72 + 27)


def test_heads_that_two_new_groups_copy_from_one_are_locked_though_they_write_nothing(
    tmp_path: Path,
) -> None:
    def change(key: Key, value: Tensor) -> None:
        for role, rows in (("q", 24), ("k", 8), ("v", 8)):
            if key == (f"attn.{role}.weight", 1):
                value[4 * rows :] = value[3 * rows : 4 * rows]

    found = grown("llama", tmp_path, Widen(heads=15, kv_heads=5, hidden=45), edited(change))
    assert found["locked"]["units"] == 1 and found["dead"]["entries"] == 0
    assert {row["where"] for row in found["locked"]["tensors"]} == {"heads 4 repeat 3"}


def test_duplicates_of_the_source_are_taken_off(tmp_path: Path) -> None:
    def change(key: Key, value: Tensor) -> None:
        if key in (("mlp.gate.weight", 1), ("mlp.up.weight", 1)):
            value[7:9] = value[3]
        if key == ("mlp.down.weight", 1):
            value[:, 7:9] = value[:, 3:4]

    source = edited(change)(opened("llama", tmp_path))
    assert check_liveness(source)["locked"]["units"] == 2
    assert check_liveness(Widen(heads=12, kv_heads=4)(source))["locked"]["units"] == 2
    assert check_liveness(Widen(heads=12, kv_heads=4)(source), source=source)["locked"] == {
        "units": 0,
        "tensors": [],
    }
    tiled = Widen(ffn=104, how="tile", noise=0.0)(source)
    assert check_liveness(tiled, source=source)["locked"]["units"] == 50 + 52 + 50


def test_only_what_the_batch_could_reach_is_judged(tmp_path: Path) -> None:
    found = grown("dinov2", tmp_path / "a")
    assert found["unseen"]["entries"] == 36 + 3 * 72  # the mask token, key biases
    found = grown("bert", tmp_path / "b", vocab=900)
    table = 72 * (900 + 41 + 2)
    assert healthy(found) and 0.9 < found["unseen"]["entries"] / table < 1


def test_files_and_values_stay_as_they_are(tmp_path: Path) -> None:
    made = opened("llama", tmp_path)
    kept = {made.names[key]: lazy.read().clone() for key, lazy in made.tensors.items()}
    held = made.with_values(kept, {"step": "Held", "arguments": {}})
    before = files.sha256(tmp_path / "source" / "model.safetensors")
    first = check_liveness(held)
    assert check_liveness(tmp_path / "source") == first == check_liveness(str(tmp_path / "source"))
    assert files.sha256(tmp_path / "source" / "model.safetensors") == before
    assert all(
        torch.equal(lazy.read(), made.tensors[key].read()) for key, lazy in held.tensors.items()
    )


def test_a_linearized_model_can_be_asked_too(tmp_path: Path) -> None:
    source = opened("llama", tmp_path)
    Remix(mixer="supra", keep="1", window=0)(source).save(tmp_path / "out")
    found = check_liveness(tmp_path / "out")
    assert found["locked"]["units"] == 0 and found["dead"]["share"] < 0.01


def test_what_cannot_be_tried_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match="at least one step, got 0"):
        check_liveness(opened("llama", tmp_path), steps=0)
    broken = edited(
        lambda key, value: value.fill_(float("nan")) if key[0] == "norm.final.weight" else None
    )
    with pytest.raises(RegraftError, match="a loss of nan on random input"):
        check_liveness(broken(Checkpoint.open(tmp_path / "source")))


def test_hints_are_short() -> None:
    assert format_ranges([5, 2, 0, 1]) == "0..2, 5"
    assert format_ranges([0, 2, 4, 6, 8, 10]) == "0, 2, 4, 6 and 2 more"
