"""What holds for every family with an encoder and a decoder: both stacks grow, logits stay.

A family is a case in `helpers.zoo.SEQ2SEQ`, nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import inputs, max_relative_difference, outputs
from helpers.zoo import SEQ2SEQ, build

import regraft
from regraft.checks.check import check
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.sizes import has_coupled_heads
from regraft.growth.sizes_to_steps import Growth
from regraft.mixers.remix import Remix
from regraft.plan.plan import Plan

# New layers of post-norm families pass the stream up to the norms' epsilon.
BOUND = 1e-4


@pytest.fixture(params=SEQ2SEQ, scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny model as stock transformers saves it."""
    folder = tmp_path_factory.mktemp(request.param.replace("/", "")) / "source"
    build(request.param)[1].save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return Checkpoint.open(folder)


@torch.no_grad()
def compute(folder: Path, source: Checkpoint) -> dict[str, torch.Tensor]:
    """What the stock class gives."""
    kind = getattr(transformers, source.config["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return outputs(model, inputs(model.config))


def grow_widths(source: Checkpoint) -> Checkpoint:
    """Every width that can grow exactly."""
    tied_post_norm = source.anatomy.family in ("bart", "blenderbot-small", "plbart")
    closed = "hidden" in source.anatomy.closed or tied_post_norm
    sizes: dict[str, Any] = {"ffn": source.sizes["ffn"] + 8}
    if not closed:
        sizes["hidden"] = 4 * source.sizes["hidden"]  # factors are powers of two
    if not has_coupled_heads(source):
        sizes |= {"heads": 6, "head_dim": 16}
    return regraft.Widen(**sizes)(source)


def test_every_size_grows(source: Checkpoint, tmp_path: Path) -> None:
    assert not source.dropped
    assert source.anatomy.resize_config(source.config, source.sizes) == source.config
    grown = regraft.Deepen(encoder_layers=5, decoder_layers=4)(grow_widths(source))
    grown.save(tmp_path / "grown")
    assert Checkpoint.open(tmp_path / "grown").sizes == grown.sizes
    assert (grown.sizes["encoder_depth"], grown.sizes["depth"]) == (5, 4)

    before, after = compute(source.path, source), compute(tmp_path / "grown", source)
    assert max_relative_difference(before["logits"], after["logits"]) < BOUND
    assert (tmp_path / "grown" / "preprocessor_config.json").exists()
    assert (tmp_path / "grown" / "generation_config.json").exists()


def test_check_sees_a_growth_and_a_mutation(source: Checkpoint, tmp_path: Path) -> None:
    """The receipts hold; with one tensor of the new layers awake they do not."""
    grown = regraft.Deepen(encoder_layers=4)(source)
    grown.save(tmp_path / "grown")
    receipts = check(source.path, tmp_path / "grown")
    assert receipts["holds"], receipts["failed"]
    assert "logits" in receipts["compared"]

    new = max(layer for role, layer in grown.tensors if role == "encoder.mlp.down.weight")
    key = ("encoder.mlp.down.weight", new)
    moved = replace(grown.tensors[key], read=lambda: torch.randn(grown.tensors[key].shape))
    replace(grown, tensors={**grown.tensors, key: moved}).save(tmp_path / "mutated")
    before, after = compute(source.path, source), compute(tmp_path / "mutated", source)
    assert max_relative_difference(before["logits"], after["logits"]) > BOUND


def test_stacks_are_named_where_they_differ(source: Checkpoint) -> None:
    with pytest.raises(RegraftError, match="has 3 encoder and 2 decoder layers: say which"):
        regraft.Deepen(6)(source)
    even = regraft.Deepen(encoder_layers=4, decoder_layers=4)(source)
    both = regraft.Deepen(6)(even)
    assert (both.sizes["encoder_depth"], both.sizes["depth"]) == (6, 6)
    with pytest.raises(RegraftError, match="leave it out, or --encoder-layers"):
        regraft.Deepen(6, encoder_layers=5)(even)


def test_what_does_not_work_is_refused(source: Checkpoint) -> None:
    with pytest.raises(RegraftError, match="an encoder and a decoder, which grow but"):
        Remix(mixer="window", window=8, keep="none")(source)
    for request in ({"experts": 2}, {"width_init": "copy"}, {"width_init": "ligo"}):
        with pytest.raises(RegraftError, match="one stack of layers"):
            Growth(**{"ffn": 48, **request}).steps(source)
    if "hidden" in source.anatomy.closed:
        with pytest.raises(RegraftError, match="sinusoids"):
            regraft.Widen(hidden=64)(source)


def test_a_plan_counts_both_stacks(source: Checkpoint) -> None:
    target = regraft.Deepen(encoder_layers=4)(source)
    plan = Plan.of(source, target, length=16)
    model = build(source.anatomy.family)[1]
    learned = sum(value.numel() for value in model.parameters())
    constants = sum(source.tensors[key].size for key in source.tensors if key[0] == "head.constant")
    computed = sum(
        value.numel() for name, value in model.named_parameters() if "embed_positions" in name
    )
    stored = any(role.endswith("pos.weight") for role, _ in source.tensors)
    assert plan.source_parameters == learned + constants - (0 if stored else computed)
    assert plan.parameters > plan.source_parameters
    assert plan.flops_per_token["target"] > plan.flops_per_token["source"]


def test_one_stack_has_no_encoder(tmp_path: Path) -> None:
    build("olmo")[1].save_pretrained(tmp_path / "source")
    with pytest.raises(RegraftError, match="has one stack of 3 layers: use --layers"):
        regraft.Deepen(encoder_layers=4)(Checkpoint.open(tmp_path / "source"))
