"""The plan: shares add up, counts equal the real model's, state bytes equal the real cache's; it
reads no weights.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import FAMILIES, tiny, tokens
from rich.console import Console
from transformers import DynamicCache

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.steps.deepen import Deepen
from regraft.io import safetensors
from regraft.mixers.remix import Remix
from regraft.mixers.source_windows import cached_tokens
from regraft.plan.plan import Plan, print_plan, state_bytes, token_flops

REMIXES = [Remix(keep="every:2", window=5, sinks=2), Remix(mixer="supra", keep="none", window=0)]


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    keys = {"sliding_window": None} if request.param == "mistral" else {}
    _, model = tiny(request.param, **keys)
    model.save_pretrained(tmp_path / "source")
    return Checkpoint.open(tmp_path / "source")


@pytest.mark.parametrize("remix", REMIXES, ids=lambda remix: remix.mixer)
def test_totals_are_the_models(source: Checkpoint, remix: Remix) -> None:
    target = remix(source)
    plan = Plan.of(source, target, context=40)
    rows = [plan.tensors[kind] for kind in ("copied", "grown", "broadcast", "zero", "fresh")]
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert sum(row["parameters"] for row in rows) == plan.parameters
    assert plan.tensors["unclaimed"]["count"] == 0
    model = modeling.materialize(target)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.bytes == 4 * plan.parameters


@pytest.mark.parametrize(
    "remix", [None, *REMIXES], ids=lambda remix: remix.mixer if remix else "source"
)
def test_state_bytes_are_the_caches(source: Checkpoint, remix: Remix | None) -> None:
    target = remix(source) if remix else source
    model = modeling.materialize(target)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(1, 40), **modeling.cache_kwargs(cache))
    held, planned = sum(modeling.state_bytes(cache)), sum(state_bytes(target, 40).values())
    assert planned == pytest.approx(held, rel=0.02)


def test_layers_that_no_mixer_reads_are_planned(tmp_path: Path) -> None:
    """Growth asks for no mixer: bidirectional, chunked and indexed layers are counted too."""
    tiny("gemma", use_bidirectional_attention=True)[1].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    with pytest.raises(RegraftError, match="mixers read from left to right"):
        REMIXES[0](source)
    assert Plan.of(source, Deepen(5)(source), context=40).flops_per_token["target"] > 0
    chunked = {"model_type": "llama4_text", "num_hidden_layers": 4, "attention_chunk_size": 16}
    assert cached_tokens(chunked) == [16, 16, 16, None]
    assert cached_tokens({"model_type": "deepseek_v32", "num_hidden_layers": 2}) == [None, None]


def test_linear_layers_do_not_grow_with_context(source: Checkpoint) -> None:
    target = Remix(keep="none")(source)
    assert state_bytes(target, 1000) == state_bytes(target, 16000) and token_flops(
        target, 1000
    ) == token_flops(target, 16000)
    assert sum(state_bytes(source, 2000).values()) == 2 * sum(state_bytes(source, 1000).values())


def test_it_reads_no_weights(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(entry: safetensors.TensorEntry) -> torch.Tensor:
        raise AssertionError(f"read {entry.name}")

    monkeypatch.setattr(safetensors.TensorEntry, "read", refuse)
    Plan.of(source, Remix()(source))


def test_output_is_planned_from_its_lineage(source: Checkpoint, tmp_path: Path) -> None:
    target = Remix(keep="0")(source)
    target.save(tmp_path / "out")
    opened = Checkpoint.open(tmp_path / "out")
    again, first = Plan.of(opened, opened), Plan.of(source, target)
    assert again.tensors == first.tensors and again.steps[-1]["step"] == "Remix"


def test_mistral_keeps_only_its_window(tmp_path: Path) -> None:
    _, model = tiny("mistral", sliding_window=16)
    model.save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    assert state_bytes(source, 16) == state_bytes(source, 1000)


def test_json_and_table(source: Checkpoint) -> None:
    plan = Plan.of(source, Remix()(source))
    assert {"source", "target", "parameters", "tensors", "bytes", "peak_bytes"} <= set(
        json.loads(json.dumps(plan.to_dict()))
    )
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=120))
    assert (
        f"{plan.parameters:,}" in text.getvalue()
        and "gated(gated_deltanet, window)" in text.getvalue()
    )
