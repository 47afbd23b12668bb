"""Latent attention (MLA) under inferred tables: models grow beside it, and mixers take its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoding import decode
from helpers.tiny import max_relative_difference, tokens
from transformers import AutoModelForCausalLM

import regraft
from regraft.checks.check import check
from regraft.core.anatomy import find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.export.target import find_target
from regraft.families.inference import inferred
from regraft.families.inference.tiny_model import find_tiny_model
from regraft.growth.steps.deepen import Deepen
from regraft.mixers.remix import Remix
from regraft.modeling import cache_kwargs, cache_of, flops, materialize
from regraft.modeling.layer_kinds import layer_kinds
from regraft.plan.plan import Plan

BOUND = 2e-5
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,  # changes the scale of the softmax
    "original_max_position_embeddings": 32,
}
# Neighbours or halves turn, tables are real or complex or there are none, queries have a latent or
# not, some layers have a state, the class has biases and an epsilon of its own.
CASES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "deepseek_v3-plain": {
        "rope_parameters": YARN,
        "attention_bias": True,
        "rope_interleave": False,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-3,
    },
    "deepseek_v2": {},
    "kimi_linear": {},
}


def config_of(case: str) -> dict[str, Any]:
    return {"model_type": case.partition("-")[0], **CASES[case]}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One cache of tables for all cases."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def save_tiny(folder: Path, case: str) -> Checkpoint:
    model = find_tiny_model(config_of(case)).build_random()
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    return Checkpoint.open(folder)


def load_stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def count(model: Any, rows: torch.Tensor) -> int:
    with flops.build_flop_counter() as counter:
        model(input_ids=rows)
    return counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_window_computes_latent_attention(case: str, tmp_path: Path) -> None:
    """Behind growth too, on disk, with its cache; both models cost what the ledger says."""
    source = save_tiny(tmp_path / "source", case)
    closed = set(inferred.find_table(source.config).closed)
    assert closed == {"kv", "group", "dim"}

    stock, rows = load_stock(tmp_path / "source"), tokens(2, 23)
    expected = stock(input_ids=rows).logits
    kept = str(source.layers - 1) if case == "deepseek_v2" else "none"
    linear = Remix(mixer="window", window=64, sinks=0, keep=kept)(source)
    kinds = [kind.replace("softmax", "window") for kind in layer_kinds(source)]
    assert layer_kinds(linear)[:-1] == kinds[:-1]
    linear.save(tmp_path / "linear")
    opened = regraft.load(str(tmp_path / "linear")).eval()
    assert max_relative_difference(expected, opened(input_ids=rows).logits) < BOUND
    reference = decode(stock, rows, 17)
    assert max_relative_difference(reference, decode(opened, rows, 17)) < BOUND

    if "state" not in kinds:
        for checkpoint, model in ((source, stock), (linear, opened)):
            ledger = flops.forward_flops(checkpoint, 23, 2)
            assert ledger == pytest.approx(count(model, rows), rel=1e-3)

    wide = regraft.Widen(hidden=2 * source.sizes["hidden"], ffn=source.sizes["ffn"] + 8)(source)
    grown = Remix(mixer="window", window=64, sinks=0)(Deepen(2 * source.layers)(wide))
    assert max_relative_difference(expected, materialize(grown)(rows).logits) < 1e-4


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("gated_deltanet", {}),
        ("lolcats", {}),
        ("mamba2", {"layout": "attention"}),
        ("rwkv6", {"shift": False}),
    ],
)
def test_recurrent_mixers_decode_what_they_read_at_once(
    mixer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Beside a window and without one; a kept layer has its own cache."""
    source = save_tiny(tmp_path, "deepseek_v2")
    for window in (5, 0):
        linear = Remix(mixer=mixer, options=options, window=window, sinks=1, keep="1")(source)
        model, rows = materialize(linear), tokens(2, 23)
        with torch.no_grad():
            whole = model(input_ids=rows).logits
        assert max_relative_difference(whole[:, 16:], decode(model, rows, 17)) < 1e-4


def test_a_linearized_model_passes_check_and_keeps_its_reasons(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "deepseek_v2")
    linear = Remix(mixer="supra", window=8, sinks=1, keep="0")(source)
    linear.save(tmp_path / "linear")
    assert check(tmp_path / "source", tmp_path / "linear")["holds"]

    # The latent is what stays of a token; each step makes keys and values of all of it again.
    attention = source.anatomy.attention(source.config, 0)
    state = Plan.of(source, source, context=100).state_bytes
    assert state == {"softmax": 4 * 100 * source.layers * (attention["latent"] + attention["rope"])}

    with pytest.raises(RegraftError, match="'sink_window' cannot replace latent attention"):
        Remix(mixer="sink_window", window=8)(source)
    with pytest.raises(RegraftError, match="cannot grow its kv .*of one latent"):
        regraft.Widen(heads=8)(source)
    for name in ("gguf", "granite_swa", "qwen3_5"):
        misfits = find_target(name).find_misfits(linear.config)
        assert any("has latent attention" in one for one in misfits), name


def test_a_decoded_token_costs_what_one_step_through_the_cache_does(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, "deepseek_v2")
    model = load_stock(tmp_path)
    with torch.no_grad():
        past = cache_of(model(input_ids=tokens(1, 40), use_cache=True))
        with flops.build_flop_counter() as counter:
            model(input_ids=tokens(1, 1), **cache_kwargs(past))
    planned = Plan.of(source, source, context=41).flops_per_token["source"]
    assert planned == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_attention_with_more_beside_its_latents_is_not_linearized() -> None:
    """DeepSeek-V3.2 chooses the tokens that a query sees by an indexer."""
    anatomy = find_anatomy({"model_type": "deepseek_v32"})
    assert "latent attention with 'indexer" in anatomy.closed["attention"]
    assert not {"depth", "ffn"} & set(anatomy.closed)
