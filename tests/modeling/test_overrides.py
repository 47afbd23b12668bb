"""Keys of a config that are given when a model is loaded: as a stock model takes them, or one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import save_model, tiny
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix

IDS = torch.arange(3, 33).unsqueeze(0)
# What stock takes.
TAKEN: list[dict[str, Any]] = [
    {"num_hidden_layers": 2},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    {"attention_dropout": 0.5},
    {"use_cache": False},
    {"tie_word_embeddings": True},
    {"output_hidden_states": True},
    {"rms_norm_eps": 0.1},
    {"hidden_act": "gelu"},
    {"pad_token_id": 5},
    {"num_labels": 4},
    {"problem_type": "regression"},
    {"vocab_size": 50, "ignore_mismatched_sizes": True},
    {"dtype": torch.bfloat16},
    {"attn_implementation": "eager"},
]
# What stock refuses with an error of its own.
REFUSED: list[dict[str, Any]] = [
    {"vocab_size": 50}, {"intermediate_size": 30}, {"sliding_window": 8}, {"nonsense": 3},
]  # fmt: skip
# What the mixers were made for.
MADE: list[dict[str, Any]] = [
    {"num_hidden_layers": 4}, {"hidden_size": 40}, {"num_attention_heads": 3},
    {"num_key_value_heads": 9}, {"head_dim": 4}, {"attention_bias": True},
]  # fmt: skip
NAMES = pytest.mark.parametrize("keys", TAKEN, ids=lambda keys: next(iter(keys)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("overrides")
    stock = save_model(place / "stock", layers=3)
    Remix("gated_deltanet", "0", window=8, sinks=2)(Checkpoint.open(stock)).save(place / "linear")
    # As linear as it gets without a converted layer: it computes what stock does.
    Remix("gated_deltanet", "all", window=8)(Checkpoint.open(stock)).save(place / "kept")
    return {name: place / name for name in ("stock", "linear", "kept")}


def load(folder: Path, **keys: Any) -> PreTrainedModel:
    assert modeling  # imported: its classes are registered
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(folder, **keys).eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@NAMES
def test_taken_as_by_stock(keys: dict[str, Any], folders: dict[str, Path], tmp_path: Path) -> None:
    stock, kept, linear = (load(folders[name], **keys) for name in ("stock", "kept", "linear"))
    if "ignore_mismatched_sizes" not in keys:
        assert torch.equal(logits(kept), logits(stock))
    assert logits(linear).shape == logits(stock).shape

    stock.save_pretrained(tmp_path / "stock")
    linear.save_pretrained(tmp_path / "linear")
    again = load(tmp_path / "linear")
    for model, wanted in ((linear, stock), (again, load(tmp_path / "stock"))):
        for key in keys:
            assert getattr(model.config, key, None) == getattr(wanted.config, key, None), key
    torch.testing.assert_close(logits(again), logits(linear))


@pytest.mark.parametrize("keys", REFUSED, ids=lambda keys: next(iter(keys)))
def test_refused_as_by_stock(keys: dict[str, Any], folders: dict[str, Path]) -> None:
    with pytest.raises((RuntimeError, TypeError)) as stock:
        load(folders["stock"], **keys)
    with pytest.raises(stock.type) as found:
        load(folders["linear"], **keys)
    assert str(found.value) == str(stock.value)


@pytest.mark.parametrize("keys", MADE, ids=lambda keys: next(iter(keys)))
def test_what_mixers_were_made_for_is_one_error(
    keys: dict[str, Any], folders: dict[str, Path]
) -> None:
    (key, value), *_ = keys.items()
    with pytest.raises(RegraftError, match=f"{key} is {value}"):
        load(folders["linear"], **keys)
    config = AutoConfig.from_pretrained(folders["linear"])
    setattr(config, key, value)
    with pytest.raises(RegraftError, match=f"{key} is {value}"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen3", "rms_norm_eps", 0.1),
        ("gemma2", "attn_logit_softcapping", None),
        ("gemma2", "attn_logit_softcapping", 30.0),
        ("gemma2", "query_pre_attn_scalar", 16),
    ],
)
def test_what_only_some_mixers_have(family: str, key: str, value: Any, tmp_path: Path) -> None:
    """Norms of queries and keys, caps on scores, a scale."""
    tiny(family)[1].save_pretrained(tmp_path / "source")
    Remix("gated_deltanet", "0")(Checkpoint.open(tmp_path / "source")).save(tmp_path / "out")
    with pytest.raises(RegraftError, match=f"{key} is {value}"):
        load(tmp_path / "out", **{key: value})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fewer_layers(family: str, tmp_path: Path) -> None:
    """The first ones, also where the source has a list with an entry per layer."""
    tiny(family)[1].save_pretrained(tmp_path / "source")
    Remix("supra", "0", window=0)(Checkpoint.open(tmp_path / "source")).save(tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    config.num_hidden_layers = 2
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(load(tmp_path / "out").state_dict(), strict=False)
    short = load(tmp_path / "out", num_hidden_layers=2)
    assert torch.equal(logits(model), logits(short))
    assert len(DynamicCache(config=model.config).layers) == 2
    assert len(short.slots()) == len(short.config.mixers) == len(short.config.attention) == 2
    short.save_pretrained(tmp_path / "short")
    assert torch.equal(logits(load(tmp_path / "short")), logits(short))
    assert modeling.materialize(Checkpoint.open(tmp_path / "short")).config.num_hidden_layers == 2


def test_mixers_without_sizes_are_one_error(folders: dict[str, Path]) -> None:
    with pytest.raises(RegraftError, match="layer 1 and no `attention`"):
        load(folders["linear"], attention=[None] * 3)
