"""One parameter of a family: its name, its signature, and the streams it stands between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .axes import TABLES, Signature, parse_signature

Config = Mapping[str, Any]
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Part:
    """One parameter: its name in the model's state dict ("{}" is the layer, "{e}" the expert, "{p}"
    the family's prefix), signature and storage order.

    `fused` names the roles that are packed into it, in order. It exists only `when` / `unless` a
    config key is true. `reads`, `writes`: between which streams of hidden size it stands. "stream"
    runs through the whole stack, "normed" is a norm's output, "branch" ends in a norm before it is
    added, "head" feeds the output embedding, "own" belongs to this part alone. Maps read "normed"
    and write "stream" unless they say otherwise, norms write "normed". `norm`: a gain or bias of a
    norm. `scaled`: the role of the factors that its output is multiplied by. `at`: the positions of
    a row that it is applied to: each, the first (heads over a whole row), every patch, or those
    routed to the expert.
    """

    name: str
    signature: str
    stored: str = "out in"
    fused: tuple[str, ...] = ()
    when: str | None = None
    unless: str | None = None
    reads: str = "normed"
    writes: str = "stream"
    norm: bool = False
    scaled: str | None = None
    at: Literal["each", "first", "patch", "routed"] = "each"

    @property
    def axes(self) -> Signature:
        """The parsed signature."""
        return parse_signature(self.signature)

    @property
    def is_matrix(self) -> bool:
        """Whether positions are multiplied by it as a matrix: maps that are no tables, and patch
        convolutions.
        """
        axes = self.axes
        return self.at == "patch" or (axes.kind == "map" and not TABLES.issuperset(axes.inputs))

    def is_present(self, config: Config) -> bool:
        """Whether a model of this config has the parameter."""
        return (self.when is None or bool(config[self.when])) and (
            self.unless is None or not config[self.unless]
        )


@dataclass(frozen=True)
class PlacedPart:
    """A part of one model: its layer is filled in and its shape is known."""

    name: str
    part: Part
    shape: tuple[int, ...]


def linear(
    role: str,
    name: str,
    axes: str,
    *,
    bias: bool | str = False,
    stored: str = "out in",
    fused: tuple[str, ...] = (),
    **streams: Any,
) -> dict[str, Part]:
    """A weight and, if `bias` (a config key: only when it is true), a bias; `role` and `name`
    without their ending.

    `streams`: further fields of both parts.
    """
    table = {f"{role}.weight": Part(f"{name}.weight", axes, stored, fused, **streams)}
    if bias:
        fields = streams | ({"when": bias} if isinstance(bias, str) else {})
        table[f"{role}.bias"] = Part(
            f"{name}.bias", f"->{axes.partition('->')[2]}", stored, fused, **fields
        )
    return table


def norm(
    role: str,
    name: str,
    axis: str = "hidden",
    *,
    bias: bool = False,
    unit: bool = False,
    **streams: Any,
) -> dict[str, Part]:
    """A norm's gain over `axis` (`unit`: stored minus one) and, for a layer norm, its bias."""
    fields: dict[str, Any] = {"reads": "stream", "writes": "normed", "norm": True} | streams
    table = {
        f"{role}.weight": Part(f"{name}.weight", f"{'1+gain' if unit else 'gain'} {axis}", **fields)
    }
    return table | ({f"{role}.bias": Part(f"{name}.bias", f"-> {axis}", **fields)} if bias else {})
