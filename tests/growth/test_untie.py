"""Untie keeps the logits before any growth, says where the head comes from, and refuses what has
nothing to untie.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_main
from helpers.tiny import inputs, max_relative_difference, outputs, tiny
from safetensors.torch import load_file, save_file

import regraft
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.sizes_to_steps import Growth


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "bert", "roberta"])
def test_the_logits_stay(family: str, tmp_path: Path) -> None:
    config, model = tiny(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    untied = regraft.Untie()(regraft.open(str(tmp_path / "source")))
    head, embed = untied.tensors["head.weight", None], untied.tensors["embed.weight", None]
    assert head.provenance.kind == "copied" and head.provenance.sources == embed.provenance.sources

    untied.save(tmp_path / "out")
    stock = type(model).from_pretrained(tmp_path / "out").eval()
    assert stock.get_output_embeddings().weight is not stock.get_input_embeddings().weight
    given = inputs(config)
    assert torch.equal(outputs(stock, given)["logits"], outputs(model, given)["logits"])


@pytest.mark.parametrize("how", ["pad", "hidden=tile,ffn=pad", "lemon"])
@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_every_operator_grows_an_untied_head(family: str, how: str, tmp_path: Path) -> None:
    config, model = tiny(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    hidden = 2 * source.sizes["hidden"]
    Growth(hidden=hidden, ffn=60, layers=4, width_init=how, untie=True)(source).save(
        tmp_path / "out"
    )
    stock = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert stock.lm_head.weight is not stock.get_input_embeddings().weight
    given = inputs(config)
    before, after = outputs(model, given)["logits"], outputs(stock, given)["logits"]
    assert max_relative_difference(before, after) < 2e-5


def test_untying_alone_is_growth_that_a_check_takes(tmp_path: Path, capsys: Any) -> None:
    tiny("llama", tie_word_embeddings=True)[1].save_pretrained(tmp_path / "source")
    code, _, err = run_main(capsys, "grow", tmp_path / "source", tmp_path / "out", "--untie")
    assert code == 0, err
    receipts = regraft.check(tmp_path / "source", tmp_path / "out")
    assert receipts["holds"] and receipts["exact"] and not receipts["unaccounted"]


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_nothing_to_untie_is_refused(family: str, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path)
    with pytest.raises(RegraftError, match="no output embedding that is tied"):
        regraft.Untie()(regraft.open(str(tmp_path)))


def test_gradients_of_both_uses_add_up_to_the_tied_one(tmp_path: Path, capsys: Any) -> None:
    """What the moments rest on: each of the two gets the whole of what was their sum."""
    config, model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    regraft.Untie()(regraft.open(str(tmp_path / "source"))).save(tmp_path / "untied")
    untied = type(model).from_pretrained(tmp_path / "untied", dtype=torch.float32).eval()
    for each in (model, untied):
        each(**inputs(config), labels=inputs(config)["input_ids"]).loss.backward()
    tied = model.get_input_embeddings().weight.grad
    parts = untied.get_input_embeddings().weight.grad, untied.lm_head.weight.grad
    assert all(bool(part.any()) for part in parts)
    torch.testing.assert_close(sum(parts), tied)

    names = Checkpoint.open(tmp_path / "source").names.values()
    state = {f"exp_avg/{name}": model.get_parameter(name).grad.clone() for name in names}
    state |= {f"exp_avg_sq/{name}": model.get_parameter(name).grad ** 2 for name in names}
    state |= {f"step/{name}": torch.tensor(7.0) for name in names}
    save_file(state, tmp_path / "adam.safetensors")
    words = ["grow", tmp_path / "source", tmp_path / "out", "--untie", "--optimizer-state"]
    code, _, err = run_main(capsys, *words, tmp_path / "adam.safetensors")
    assert code == 0, err
    grown = load_file(tmp_path / "out" / "optimizer.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(grown[f"exp_avg/{name}"], tied)
        assert torch.equal(grown[f"exp_avg_sq/{name}"], tied**2)
        assert float(grown[f"step/{name}"]) == 7
