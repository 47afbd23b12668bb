"""Models whose layers are of several kinds, under inferred tables: they grow, and mixers take the
place of their softmax layers alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_main
from helpers.decoding import decode
from helpers.tiny import max_relative_difference, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import regraft
from regraft.cli.main import main
from regraft.core.checkpoint import Checkpoint
from regraft.core.stock_config import decode_floats
from regraft.errors import RegraftError
from regraft.families.inference import inferred
from regraft.families.inference.layer_keys import move_layer_keys
from regraft.families.inference.tiny_model import find_tiny_model
from regraft.growth import depth, layer_places
from regraft.growth.steps.deepen import Deepen
from regraft.mixers.remix import Remix
from regraft.modeling.layer_kinds import layer_kinds

BOUND = 2e-5
# Layers with a delta rule and random weights amplify rounding; wrong tables are off by far more.
AMPLIFIED = 1e-3
CONV = {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4}
# Types with a kind of layer by a list, by periods, and by a list that sets the depth; with a state,
# a convolution, experts, a gate behind attention, nothing but an MLP in a layer.
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {},
    "lfm2_moe": CONV | {"num_dense_layers": 2},
    "jamba": {},
    "nemotron_h": {},
}
# Kept layers of kinds that a number of first layers says, and latent attention.
LATENT = {"model_type": "deepseek_v3", "first_k_dense_replace": 2, "num_hidden_layers": 6}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of tables."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))


def save_tiny(folder: Path, config: dict[str, Any]) -> None:
    """Write a tiny random model of a type."""
    model = find_tiny_model(config).build_random()
    model.config.dtype = torch.float32
    model.save_pretrained(folder)


@torch.no_grad()
def compute(folder: Path, load: Any = AutoModelForCausalLM.from_pretrained) -> torch.Tensor:
    """Logits of a model on disk."""
    return load(str(folder), dtype=torch.float32).eval()(input_ids=tokens(2, 23)).logits


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_hybrid_grows_and_its_softmax_layers_give_way(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "source", {"model_type": family, **HYBRIDS[family]})
    source, before = Checkpoint.open(tmp_path / "source"), compute(tmp_path / "source")
    closed = set(inferred.find_table(source.config).closed)
    assert not closed & {"depth", "hidden", "ffn", "attention"}

    kinds = layer_kinds(source)
    assert {*kinds} == {"softmax", "state"}
    sizes = {"hidden": 2 * source.sizes["hidden"], "ffn": source.sizes["ffn"] + 8}
    grown = Deepen(2 * source.layers)(regraft.Widen(**sizes)(source))
    grown.save(tmp_path / "grown")
    assert max_relative_difference(before, compute(tmp_path / "grown")) < AMPLIFIED
    assert Checkpoint.open(tmp_path / "grown").layers == 2 * source.layers

    assert main(["plan", str(tmp_path / "source"), "--mixer", "supra", "--keep", "none"]) == 0
    assert "state unchanged, not counted" in capsys.readouterr().out

    linear = Remix(mixer="window", window=64, sinks=0, keep="none")(source)
    assert layer_kinds(linear) == [kind.replace("softmax", "window") for kind in kinds]
    linear.save(tmp_path / "linear")
    after = compute(tmp_path / "linear", lambda folder, dtype: regraft.load(folder))
    assert max_relative_difference(before, after) < BOUND
    # With its cache it gives what the source gives with its own.
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    rows = tokens(2, 14)
    found = decode(regraft.load(str(tmp_path / "linear")).eval(), rows, 8)
    assert max_relative_difference(decode(stock, rows, 8), found) < BOUND


def letter_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer with fewer tokens than a tiny model has."""
    words = {word: row for row, word in enumerate(("<pad>", "<unk>", *"abcdefghij"))}
    assert len(words) <= vocab
    core = Tokenizer(WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize("family", [*HYBRIDS, "lfm2", "falcon_h1"])
def test_a_hybrid_is_checked_trained_and_writes(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers without softmax attention are in nobody's way."""
    config = {"model_type": family, **HYBRIDS.get(family, CONV if family == "lfm2" else {})}
    save_tiny(tmp_path / "source", config)
    source = Checkpoint.open(tmp_path / "source")
    letter_tokenizer(source.sizes["vocab"]).save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text("a b c d e f g h i j " * 200)

    flags = ("--mixer", "gated_deltanet", "--window", "8", "--keep", "none")
    training = ("--data", tmp_path / "text.txt", "--tokens", "128", "--length", "32")
    for out, more in (("linear", ()), ("trained", training)):
        code, _, err = run_main(
            capsys, "linearize", tmp_path / "source", tmp_path / out, *flags, *more
        )
        assert code == 0, err
        code, said, _ = run_main(capsys, "check", tmp_path / "source", tmp_path / out)
        assert code == 0, said
        code, text, err = run_main(capsys, "generate", tmp_path / out, "a b c", "--tokens", "4")
        assert code == 0 and text, err

    # Beams reorder the states, those of the source too.
    model, ids = regraft.load(str(tmp_path / "linear")), torch.tensor([[2, 3, 4, 5]])
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    cached, whole = (
        model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=use, **options)
        for use in (True, False)
    )
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("experts", [0, 4])
def test_granite_hybrids_grow_and_are_linearized(experts: int, tmp_path: Path) -> None:
    """Dense ones have no expert to send a token to, and say so."""
    sizes = {"num_local_experts": experts, "num_experts_per_tok": min(experts, 2)}
    types = ["linear_attention", "full_attention"] * 2
    save_tiny(
        tmp_path / "source",
        {"model_type": "granitemoehybrid", "num_hidden_layers": 4, "layer_types": types, **sizes},
    )
    source, before = Checkpoint.open(tmp_path / "source"), compute(tmp_path / "source")
    assert any("moe.gate_up" in role for role, _ in source.tensors) == bool(experts)
    hidden, ffn = source.sizes["hidden"], source.sizes["ffn"]
    grown = Deepen(8)(regraft.Widen(hidden=2 * hidden, ffn=ffn + 8)(source))
    grown.save(tmp_path / "grown")
    assert max_relative_difference(before, compute(tmp_path / "grown")) < BOUND
    with pytest.raises(RegraftError, match=f"Mamba-2 layers of {2 * hidden} channels"):
        regraft.Widen(hidden=hidden + hidden // 2)(source)

    Remix(mixer="window", window=64, sinks=0, keep="none")(source).save(tmp_path / "linear")
    after = compute(tmp_path / "linear", lambda folder, dtype: regraft.load(folder))
    assert max_relative_difference(before, after) < BOUND


def test_kinds_by_a_number_of_first_layers_follow_their_layers(tmp_path: Path) -> None:
    save_tiny(tmp_path / "source", LATENT)
    source, before = Checkpoint.open(tmp_path / "source"), compute(tmp_path / "source")
    dense = source.config["first_k_dense_replace"]
    grown = Deepen(2 * source.layers)(source)
    assert grown.config["first_k_dense_replace"] == 2 * dense
    grown.save(tmp_path / "grown")
    assert max_relative_difference(before, compute(tmp_path / "grown")) < BOUND


def test_factors_over_sizes_follow_them(tmp_path: Path) -> None:
    """MiniCPM divides branches by the root of the depth, the head's input by the hidden size."""
    save_tiny(tmp_path / "source", {"model_type": "minicpm3"})
    source, before = Checkpoint.open(tmp_path / "source"), compute(tmp_path / "source")
    grown = Deepen(source.layers + 1)(regraft.Widen(hidden=2 * source.sizes["hidden"])(source))
    grown.save(tmp_path / "grown")
    assert max_relative_difference(before, compute(tmp_path / "grown")) < BOUND


def test_layers_are_placed_where_their_kinds_are() -> None:
    """Where the class orders kinds by itself, layers keep their order and new ones fill up."""

    def build(word: str) -> list[layer_places.Kind]:
        return [frozenset({(letter, (1,))}) for letter in word]

    def place(before: str, after: str) -> list[tuple[int, bool]] | None:
        order = layer_places._place_layers(build(before), build(after))
        return order and [(one.source, one.new) for one in order]

    assert place("mma", "mmamma") == [
        (0, False), (1, False), (2, False), (1, True), (1, True), (2, True),
    ]  # fmt: skip
    assert place("mam", "mmama") == [(0, False), (0, True), (1, False), (2, False), (1, True)]
    assert place("mam", "mmmm") is None  # no place for a
    assert place("mm", "mma") is None  # nothing is like a


def test_a_depth_without_a_place_for_every_layer_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, {"model_type": "lfm2_moe", **HYBRIDS["lfm2_moe"]})
    source = Checkpoint.open(tmp_path)
    order = depth.build_layer_order("identity", source.layers, source.layers + 1)
    assert layer_places.fit_stack(source, order, "identity", {"depth": len(order)}).order == order
    kinds = layer_places.list_kinds(source.anatomy, source.config, source.layers)
    other = [kinds[0]] * (source.layers + 1)
    real = layer_places.list_kinds
    monkeypatch.setattr(
        layer_places,
        "list_kinds",
        lambda anatomy, config, n: other if n > source.layers else real(anatomy, config, n),
    )
    with pytest.raises(RegraftError, match="have no place for the source's 4 layers"):
        layer_places.fit_stack(source, order, "identity", {"depth": len(order)})


def test_keys_that_name_layers_by_number_follow_them() -> None:
    order = [0, 0, 1, 1, 2, 2]
    config = {
        "_order": order, "_before": {"depth": 3}, "attn_layer_indices": [1, 2],
        "first_k_dense_replace": 1, "layer_types": ["a", "b", "c"], "eos_token_id": [1, 2],
    }  # fmt: skip
    assert move_layer_keys(config) == {
        "attn_layer_indices": [2, 3, 4, 5],
        "first_k_dense_replace": 2,
    }
    assert move_layer_keys({"first_k_dense_replace": 1}) == {}


def test_infinity_is_read_as_transformers_writes_it() -> None:
    value = {"time_step_limit": [0.0, {"__float__": "Infinity"}], "a": {"b": 1}}
    assert decode_floats(value) == {"time_step_limit": [0.0, float("inf")], "a": {"b": 1}}
