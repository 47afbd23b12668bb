"""The options of LiGO; importing this imports no PyTorch, so that a wrong one is said at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import RegraftError
from .operators import DEPTH, WIDTH

COPY = "copy"
RANDOM_STARTS = ("average", "random", COPY)
# AKI takes rows of the next layer, which no map of an axis does.
STARTS: tuple[str, ...] = (*RANDOM_STARTS, *(name for name in WIDTH if name != "aki"))
CHOICES: dict[str, tuple[str, ...]] = {
    "start": STARTS,
    "depth": tuple(DEPTH),
    "reads": ("tied", "inverse", "orthogonal"),
    "free": ("new", "all"),
    "heads": ("blocks", "dense"),
}
COUNTS = ("steps", "warmup")
NUMBERS = ("blur", "lr", "lr_depth", "decay")


@dataclass(frozen=True)
class Ligo:
    """Options of LiGO (arXiv 2303.00980; docs/concepts/ligo.md): W' = B (sum_j w_j W_j) A^T, with B
    and w learned in a few steps.

    B (new, old) maps an axis that a weight writes, A one that it reads, w mixes layers.
    RegraftError for values that an option does not have.
    """

    # What rows of B for new coordinates begin as: `average` (random convex combinations of all old
    # ones, as in the authors' code), `random` numbers, or an operator of --width-init, whose copies
    # and shares B and A then begin with. `copy` lets the maps change a direct copy (`Transplant`:
    # random numbers wherever no old one is, in new layers too); 0 steps are that copy, whatever
    # `depth` is.
    start: str = "average"
    # Add the operator's free entries (random numbers that do not change the function) to what the
    # maps give, so that 0 steps are the operator itself.
    live: bool = False
    # The order of layers that w begins with: an operator of --depth-init.
    depth: str = "stack"
    # How much of the other layers w mixes in at the start (the authors' code: 0.03).
    blur: float = 0.03
    # A, by which a weight reads what B wrote. `tied`: B itself, as the paper has it (copies read
    # with their shares). `inverse`: pinv(B)^T on the residual stream, with gains of norms moved
    # into their readers, so that what is linear stays exact for every B; readers of neurons and
    # heads learn shares of their own. `orthogonal`: as `inverse`, and the columns of B are
    # orthogonal, which a root-mean-square norm does not notice, so that the stream stays exact.
    reads: Literal["tied", "inverse", "orthogonal"] = "tied"
    # What of B learns: the rows of `new` coordinates (B = [I; C]), or `all` of it.
    free: Literal["new", "all"] = "new"
    # `blocks` maps whole heads, alike for queries, keys and values. `dense` mixes all coordinates
    # of all heads, differently for the three, as the paper does (no rotary positions, no grouped
    # queries).
    heads: Literal["blocks", "dense"] = "blocks"
    # Steps of AdamW on the maps; 0 keeps the start.
    steps: int = 100
    # Learning rate of B and A.
    lr: float = 1e-2
    # Learning rate of w.
    lr_depth: float = 3e-2
    # Steps until the learning rates are reached.
    warmup: int = 5
    # AdamW's weight decay.
    decay: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise RegraftError(
                    f"LiGO has no {name} '{getattr(self, name)}': use one of {', '.join(allowed)}"
                )
        if self.live and self.start in RANDOM_STARTS:
            raise RegraftError(
                f"LiGO's start '{self.start}' has no free entries to keep live: use start pad"
            )

        # YAML and JSON give `true` for a number without complaint: a bool is an int in Python.
        for name in (*COUNTS, *NUMBERS):
            value, kind = getattr(self, name), int if name in COUNTS else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or value < 0:
                word = "whole number" if name in COUNTS else "number"
                raise RegraftError(f"LiGO's {name} is {value!r}: give a {word}, at least 0")
