"""Whether an inferred table is right: its laws on a tiny random model of the stock class.

Every axis grows, and the stock class of the grown sizes must give the same logits. A window as
wide as the text in the place of attention must give them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..core.checkpoint import Checkpoint
from ..core.lazy import LazyTensor, Provenance
from ..errors import RegraftError, first_line
from ..families.inference.layer_settings import holds_settings
from ..families.inference.shapes import list_stored
from ..families.inference.table import InferredTable, build_anatomy
from ..families.inference.tiny_model import LENGTH, TinyModel, run
from ..growth.steps.deepen import Deepen
from ..growth.steps.widen import Widen
from ..mixers.remix import Remix
from ..modeling.loading import build_with_weights, materialize
from .growth import EXACT
from .outputs import relative_difference

Step = Callable[[Checkpoint], Checkpoint]
EVERY_AXIS = ("depth", "hidden", "ffn", "kv", "group", "dim", "attention")
LAST_BIT = 2.0**-24  # half the distance of neighbouring float32 numbers, relative
# Rounding errors of a grown model over those of weights that move by LAST_BIT: measured up to 16.
# Wrong tables are off by more than MAX_ROUNDING, mostly by a tenth and more.
ROUNDINGS, MAX_ROUNDING = 30, 2e-4
PADDING = 3  # tokens before a row, to see whether they count
UNPROVEN = "growing it changes the logits of the stock class by {:.1g} of the largest"


def open_tiny(table: InferredTable, tiny: TinyModel) -> Checkpoint:
    """The tiny random model under an inferred table, all in memory.

    RegraftError when the table does not claim every tensor of the class with its shape.
    """
    model = tiny.build_random()
    config = {
        "model_type": tiny.family,
        "architectures": [tiny.kind.__name__],
        **tiny.config,
    }
    anatomy = build_anatomy(table, config)
    config |= anatomy.rewrite(config)
    values = {name: value.detach().contiguous() for name, value in list_stored(model).items()}
    placed = anatomy.place(config)
    check_claimed(table, {key: (one.name, one.shape) for key, one in placed.items()}, values)

    place = Path(f"tiny {tiny.family}")
    return Checkpoint(
        place,
        config,
        anatomy,
        anatomy.solve(config),
        {key: _hold(values[one.name], one.name) for key, one in placed.items()},
        {key: one.name for key, one in placed.items()},
        place,
        in_memory=True,
    )


def check_claimed(table: InferredTable, placed: dict[Any, Any], values: dict[str, Any]) -> None:
    """RegraftError when a tensor is not claimed by one part with its shape."""
    claimed = dict(placed.values())
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    if len(claimed) != len(placed) or claimed != shapes:
        wrong = sorted({*claimed.items()} ^ {*shapes.items()})
        raise RegraftError(
            f"the inferred table of {table.family} does not fit its class at {wrong[:1]}: only "
            "types with a table work there"
        )


def _hold(value: torch.Tensor, name: str) -> LazyTensor:
    return LazyTensor(tuple(value.shape), value.dtype, Provenance("copied", (name,)), lambda: value)


def prove_growth(table: InferredTable, tiny: TinyModel) -> dict[str, str]:
    """Axes that are not proven to grow -> why.

    Args:
        table: what was inferred.
        tiny: the class and a tiny config.
    """
    try:
        source = open_tiny(table, tiny)
        before = _compute(source, tiny)
    except Exception as error:  # a table that does not fit, whatever it does to the class
        return dict.fromkeys(EVERY_AXIS, describe_failure(error))
    closed: dict[str, str] = {}
    for axes, trials in iter_trials(source):
        if any(axis in table.closed for axis in axes):
            continue
        why = find_failure(source, before, tiny, trials)
        if why:
            closed |= dict.fromkeys(axes, why)
    return closed


def iter_trials(source: Checkpoint) -> Iterator[tuple[tuple[str, ...], list[Step]]]:
    """(axes, steps that grow them) of every proof; the class may refuse steps, but not all."""
    sizes = source.sizes
    hidden, ffn, heads = sizes["hidden"], sizes["ffn"], sizes["kv"] * sizes["group"]
    # Every layer gets a new one behind it, if layers are alike; else one on top.
    yield ("depth",), [Deepen(2 * source.layers), Deepen(source.layers + 1)]
    yield (
        ("hidden",),
        [Widen(hidden=hidden + extra) for extra in (hidden // 4, hidden // 2, hidden)],
    )
    yield ("ffn",), [Widen(ffn=ffn + 40), Widen(ffn=2 * ffn)]
    coupled = [key for key, axes in source.anatomy.sizes if axes == "hidden"]
    is_coupled = sum(key in coupled for key, _ in source.anatomy.sizes) > 1
    wide = 2 * hidden if is_coupled else None
    if "group" not in source.anatomy.fixed:
        yield ("group",), [Widen(hidden=wide, heads=2 * heads, kv_heads=sizes["kv"])]
    yield ("kv",), [Widen(hidden=wide, heads=2 * heads)]
    yield ("dim",), [Widen(hidden=wide, head_dim=2 * sizes["dim"])]


def find_failure(
    source: Checkpoint, before: torch.Tensor, tiny: TinyModel, trials: list[Step]
) -> str | None:
    """Why steps do not keep what a model gives; None when the first that is not refused, and all
    after it, do.

    Args:
        source: the model.
        before: what it gives.
        tiny: its class.
        trials: the steps.
    """
    reason = "no size was tried"
    proven = False
    for step in trials:
        try:
            after = _compute(step(source), tiny)
        except RegraftError as error:  # the class or the operator takes other sizes
            reason = describe_failure(error)
            continue
        except Exception as error:  # whatever a wrong table does to the class
            return describe_failure(error)
        if after.shape != before.shape:
            return "the outputs have another shape"
        difference = relative_difference(after, before)
        if not difference <= EXACT:
            # What no rounding explains needs no estimate.
            near = difference <= MAX_ROUNDING
            if not near or difference > estimate_rounding(source, before, tiny):
                return UNPROVEN.format(difference)
        proven = True
        break
    return None if proven else reason


def estimate_rounding(source: Checkpoint, before: torch.Tensor, tiny: TinyModel) -> float:
    """How far logits may be apart by rounding alone, relative to the largest.

    Random weights amplify rounding, in some classes more than in others: each weight is moved by
    about its last bit. Growing rounds often, so it may move logits ROUNDINGS times as far.
    """
    moved = max(
        relative_difference(_compute(_move_weights(source, seed), tiny), before)
        for seed in range(3)
    )
    return min(ROUNDINGS * moved, MAX_ROUNDING)


def _move_weights(source: Checkpoint, seed: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, lazy in source.tensors.items():
        value = lazy.read()
        if value.is_floating_point():
            value = value * (1 + LAST_BIT * torch.randn(value.shape, generator=generator))
        tensors[key] = _hold(value, source.names[key])
    return replace(source, tensors=tensors)


def _compute(checkpoint: Checkpoint, tiny: TinyModel) -> torch.Tensor:
    """What the stock class gives with a checkpoint's config and tensors."""
    values = {
        checkpoint.anatomy.name_in_file(checkpoint.names[key]): lazy.read().contiguous()
        for key, lazy in checkpoint.tensors.items()
    }
    fields = {key: value for key, value in checkpoint.config.items() if key != "model_type"}
    config = tiny.config_kind.from_dict(fields)
    config._attn_implementation = "eager"
    model, lost = build_with_weights(tiny.kind, config, values, torch.float32)
    if lost:
        raise RegraftError(f"the class has no place for '{sorted(lost)[0]}' as it grows")
    return run(model.eval(), tiny)


def prove_attention(table: InferredTable, tiny: TinyModel) -> str | None:
    """Why the attention of a type cannot be linearized; None when it can.

    A model whose layers are all kept must be the stock model, a window as wide as the text must
    compute what the stock attention does, and write text with a cache.
    """
    if not tiny.kind.__module__.startswith("transformers."):
        return "its class is code beside the weights, which a linearized model cannot name"
    try:
        source = open_tiny(table, tiny)
        before = _compute(source, tiny)
        for options in ({"keep": "all"}, {"keep": "none", "window": LENGTH + 1, "sinks": 0}):
            step = Remix(mixer="window", **options)
            model = materialize(step(source))
            after = run(model, tiny)
            difference = relative_difference(after, before)
            if not difference <= EXACT:
                return f"softmax as the table has it differs from the class's by {difference:.1g}"
        _write_tokens(model, tiny.inputs["input_ids"])
        if all(model.config.mixers) and not _knows_padding(model, after, tiny.inputs["input_ids"]):
            return "the class does not tell its attention which tokens are padding"
    except Exception as error:  # whatever a wrong table does to the class
        is_own_refusal = isinstance(error, RegraftError) and error.__cause__ is None
        if not is_own_refusal and any(map(holds_settings, tiny.config.values())):
            return "layers have settings of their own, which a linearized model does not keep"
        return describe_failure(error)
    return None


def _write_tokens(model: Any, ids: torch.Tensor) -> None:
    """Write two tokens with a cache; whatever the class raises when it cannot."""
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, min_new_tokens=2,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def _knows_padding(model: Any, alone: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether rows give the same with padding before them.

    Args:
        model: whose layers all hold mixers.
        alone: what it gives without padding.
        ids: the rows.
    """
    mask = torch.ones_like(ids)
    padded, mask = (torch.nn.functional.pad(one, (PADDING, 0)) for one in (ids, mask))
    found = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, PADDING:]
    return relative_difference(found, alone) <= EXACT


def describe_failure(error: Exception) -> str:
    """Why a model could not be made or run, for a table's list of closed axes."""
    said = first_line(error)
    if isinstance(error, RegraftError):
        return said.removeprefix("RegraftError: ")
    return f"the class does not run with what the inferred table makes of it ({said})"
