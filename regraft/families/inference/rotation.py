"""How the attention of a class turns queries and keys by position, found by trying it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...mixers.attention import split_complex
from .tiny_model import TinyModel, run
from .trace import Trace

TABLES = "position_embeddings"  # argument of attention modules with cos and sin
# (config key of a list with an entry for each layer, the entries of layers that rotate).
LayerRule = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Rotation:
    """What is known of the rotation of queries and keys."""

    # Layout of cos and sin, as of `Anatomy.rotary_tables`.
    tables: str = "halves"
    # Whether neighbouring coordinates turn together.
    pairs: bool = False
    # Which layers rotate; None: all do.
    layers: LayerRule | None = None
    # Why no table can say which layers rotate; empty: one can.
    why_not: str = ""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of an attention module."""

    module: Any
    given: tuple[Any, ...]
    named: dict[str, Any]
    result: Any


def probe_rotation(tiny: TinyModel, model: Any, slot: str) -> Rotation:
    """How the layers of a model rotate.

    Args:
        tiny: says what the model reads.
        model: an instance of it.
        slot: name of the attention modules, with "{}" for the layer.
    """
    calls = record_attention(tiny, model, slot)
    tables = [split_complex(call.named.get(TABLES)) for call in calls]
    pairs_given = [pair for pair in tables if isinstance(pair, tuple) and len(pair) == 2]
    if not calls or len(pairs_given) < len(calls):
        return Rotation()
    layout = find_layout(*pairs_given[0])
    turns = [is_turned(call) for call in calls]
    pairs = turns_pairs(calls[0].module)
    if all(turns):
        return Rotation(layout, pairs)
    rule = find_rule(tiny.config, turns)
    why = "" if rule else "no list of the config says which layers rotate queries and keys"
    return Rotation(layout, pairs, rule, why)


def record_attention(tiny: TinyModel, model: Any, slot: str) -> list[AttentionCall]:
    """What the attention modules of all layers got and gave; arguments as of `probe_rotation`."""
    modules = dict(model.named_modules())
    calls: list[AttentionCall] = []

    def keep(module: Any, given: Any, named: Any, result: Any) -> None:
        calls.append(AttentionCall(module, given, dict(named), first_output(result).clone()))

    if not slot:
        return []
    found = [
        modules.get(slot.format(layer)) for layer in range(tiny.config[tiny.key("depth") or ""])
    ]
    handles = [one.register_forward_hook(keep, with_kwargs=True) for one in found if one]
    try:
        run(model, tiny)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def norms_after_rotation(trace: Trace, slot: str) -> bool:
    """Whether queries are normed after they are rotated: the norm gets other numbers than their
    projection gives.

    Args:
        trace: of a forward pass.
        slot: name of the attention modules, with "{}" for the layer.
    """
    import torch

    inside = [call for call in trace.calls if call.name.startswith(f"{slot.format(0)}.")]
    norm = next((call for call in inside if call.name in trace.inner), None)
    if not slot or norm is None or norm.given is None:
        return False
    # All that the norm gets is what some map before it gives, alone or packed with others.
    return not any(
        call.result is not None and bool(torch.isin(norm.given, call.result).all())
        for call in inside
        if call is not norm
    )


def find_layout(first: Any, second: Any) -> str:
    """The layout of tables of cos and sin, (rows, time, width) each, as of
    `Anatomy.rotary_tables`.
    """
    import torch

    if not (torch.is_tensor(first) and torch.is_tensor(second)):
        return "halves"
    half = first.shape[-1] // 2
    if torch.equal(first[..., :half], first[..., half:]):
        return "halves"
    if torch.equal(first[..., ::2], first[..., 1::2]):
        return "neighbours"
    # The sine of the first position is zero.
    return "once, sin first" if not bool(first[..., 0, :].any()) else "once"


def first_output(result: Any) -> Any:
    """What an attention module gives, without weights and caches beside it."""
    return result[0] if isinstance(result, tuple | list) else result


def is_turned(call: AttentionCall) -> bool:
    """Whether an attention module gives something else when positions are in another order."""
    import torch

    given = call.named[TABLES]
    flipped = given.flip(-2) if torch.is_tensor(given) else tuple(one.flip(-2) for one in given)
    named = call.named | {TABLES: flipped}
    with torch.no_grad():
        result = call.module(*call.given, **named)
    return not torch.allclose(first_output(result), call.result, rtol=1e-4, atol=1e-6)


def turns_pairs(module: Any) -> bool:
    """Whether the function that rotates, in the module of a class, turns neighbours together."""
    import sys

    import torch

    functions = vars(sys.modules[type(module).__module__])
    if "rotate_every_two" in functions:
        return True
    turn = functions.get("rotate_half")
    if turn is None:
        return False
    # Coordinate 0 comes to place 1 where neighbours turn together, else to the second half.
    return bool(turn(torch.tensor([[[[1.0, 0.0, 0.0, 0.0]]]]))[..., 1] != 0)


def find_rule(config: dict[str, Any], turns: Sequence[bool]) -> LayerRule | None:
    """A list of the config whose entries say which layers rotate; None when there is none.

    Args:
        config: with lists of an entry for each layer.
        turns: whether each layer rotates.
    """
    if not any(turns):
        return "", ()
    found: list[tuple[int, LayerRule]] = []
    for key, value in config.items():
        if not isinstance(value, list) or len(value) != len(turns):
            continue
        if not all(isinstance(one, str | int) for one in value):
            continue
        inside = {one for one, turn in zip(value, turns, strict=True) if turn}
        outside = {one for one, turn in zip(value, turns, strict=True) if not turn}
        if not inside & outside:
            found.append((len({*value}), (key, tuple(sorted(inside, key=repr)))))
    # A list with other values for each layer, such as one of numbers of layers, fits anything.
    return min(found, key=lambda one: one[0], default=(0, None))[1]
