"""A linear mixer and a window side by side, mixed by a gate per head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .base import Attention, Mixer, MixerContext, State, WeightSpec, output_weights
from .inherit import apply_inherit
from .registry import mixer_class


@dataclass(frozen=True)
class GatedOptions:
    """`linear` and `window` are mixer specs; `start` is the gate's logit at first (negative: the window's side)."""

    linear: dict[str, Any] = field(default_factory=lambda: {"name": "gated_deltanet"})
    window: dict[str, Any] = field(default_factory=lambda: {"name": "window"})
    start: float | int = -4.0


class GatedMixer(Mixer):
    """o = g o_linear + (1 - g) o_window with g = sigmoid(w x + b) per head (convex mix of arXiv 2603.15590, eq. 11).

    The window branch is the source's own attention under a mask; the linear branch has projections of its own. They
    share the output projection. `force` pins the gate: "window" or "linear" shows one branch alone.
    """

    name = "gated"
    Options = GatedOptions
    force: str | None = None
    linear: Mixer
    window: Mixer
    gate: nn.Linear

    def __init__(self, attention: Attention, spec: dict[str, Any], output: bool = True):
        super().__init__(attention, spec, output)
        self.linear = mixer_class(self.options.linear["name"])(
            attention, self.options.linear, output=False
        )
        self.window = mixer_class(self.options.window["name"])(
            attention, self.options.window, output=False
        )
        self.gate = nn.Linear(attention.hidden, attention.heads)

    @classmethod
    def branches(cls, spec: dict[str, Any]) -> dict[str, tuple[type[Mixer], dict[str, Any]]]:
        """Branch name -> (mixer class, spec)."""
        options = cls.parse(spec)
        return {
            n: (mixer_class(s["name"]), s)
            for n, s in (("linear", options.linear), ("window", options.window))
        }

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Both branches' weights under their names, one output projection, the gate."""
        table = {}
        for branch, (mixer, options) in cls.branches(spec).items():
            branch_table = mixer.weights(attention, options, output=False)
            for name, weight in apply_inherit(
                branch_table, options.get("inherit", "all"), attention.hidden
            ).items():
                table[f"{branch}.{name}"] = weight
        table["gate.weight"] = WeightSpec("hidden -> kv group", fresh="zeros", decay=False)
        table["gate.bias"] = WeightSpec(
            "-> kv group", fresh=f"constant {cls.parse(spec).start}", decay=False
        )
        return table | (output_weights(attention) if output else {})

    @classmethod
    def state_size(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Both branches'."""
        return sum(
            mixer.state_size(attention, options) for mixer, options in cls.branches(spec).values()
        )

    @classmethod
    def mixing_flops(cls, attention: Attention, spec: dict[str, Any]) -> int:
        """Both branches'."""
        return sum(
            mixer.mixing_flops(attention, options) for mixer, options in cls.branches(spec).values()
        )

    @classmethod
    def row_flops(cls, attention: Attention, spec: dict[str, Any], length: int) -> tuple[int, int]:
        """Both branches'."""
        costs = [
            mixer.row_flops(attention, options, length)
            for mixer, options in cls.branches(spec).values()
        ]
        return sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)

    def mix(self, x: Tensor, mixing: MixerContext, state: State | None) -> tuple[Tensor, State]:
        """x: (batch, time, hidden) -> (batch, time, heads, dim); the state holds both branches' under their names."""
        outputs: dict[str, Tensor] = {}
        states: State = {}
        for name, branch in (("linear", self.linear), ("window", self.window)):
            if self.force not in (None, name):
                continue
            past = (
                {
                    key.removeprefix(f"{name}."): s
                    for key, s in state.items()
                    if key.startswith(f"{name}.")
                }
                if state
                else None
            )
            outputs[name], last = branch.mix(x, mixing, past)
            states |= {f"{name}.{key}": s for key, s in last.items()}
        if self.force is not None:
            return outputs[self.force], states
        gate = self.gate(x).sigmoid().unsqueeze(-1)
        return outputs["window"] + gate * (outputs["linear"] - outputs["window"]), states
