"""Sub-models, frozen layers, layers and tokens left out: against models built that way, and resumed
exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import ARCHITECTURES, GROWABLE, inputs, outputs, tiny
from helpers.training import CLASSIFIERS, Killed, go, rows_of, same, stage, text, timeless
from torch import nn

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.modeling.flops import build_flop_counter
from regraft.train import layer_subset, loop
from regraft.train.layer_subset import (
    apply_stage_layers,
    frozen_parameter_ids,
    keep_probability,
    layer_stack,
)
from regraft.train.objectives import compute_loss, last_hidden

KIND = {"bert": "mask", "roberta": "mask", "vit": "image", "dinov2": "image"}


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def without(model: nn.Module, kept: list[int]) -> nn.Module:
    """The model with only these layers, for good."""
    held = layer_stack(model)
    depth = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if module is held:
            model.set_submodule(name, nn.ModuleList([held[i] for i in kept]))
    for part in model.modules():
        config = getattr(part, "config", None)
        if getattr(config, "num_hidden_layers", None) == depth:
            config.num_hidden_layers = len(kept)
            if getattr(config, "layer_types", None):
                config.layer_types = [config.layer_types[i] for i in kept]
    return model


@pytest.mark.parametrize("family", GROWABLE)
def test_the_bottom_is_the_model_with_fewer_layers(family: str) -> None:
    architecture = CLASSIFIERS.get(family)
    config, model = tiny(family, architecture=architecture)
    given = inputs(config)
    whole = outputs(model, given)
    with apply_stage_layers(model, stage(KIND.get(family, "next"), layers="bottom:2"), 0, draws()):
        below = outputs(model, given)
    expected = outputs(without(tiny(family, architecture=architecture)[1], [0, 1]), given)
    assert torch.equal(below["logits"], expected["logits"]) and not torch.equal(
        below["logits"], whole["logits"]
    )
    assert torch.equal(outputs(model, given)["logits"], whole["logits"])


@pytest.mark.parametrize("family", ["qwen2", "bert", "dinov2", "gpt2"])
def test_the_bottom_trains_as_the_model_with_fewer_layers(family: str, tmp_path: Path) -> None:
    kind = KIND.get(family, "next")
    rows, model, ledger = go(tmp_path / "a", [stage(kind, layers="bottom:2")], family=family)
    small = without(tiny(family, architecture=CLASSIFIERS.get(family))[1], [0, 1])
    run = loop.Run(small, [stage(kind)], rows_of(kind, small), tmp_path / "b")
    assert loop.train(run)["flops"] == ledger["flops"]
    moved = dict(small.named_parameters())
    start = dict(tiny(family, architecture=CLASSIFIERS.get(family))[1].named_parameters())
    top = {id(parameter) for parameter in layer_stack(model)[2].parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name] if id(parameter) in top else moved[name]), name


@pytest.mark.parametrize(
    "family", [*ARCHITECTURES, "llama", "gpt2", "gemma2", "gpt_neox", "phi", "mixtral"]
)
@pytest.mark.parametrize("plan", ["train:1-2", "train:0,2"])
def test_other_layers_and_embeddings_do_not_move(family: str, plan: str, tmp_path: Path) -> None:
    kind = KIND.get(family, "next")
    options: dict[str, Any] = {"lr_body": 1e-2, "weight_decay": 0.1}
    _, model, ledger = go(tmp_path / "a", [stage(kind, layers=plan, **options)], family=family)
    if plan == "train:0,2":  # which saves less than the other
        _, _, all_of_it = go(tmp_path / "b", [stage(kind, **options)], family=family)
        assert ledger["flops"] < all_of_it["flops"]
    before = dict(tiny(family, architecture=CLASSIFIERS.get(family))[1].named_parameters())
    learns = [1, 2] if plan == "train:1-2" else [0, 2]
    inside = {id(p): i for i, layer in enumerate(layer_stack(model)) for p in layer.parameters()}
    head = [
        name
        for name in before
        if any(word in name for word in ("classifier", "cls.", "lm_head", "embed_out"))
    ]
    embeddings = {id(model.get_input_embeddings().weight)} if kind != "image" else set()
    assert head or model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        if id(parameter) in inside:
            # a key's bias changes no softmax: its gradient is rounding alone
            assert moved == (inside[id(parameter)] in learns) or name.endswith(
                ("key.bias", "k_proj.bias")
            ), name
        elif name in head and id(parameter) not in embeddings:
            assert moved, name
        elif "embed" in name or "wte" in name or "wpe" in name:
            assert not moved, name


@pytest.mark.parametrize("kind", ["next", "mask", "image", "distil"])
def test_drops_repeat_on_resume(kind: str, tmp_path: Path) -> None:
    size = 1 if kind == "image" else 24
    options: dict[str, Any] = {"layer_drop": 0.6, "token_drop": 0.3}
    stages = [stage(kind, 6, **options), stage(kind, 2, layers="train:1-4", **options)]
    keys = {"keys": {"layers": 5}}
    whole, model, ledger = go(tmp_path / "whole", stages, **keys)
    assert ledger["tokens"] == 8 * 2 * size
    for cut in (4, 7):
        with pytest.raises(Killed):
            go(tmp_path / str(cut), stages, cut, **keys)
        again, other, _ = go(tmp_path / str(cut), stages, **keys)
        assert timeless(again) == timeless(whole) and same(model, other)
    other, _, _ = go(tmp_path / "seed", stages, seed=1, **keys)
    assert [row["loss"] for row in other] != [row["loss"] for row in whole]


def test_every_step_counts_what_it_ran(tmp_path: Path) -> None:
    """The ledger's FLOPs are the sum of each step's own, measured one by one; a plain step costs
    more.
    """
    plan = stage("next", 12, layer_drop=0.7, token_drop=0.3)
    rows, _, ledger = go(tmp_path / "a", [plan], keys={"layers": 5})
    model, order = tiny("qwen2", layers=5)[1], loop.shuffled_indices(7, 24, 0)
    each = []
    for step in range(12):
        batch = text(7)[order[2 * step : 2 * step + 2]]
        with (
            apply_stage_layers(
                model,
                plan,
                step,
                loop.step_generator(0, 0, step, 1),
                layer_subset.find_protected_tokens(batch, None),
            ),
            build_flop_counter() as found,
        ):
            compute_loss(model, "next", batch).backward()
        each.append(found.get_total_flops())
    assert [row["flops"] for row in rows] == [sum(each[: step + 1]) for step in range(12)]
    assert len(set(each)) > 2 and ledger["stages"][0]["flops_per_step"] == sum(each) // 12
    plain, _, _ = go(tmp_path / "b", [stage("next", 2)], keys={"layers": 5})
    assert plain[0]["flops"] > max(each)


def test_the_schedule_of_layer_dropping() -> None:
    """Zhang & He: the first layer always stays, chances fall with depth and time, down to 1 - drop
    beyond the last.
    """
    late = [keep_probability(0.5, layer, 4, 999, 1000) for layer in range(4)]
    assert late == pytest.approx([1.0, 0.875, 0.75, 0.625])
    early = [keep_probability(0.5, 3, 4, step, 1000) for step in range(0, 100, 10)]
    assert early == sorted(early, reverse=True) and early[0] > 0.95
    model, kept = tiny("qwen2", layers=4)[1], torch.zeros(4)
    plan = stage("next", 1000, layer_drop=0.5)
    for seed in range(2000):
        with apply_stage_layers(model, plan, 999, draws(seed)):
            kept += torch.tensor(
                [not isinstance(layer, layer_subset.SkippedLayer) for layer in layer_stack(model)]
            )
    assert (kept / 2000).tolist() == pytest.approx(late, abs=0.04)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "vit", "bert"])
def test_layers_that_stay_weigh_more(family: str) -> None:
    """A layer's change is divided by its chance to stay, where no norm stands behind the sum."""
    config, model = tiny(family)
    kind = KIND.get(family, "next")
    plan = stage(kind, 1000, layer_drop=0.5)
    seed = next(
        seed
        for seed in range(99)
        if (torch.rand(3, generator=draws(seed)) < torch.tensor([1, 0.83, 0.66])).all()
    )
    seen: list[torch.Tensor] = []
    last = layer_stack(model)[2]
    plain = last.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with torch.no_grad(), apply_stage_layers(model, plan, 999, draws(seed)):
        scaled = last.register_forward_hook(lambda module, args, output: seen.append(output))
        model(**inputs(config))
    plain.remove()
    scaled.remove()
    given, output, heavier = seen
    chance = 1.0 if family == "bert" else 1 - 2 / 3 * 0.5
    torch.testing.assert_close(heavier, given + (output - given) / chance, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "family", [family for family in GROWABLE if family not in ("vit", "dinov2")]
)
def test_tokens_aside_leave_the_others_as_in_a_row_without_them(family: str) -> None:
    """In the middle layers the tokens that stay are as in a run on them alone, at their own
    positions; those aside are as they were before the middle.
    """
    _, model = tiny(family, layers=5)
    rows = text(2, 20)
    rows = type(rows)(
        rows.input_ids, torch.arange(20).repeat(2, 1), rows.bytes, rows.mask, rows.special
    )
    plan = stage(KIND.get(family, "next"), token_drop=0.25)
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, a, output, at=at: seen.__setitem__(at, output))
        for at, module in enumerate(layer_stack(model))
    ]
    held = layer_subset.find_protected_tokens(rows, None)
    with torch.no_grad(), apply_stage_layers(model, plan, 0, draws(), held):
        last = layer_stack(model)[4].register_forward_pre_hook(
            lambda m, args: seen.__setitem__(-1, args[0])
        )
        model(
            input_ids=rows.input_ids,
            **({"use_cache": False} if model.config.model_type not in KIND else {}),
        )
    for hook in (*hooks, last):
        hook.remove()
    assert (
        seen[1].shape[1] == 20
        and seen[2].shape[1] == seen[3].shape[1] == 15
        and seen[4].shape[1] == 20
    )
    generator = draws()
    torch.rand(5, generator=generator)
    index = layer_subset.TokenDropper(0.25, generator, held).sample_kept_positions(2, 20)
    assert all(
        set(held[row].nonzero().flatten().tolist()) <= set(index[row].tolist()) for row in range(2)
    )
    assert torch.equal(
        seen[-1].gather(1, index[..., None].expand(-1, -1, seen[3].shape[-1])), seen[3]
    )
    aside = torch.ones(2, 20, dtype=torch.bool).scatter(1, index, False)
    assert torch.equal(seen[-1][aside], seen[1][aside])

    # the same two layers on the shortened rows by themselves
    if family in ("bert", "roberta", "gpt2"):
        short = seen[1].gather(1, index[..., None].expand(-1, -1, seen[1].shape[-1]))
        causal = torch.ones(15, 15).tril().bool().expand(2, 1, 15, 15) if family == "gpt2" else None
        for at in (2, 3):
            with torch.no_grad():
                short = (
                    layer_stack(model)[at](short, None, causal)
                    if family == "gpt2"
                    else layer_stack(model)[at](short)
                )
        torch.testing.assert_close(short, seen[3], rtol=1e-4, atol=1e-4)


def test_no_token_sees_later_or_foreign_ones_when_some_are_aside() -> None:
    _, model = tiny("llama", layers=5)
    rows, plan = text(2, 24), stage("next", token_drop=0.3)

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), apply_stage_layers(model, plan, 0, draws()):
            return last_hidden(model, type(rows)(ids, rows.position_ids, rows.bytes), False)

    before = hidden(rows.input_ids)
    changed = rows.input_ids.clone()
    changed[:, 15:] = 7
    assert torch.equal(hidden(changed)[:, :15], before[:, :15])
    changed = rows.input_ids.clone()
    changed[:, :10] = 7
    torch.testing.assert_close(hidden(changed)[:, 10:], before[:, 10:])


def test_wrong_plans_are_refused(tmp_path: Path) -> None:
    for words in ("bottom", "top:3", "train:", "train:1-", "train:a", "bottom:-1"):
        with pytest.raises(RegraftError, match=f"layers is '{words}'"):
            stage("next", layers=words)
    for options in ({"layer_drop": 1.0}, {"token_drop": -0.1}):
        with pytest.raises(RegraftError, match="give shares from 0, below 1"):
            stage("next", **options)
    for words in ("bottom:4", "bottom:0", "train:3", "train:2-1"):
        with pytest.raises(RegraftError, match=f"layers '{words}' of a model with layers 0 to 2"):
            go(tmp_path, [stage("next", layers=words)])
    with pytest.raises(RegraftError, match="2 layers are too few"):
        go(tmp_path, [stage("next", token_drop=0.1)], keys={"layers": 2})
    tiny("llama")[1].save_pretrained(tmp_path / "source")
    mixing = modeling.materialize(
        Remix("gated_deltanet", "0")(Checkpoint.open(tmp_path / "source"))
    )
    with pytest.raises(RegraftError, match="for models without mixers"):
        loop.train(
            loop.Run(mixing, [stage("next", layer_drop=0.1)], lambda length: text(), tmp_path)
        )


def test_a_tied_head_stays_with_frozen_embeddings() -> None:
    _, model = tiny("llama", tie_word_embeddings=True)
    fixed = frozen_parameter_ids(model, "train:2")
    named = {name for name, parameter in model.named_parameters() if id(parameter) not in fixed}
    assert "model.norm.weight" in named and "model.embed_tokens.weight" not in named
    assert all(".2." in name for name in named - {"model.norm.weight"})
