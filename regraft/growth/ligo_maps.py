"""Learned maps of one axis: how its coordinates are written, and how they are read (LiGO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.axes import Expansion, build_expansion
from ..errors import RegraftError
from .operators import DEPTH, WIDTH

# AKI takes rows of the next layer, which no map of an axis does.
COPY = "copy"
RANDOM_STARTS = ("average", "random", COPY)
STARTS: tuple[str, ...] = (*RANDOM_STARTS, *(name for name in WIDTH if name != "aki"))
CHOICES: dict[str, tuple[str, ...]] = {
    "start": STARTS,
    "depth": tuple(DEPTH),
    "reads": ("tied", "inverse", "orthogonal"),
    "free": ("new", "all"),
    "heads": ("blocks", "dense"),
}


@dataclass(frozen=True)
class Ligo:
    """LiGO (arXiv 2303.00980) and its options: W' = B (sum_j w_j W_j) A^T, with B and w learned in
    a few steps.

    `start`: what rows of B for new coordinates begin as: `average` (random convex combinations of
    all old ones, as the authors' code), `random` ones, or an operator of --width-init, whose copies
    and shares B and A then begin with; `copy` lets the maps change a direct copy (`Transplant`:
    random numbers wherever no old one is, in new layers too), which 0 steps are, whatever `depth`
    says. `live`: the operator's free entries, random numbers that do not change the function, are
    added to what the maps give, so that 0 steps are the operator itself. `depth`: the order of
    layers that w begins with, an operator of --depth-init; `blur`: how much of the other layers is
    mixed in (the authors' code: 0.03). `reads`: A, by which a weight reads what B wrote: `tied` is
    B itself, as the paper has it (copies read with their shares); `inverse` is pinv(B)^T on the
    residual stream, with gains of norms moved into their readers, so that what is linear stays
    exact for every B, and what reads neurons and heads learns shares of its own; `orthogonal` also
    makes the columns of B orthogonal, which a root-mean-square norm does not notice, so that the
    stream stays exact. `free`: `new` learns the rows of new coordinates (B = [I; C]), `all` the
    whole of B. `heads`: `blocks` maps whole heads, alike for queries, keys and values; `dense`
    mixes all coordinates of all heads, queries, keys and values each their own way, as the paper
    does (no rotary positions, no grouped queries). `steps`, `lr`, `lr_depth`, `warmup`, `decay`:
    AdamW on the maps; 0 steps keep the start.
    """

    start: str = "average"
    live: bool = False
    depth: str = "stack"
    blur: float = 0.03
    reads: Literal["tied", "inverse", "orthogonal"] = "tied"
    free: Literal["new", "all"] = "new"
    heads: Literal["blocks", "dense"] = "blocks"
    steps: int = 100
    lr: float = 1e-2
    lr_depth: float = 3e-2
    warmup: int = 5
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
        for name in ("steps", "warmup", "blur", "lr", "lr_depth", "decay"):
            value = getattr(self, name)
            whole = name in ("steps", "warmup")
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or value < 0
            ):
                raise RegraftError(
                    f"LiGO's {name} is {value!r}: give a {'whole ' if whole else ''}number, at"
                    " least 0"
                )


class AxisMap(nn.Module):
    """The map of one axis: B (new, old) says how its coordinates are written, A (new, old) how they
    are read.

    `linear`: nothing but maps and norms stand between writers and readers, so that A may undo any
    B. `learns`: whether anything here does.
    """

    def __init__(
        self,
        axis: Expansion,
        method: Ligo,
        draw: torch.Generator,
        linear: bool,
        learns: bool = True,
    ):
        super().__init__()
        self.reads = method.reads
        written, shares = axis.write_matrix.float(), axis.read_matrix.T.float()
        fresh, averaged = axis.new_coordinates, method.start == "average" and learns
        if averaged:
            rows = torch.rand(len(fresh), axis.old, generator=draw)
            written[fresh] = rows / rows.sum(1, keepdim=True)
        elif method.start == "random" and learns:
            written[fresh] = torch.randn(len(fresh), axis.old, generator=draw) / axis.old**0.5
        self.silent: (
            Tensor  # coordinates that nothing old is written to at first: their gains begin at one
        )
        self.register_buffer("silent", fresh[:0] if averaged else fresh, persistent=False)
        kept = (
            len(written)
            if not learns
            else axis.old
            if method.free == "new" and axis.starts_with_old
            else 0
        )
        self.kept: Tensor
        self.register_buffer("kept", written[:kept].clone(), persistent=False)
        self.rows = nn.Parameter(written[kept:].clone())
        self.shares: Tensor
        self.register_buffer("shares", shares.clone(), persistent=False)
        apart = method.reads != "tied" and not linear and learns
        self.readers = nn.Parameter(torch.zeros_like(shares)) if apart else None
        self.linear = linear
        self.first = (
            axis.old if kept >= axis.old and axis.starts_with_old else 0
        )  # rows of B that are the identity's
        self.unshared = bool((shares[: axis.old].sum(1) == 1).all())
        # whether B is kept as large, on average, as the start's: where norms read what it writes
        self.levels = False

    def identity_count(self, read: bool) -> int:
        """How many coordinates, from the first, a map leaves as they are: [I; C] need not multiply
        by I.
        """
        if read:
            return self.first if self.reads == "tied" and self.unshared else 0
        return 0 if self.linear and (self.reads == "orthogonal" or self.levels) else self.first

    def forward(self) -> tuple[Tensor, Tensor]:
        """(B, A)."""
        written = torch.cat([self.kept, self.rows])
        if self.reads == "tied":
            share = self.shares.sum(1, keepdim=True)
            return written, written * torch.where(share == 0, 1.0, share)
        if not self.linear:
            return written, self.shares if self.readers is None else self.shares + self.readers
        gram = written.T @ written
        if self.reads == "inverse":
            size = (gram.trace() / len(gram)).sqrt() if self.levels else 1.0
            return written / size, torch.linalg.solve(gram, written.T).T * size
        factor = torch.linalg.cholesky(gram)
        written = torch.linalg.solve_triangular(factor, written.T, upper=False).T
        return written, written


def flatten_head_axes(kv: Expansion, dim: Expansion) -> Expansion:
    """The coordinates of all heads as one axis."""
    index = kv.index[:, None] * dim.old + dim.index
    index = torch.where((kv.index[:, None] < 0) | (dim.index < 0), -1, index).flatten()
    return build_expansion(
        f"{kv.name} {dim.name}", kv.old * dim.old, index, (kv.share[:, None] * dim.share).flatten()
    )
