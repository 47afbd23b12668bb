"""A linear mixer and a window side by side, mixed by a gate per head."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..core.shapes import Bool, Float
from .attention import Attention
from .base import Mixer, MixerContext, State, output_weights
from .inherit import apply_inherit
from .registry import mixer_class
from .weight_spec import WeightSpec
from .window import Window


@dataclass(frozen=True)
class GatedOptions:
    """The two branches and where the gate starts."""

    # Specs of the branches.
    linear: dict[str, Any] = field(default_factory=lambda: {"name": "gated_deltanet"})
    window: dict[str, Any] = field(default_factory=lambda: {"name": "window"})
    # Initial logit of the gate; negative: mostly the window.
    start: float | int = -4.0
    # The linear branch counts only for tokens that have others before their window: until then the
    # window is the teacher's attention.
    past_window: bool = False


class GatedMixer(Mixer):
    """o = g o_linear + (1 - g) o_window with g = sigmoid(w x + b) per head.

    The convex mix of arXiv 2603.15590, eq. 11. The window branch is the source's own attention
    under a mask; the linear branch has projections of its own. They share the output projection.
    """

    name = "gated"
    Options = GatedOptions
    # "window" or "linear" pins the gate to one branch; None leaves it free.
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
            branch: (mixer_class(branch_spec["name"]), branch_spec)
            for branch, branch_spec in (("linear", options.linear), ("window", options.window))
        }

    @classmethod
    def weights(
        cls, attention: Attention, spec: dict[str, Any], output: bool = True
    ) -> dict[str, WeightSpec]:
        """Both branches' weights under their names, one output projection, the gate."""
        table: dict[str, WeightSpec] = {}
        for branch, (mixer, options) in cls.branches(spec).items():
            # `inherit` stands in each branch's own spec.
            branch_table = mixer.weights(attention, options, output=False)
            inherit = options.get("inherit", "all")
            branch_table = apply_inherit(branch_table, inherit, attention.hidden)
            table |= {f"{branch}.{name}": weight for name, weight in branch_table.items()}

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
    def softmax_tokens(cls, spec: dict[str, Any]) -> int:
        """Those of the window branch."""
        mixer, options = cls.branches(spec)["window"]
        return mixer.softmax_tokens(options)

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

    def input_layers(self) -> list[nn.Linear]:
        """Those of both branches, and the gate."""
        branches = [*self.window.input_layers(), *self.linear.input_layers()]
        return [*branches, self.gate, *super().input_layers()]

    def mix(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> tuple[Float[Tensor, "batch time heads dim"], State]:
        """Outputs per head, and the states of both branches under their names; see `Mixer.mix`."""
        outputs: dict[str, Tensor] = {}
        states: State = {}
        for name, branch in (("linear", self.linear), ("window", self.window)):
            if self.force not in (None, name):
                continue
            past = _branch_state(state, name) if state else None
            # Called as a module, so that hooks on it run, such as those that bring its weights.
            outputs[name], last = branch(x, mixing, past)
            states |= {f"{name}.{key}": tensor for key, tensor in last.items()}

        if self.force is not None:
            return outputs[self.force], states
        gate = mixing.project(self.gate, x).sigmoid()
        if self.options.past_window:
            gate = gate * self.leaves_window(x, mixing, state).unsqueeze(-1)
        mixed = gate.unsqueeze(-1) * (outputs["linear"] - outputs["window"])
        return outputs["window"] + mixed, states

    def leaves_window(
        self, x: Float[Tensor, "batch time hidden"], mixing: MixerContext, state: State | None
    ) -> Bool[Tensor, "batch time"]:
        """Which tokens have tokens before them that neither their window nor the sinks show."""
        window = self.window
        assert isinstance(window, Window)
        past = _branch_state(state, "window") if state else None
        position = window.place_tokens(x, mixing, past)
        return position >= window.options.window + window.options.sinks


def _branch_state(state: State, name: str) -> State:
    """The entries of one branch, under its own names."""
    prefix = f"{name}."
    return {
        key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)
    }
