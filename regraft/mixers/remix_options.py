"""What a Remix is asked to do, apart from doing it; importing this imports no PyTorch.

Recipes and methods are read, checked and reported with these fields before the weights are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import RegraftError

RULES = ("bypass", "halo", "recall", "restore")  # of `linearize.select_layers`, by measurement


@dataclass(frozen=True)
class RemixOptions:
    """Which mixer replaces softmax attention, in which layers, and what it begins with."""

    # Name of the linear mixer.
    mixer: str = "gated_deltanet"
    # Layers that keep softmax attention: "every:4" for 0, 4, 8, ...; "0,7,14" for these; "all";
    # "none".
    keep: str = "every:4"
    # With more than 0 tokens, a linear mixer gets a gated branch of sliding-window attention beside
    # it; 0: no window. The window branch is the source's own attention. Of what costs no training a
    # wide window keeps most for its state (docs/log.md).
    window: int = 256
    # First tokens that the window branch always sees.
    sinks: int = 4
    # Of new weights; each tensor has its own random numbers, by this seed and its name.
    seed: int = 0
    # The mixer's own options (see its class), such as {"grouped": False}.
    options: dict[str, Any] = field(default_factory=dict)
    # Projections of the source's attention that the linear mixer copies: "all", "none", or a list
    # such as "v,o" (XATL copies "o"). The others begin as in `mixers.inherit`.
    inherit: str = "all"
    # Initial logit of the linear branch's share beside a window (0: half).
    gate: float = -4.0
    # Beside a window the linear branch counts only where tokens lie before it.
    past_window: bool = False
    # How the layers of `keep` were chosen, when they were measured (`linearize.select_layers`).
    # Changes nothing here.
    scores: dict[str, Any] = field(default_factory=dict)

    def kept_layers(self, layers: int) -> frozenset[int]:
        """The layers that keep softmax attention, out of `layers`.

        Raises RegraftError for layers beyond the last, and for a rule that measures the weights.
        """
        word, _, number = self.keep.partition(":")
        if self.keep in ("all", "none"):
            return frozenset(range(layers) if self.keep == "all" else ())
        if word in RULES:
            raise RegraftError(
                f"--keep '{self.keep}' is measured on the weights: regraft linearize does that, "
                "and its lineage then says which layers; a plan needs every:N, a list, all or none"
            )

        try:
            if word == "every" and (every := int(number)) > 0:
                return frozenset(range(0, layers, every))
            chosen = [int(item) for item in self.keep.split(",")]
        except ValueError:
            raise RegraftError(
                f"--keep '{self.keep}' is not every:N, a list such as 0,7,14, all, none, or a rule "
                f"to measure by ({', '.join(RULES)}) and how many layers, such as {RULES[0]}:8"
            ) from None

        if beyond := [layer for layer in chosen if not 0 <= layer < layers]:
            raise RegraftError(
                f"--keep '{self.keep}' names layer {beyond[0]}: the last layer is {layers - 1}"
            )
        return frozenset(chosen)
