"""Where the numbers of grown matrices come from, found out by growing tiny models and changing
their numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.core.anatomy import find_anatomy
from regraft.core.checkpoint import Checkpoint, LazyTensor, Provenance
from regraft.errors import RegraftError
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen

KINDS = ("old", "copy", "following", "random", "opposite", "average", "zero", "one")
NEAR, SEED = 1e-9, 5
RMS = {
    "model_type": "mistral", "vocab_size": 5, "hidden_size": 4, "intermediate_size": 2, "num_hidden_layers": 2,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-5,
}  # fmt: skip
LAYER_NORM = {
    "model_type": "gpt2", "vocab_size": 5, "n_embd": 4, "n_inner": 2, "n_layer": 2, "n_head": 1, "n_positions": 5,
    "layer_norm_epsilon": 1e-5,
}  # fmt: skip
UNITS = RMS | {"hidden_size": 2, "intermediate_size": 4}
HEADS = RMS | {"hidden_size": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 2}
ONE_HEAD = RMS | {"hidden_size": 2, "head_dim": 2}
MLP = (("mlp.gate", "gate", "writes"), ("mlp.up", "up", "writes"), ("mlp.down", "down", "reads"))
ATTENTION = (
    ("attn.q", "q", "writes"),
    ("attn.k", "k", "writes"),
    ("attn.v", "v", "writes"),
    ("attn.o", "o", "reads"),
)
STREAM = (("mlp.down", "down", "writes"), ("norm.mlp", "gain", "norm"), ("mlp.up", "up", "reads"))
STREAM_BIAS = (*STREAM[:2], ("norm.mlp", "bias", "norm"), STREAM[2])


class Source:
    """A tiny model in memory whose numbers can still be changed when its growth is planned."""

    def __init__(self, config: dict[str, Any]):
        anatomy, generator = find_anatomy(config), torch.Generator().manual_seed(3)
        placed = anatomy.place(config)
        self.values = {key: random_signed(spot.shape, generator) for key, spot in placed.items()}
        tensors = {
            key: LazyTensor(
                spot.shape,
                torch.float64,
                Provenance("copied", (spot.name,)),
                partial(self.values.__getitem__, key),
            )
            for key, spot in placed.items()
        }
        names = {key: spot.name for key, spot in placed.items()}
        self.checkpoint = Checkpoint(
            Path("tiny"),
            config,
            anatomy,
            anatomy.solve(config),
            tensors,
            names,
            None,
            in_memory=True,
        )

    @contextmanager
    def perturb(self, role: str, layer: int, index: tuple[int, ...]) -> Iterator[None]:
        """One number of a tensor, seen output first, is another for a while."""
        part = self.checkpoint.part(role)
        turned = part is not None and part.stored == "in out" and part.axes.kind == "map"
        value, place = self.values[role, layer], index[::-1] if turned else index
        value[place] += 0.37
        try:
            yield
        finally:
            value[place] -= 0.37


def random_signed(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Numbers of either sign, none near zero, all different."""
    size = 0.4 + 0.6 * torch.rand(tuple(shape), generator=generator, dtype=torch.float64)
    return size * (2 * torch.randint(0, 2, tuple(shape), generator=generator) - 1)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix and where each of its entries comes from.

    `kinds`: one of KINDS; `following` is a copy from the next layer. `origins`: the place of the
    copied entry along the axis that grows, from one; 0 for none. `times`: what a copy is multiplied
    by. `noisy`: entries that noise reaches by default. `axis`: the one that grows. `shades`: size
    of the entries, 1 for the source's largest.
    """

    title: str
    note: str
    axis: int
    kinds: np.ndarray
    origins: np.ndarray
    times: np.ndarray
    noisy: np.ndarray
    shades: np.ndarray

    def lines(self, table: np.ndarray) -> list[Any]:
        """What a table says of the copies in every row or column along the axis that grows, None
        where there are none; RegraftError when they differ, which a picture could not show.
        """
        found = []
        for place in range(self.kinds.shape[self.axis]):
            copied = self.origins.take(place, self.axis) > 0
            values = sorted(set(np.round(table.take(place, self.axis)[copied], 6).tolist()))
            if len(values) > 1:
                raise RegraftError(
                    f"line {place} of '{self.title}' mixes {values}: draw its entries one by one"
                )
            found.append(values[0] if values else None)
        return found

    def same(self, other: Matrix) -> bool:
        """Whether two matrices have the same entries from the same places."""
        tables = (
            (getattr(one, name) for one in (self, other))
            for name in ("kinds", "origins", "noisy", "times")
        )
        return all(one.shape == two.shape and (one == two).all() for one, two in tables)

    def describe(self) -> str:
        """The matrix in words."""
        counts = {kind: int((self.kinds == kind).sum()) for kind in KINDS}
        parts = [f"{number} {kind}" for kind, number in counts.items() if number]
        noise = f", {int(self.noisy.sum())} with noise" if self.noisy.any() else ""
        return f"{self.title} {'×'.join(map(str, self.kinds.shape))} ({', '.join(parts)}{noise})"


@dataclass(frozen=True)
class Scene:
    """Matrices of a tiny model before and after a widening."""

    name: str
    olds: list[Matrix]
    news: list[Matrix]

    @property
    def every(self) -> list[Matrix]:
        """All matrices, the source's first."""
        return self.olds + self.news

    @property
    def columns(self) -> int:
        """Cells side by side."""
        return sum(drawn.kinds.shape[1] for drawn in self.every)

    @property
    def rows(self) -> int:
        """Cells of the tallest matrix."""
        return max(drawn.kinds.shape[0] for drawn in self.every)


def scene(
    name: str, config: dict[str, Any], roles: Sequence[tuple[str, str, str]], **asked: Any
) -> Scene:
    """The scene of a widening of a tiny model."""
    source = Source(config)
    noisy = Widen(**asked, seed=SEED)(source.checkpoint)
    plain = Widen(**asked, seed=SEED, noise=0.0)(source.checkpoint)
    made = Scene(name, [], [])
    for base, title, note in roles:
        role, axis = (
            f"{base}.{'bias' if title == 'bias' else 'weight'}",
            1 if note == "reads" else 0,
        )
        value = flat(source.checkpoint[role, 0].read())
        ones, sizes = np.ones(value.shape), np.abs(value) / np.abs(value).max()
        kinds = np.full(value.shape, "old", object)
        made.olds.append(
            Matrix(
                title, note, axis, kinds, np.indices(value.shape)[axis] + 1, ones, ones == 0, sizes
            )
        )
        shades = np.abs(flat(plain[role, 0].read())) / np.abs(value).max()
        reached = np.abs(flat(noisy[role, 0].read() - plain[role, 0].read())) > NEAR
        made.news.append(
            Matrix(
                title,
                note,
                axis,
                *trace_entries(source, plain, role, axis),
                reached,
                shades.clip(0, 1),
            )
        )
    return made


def trace_entries(
    source: Source, grown: Checkpoint, role: str, axis: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(kinds, origins, times) of a grown tensor, from what moves when one number of the source is
    another.
    """
    value, layers = flat(grown[role, 0].read()), range(source.checkpoint.layers)
    places = list(np.ndindex(*source.checkpoint[role, 0].shape))
    moved = np.zeros((len(layers), len(places), *value.shape), bool)
    for layer in layers:
        for number, place in enumerate(places):
            with source.perturb(role, layer, place):
                moved[layer, number] = np.abs(flat(grown[role, 0].read()) - value) > NEAR
    copied: np.ndarray = moved.sum((0, 1)) == 1
    following, entry = np.array(moved[1:].any((0, 1))), moved.any(0).argmax(0)
    originals = np.array(
        [flat(source.checkpoint[role, layer].read()).reshape(-1) for layer in layers]
    )
    times = np.where(copied, value / originals[following.astype(int), entry], 1.0)
    along = np.array([place[axis] if len(place) > 1 else place[0] for place in places]) + 1
    means = (moved * originals[..., None, None]).sum((0, 1)) / moved.sum((0, 1)).clip(1)
    kinds = np.full(value.shape, "", object)
    kinds[np.abs(value - means) < NEAR] = "average"
    kinds[moved[0].all(0)] = "random"
    kinds[~moved.any((0, 1))] = "zero"
    kinds[~moved.any((0, 1)) & (value != 0)] = "one"
    known: set[int] = set()
    for spot in zip(*copied.nonzero(), strict=True):
        kinds[spot] = "following" if following[spot] else "copy" if entry[spot] in known else "old"
        known |= set() if following[spot] else {entry[spot]}
    for first in range(value.shape[1]):
        for second in range(first + 1, value.shape[1]):
            if (kinds[:, second] == "random").all() and (
                value[:, second] == -value[:, first]
            ).all():
                kinds[:, second] = "opposite"
    if "" in set(kinds.flat):
        raise RegraftError(
            f"entries of '{role}' come from {moved.sum((0, 1)).tolist()} others: give them a name"
        )
    return kinds, np.where(copied, along[entry], 0), times.round(9)


def flat(value: torch.Tensor) -> np.ndarray:
    """A matrix as it is, a vector as a column."""
    return (value if value.ndim == 2 else value.unsqueeze(1)).numpy().copy()


@cache
def on_units(how: str) -> tuple[Scene, ...]:
    """An operator on an axis of units: an MLP's."""
    return (scene("", UNITS, MLP, ffn=8 if how == "tile" else 6, how=f"ffn={how}"),)


@cache
def on_stream(how: str) -> tuple[Scene, ...]:
    """An operator on the residual stream, under both kinds of norms."""
    size = {"lemon": 9, "tile": 8, "duplicate": 8}.get(how, 6)
    return tuple(
        scene(name, config, roles, hidden=size, how=f"hidden={how}")
        for name, config, roles in (
            ("RMS norm", RMS, STREAM),
            ("LayerNorm", LAYER_NORM, STREAM_BIAS),
        )
    )


def same(one: Sequence[Scene], other: Sequence[Scene]) -> bool:
    """Whether two pictures would show the same."""
    pairs = [
        pair for a, b in zip(one, other, strict=True) for pair in zip(a.news, b.news, strict=True)
    ]
    return all(a.same(b) for a, b in pairs)


@dataclass(frozen=True)
class Slot:
    """A layer of a deeper model: the source layer whose maps it holds (None: random ones), and
    whether it is idle.
    """

    source: int | None
    idle: bool


@cache
def trace_layers(how: str) -> tuple[Slot, ...]:
    """The layers of six, grown to nine (twelve where the operator wants multiples), as their
    tensors tell it.
    """
    source = Source(RMS | {"num_hidden_layers": 6}).checkpoint
    number = 12 if how == "gstack" else 9
    grown = Deepen(number, how)(source)
    homes = {source.names["mlp.up.weight", layer]: layer for layer in range(source.layers)}
    slots = []
    for layer in range(number):
        maps, outputs = (
            grown.tensors[role, layer].provenance for role in ("mlp.up.weight", "mlp.down.weight")
        )
        slots.append(
            Slot(homes[maps.sources[0]] if maps.kind == "copied" else None, outputs.kind == "zero")
        )
    return tuple(slots)
