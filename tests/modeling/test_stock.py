"""`load` reads a stock directory as transformers' Auto classes do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import ARCHITECTURES, GROWABLE, inputs, outputs, tiny
from safetensors.torch import load_file, save_file

from regraft import modeling
from regraft.checks.check import check
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.sizes_to_steps import Growth


def save(folder: Path, family: str, **keys: Any) -> Path:
    tiny(family, layers=2, **keys)[1].save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    values = load_file(folder / "model.safetensors") | changes
    kept = {name: value for name, value in values.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same_as_auto(folder: Path, auto: Any) -> None:
    stock = auto.from_pretrained(folder).eval()
    ours = modeling.load(folder)
    assert type(ours) is type(stock)
    given = inputs(stock.config)
    theirs = outputs(stock, given)
    assert all(torch.equal(value, theirs[name]) for name, value in outputs(ours, given).items())


@pytest.mark.parametrize("family", GROWABLE)
def test_a_directory_is_what_auto_makes_of_it(family: str, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    if family in ARCHITECTURES:
        auto = getattr(transformers, ARCHITECTURES[family][0])
    assert_same_as_auto(save(tmp_path, family), auto)


def test_a_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", "llama", tie_word_embeddings=True)
    head = torch.randn(97, 36, generator=torch.Generator().manual_seed(0))
    edit_weights(folder, **{"lm_head.weight": head})
    assert torch.equal(modeling.load(folder).lm_head.weight, head)
    assert_same_as_auto(folder, transformers.AutoModelForCausalLM)


def test_a_result_that_lost_its_head_does_not_hold(tmp_path: Path) -> None:
    """Whatever the table makes of the source: what its class computes is another function."""
    folder = save(tmp_path / "source", "llama", tie_word_embeddings=True)
    Growth(ffn=60)(Checkpoint.open(folder)).save(tmp_path / "out")
    head = torch.randn(97, 36, generator=torch.Generator().manual_seed(0))
    edit_weights(folder, **{"lm_head.weight": head})
    receipts = check(folder, tmp_path / "out")
    assert "rel_logit_diff" in receipts["failed"] and receipts["rel_logit_diff"] > 0.1


def test_a_mistral_with_kinds_of_layers_is_a_ministral(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", "mistral", sliding_window=8)
    edit_config(folder, layer_types=["full_attention", "sliding_attention"])
    assert type(modeling.load(folder)).__name__ == "MinistralForCausalLM"
    assert_same_as_auto(folder, transformers.AutoModelForCausalLM)
    Growth(ffn=60)(Checkpoint.open(folder)).save(tmp_path / "out")
    assert check(folder, tmp_path / "out")["holds"]


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "bert", "vit"])
def test_check_needs_no_host(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", family)
    Checkpoint.open(folder).save(tmp_path / "out")
    receipts = check(folder, tmp_path / "out")
    assert receipts["holds"] and receipts["rel_logit_diff"] == 0 and receipts["dead"] is None


@pytest.mark.parametrize("key", ["configuration_files", "transformers_weights"])
def test_no_other_files_are_read(key: str, tmp_path: Path) -> None:
    folder = save(tmp_path, "llama")
    edit_config(folder, **{key: ["config.4.0.0.json"]})
    with pytest.raises(RegraftError, match=f"has {key} .*remove the key"):
        modeling.load(folder)


def test_only_finite_weights_are_taken(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    value = load_file(folder / "model.safetensors")[name].clone()
    value[0, 0] = float("inf")
    edit_weights(folder, **{name: value})
    with pytest.raises(RegraftError, match=f"'{name}' .* 1 infinite"):
        modeling.load(folder)
    assert (
        modeling.load(folder, allow_nonfinite=True).model.layers[0].mlp.up_proj.weight.isinf().any()
    )


def test_a_model_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RegraftError, match="no tokenizer in"):
        modeling.load_tokenizer(save(tmp_path, "gpt2"))


def test_what_stock_loading_would_leave_at_random_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, "llama")
    checkpoint = Checkpoint.open(folder)
    edit_weights(folder, **{"model.norm.weight": None, "more.weight": torch.ones(2)})
    with pytest.raises(RegraftError, match=r"'model.norm.weight' has no counterpart in Llama"):
        modeling.load_stored(checkpoint)
