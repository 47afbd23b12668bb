"""Layers that start as the identity: what each of their tensors holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..core.anatomy import Key, Part, PlacedPart
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.shapes import Float
from .tensor import SeededRandom, estimate_std


class IdentityLayer:
    """How a layer of a family starts as the identity.

    Its output maps are zero; or the gains of the norms behind its branches are (Gemma 2, L10 in
    docs/concepts/expansions.md); or, where norms come after the sum (BERT, L9), it takes over the
    last norm of the layer before, which becomes neutral.

    Args:
        source: the checkpoint that gets such layers.
        placed: every parameter of the source.
        stack: the axis that counts the layers of the stack that gets them.
    """

    # Whether norms come after the sum.
    post_norm: bool
    # Roles of the gains that are zero.
    zero_gains: set[str]
    # Roles of norms after the sum.
    post_norms: set[str]
    # Start of the roles of a layer's last norm after the sum, such as "norm.mlp_post."; "" without.
    last_norm: str
    # Roles of maps and biases that write the stream.
    outputs: set[str]
    # What each role writes.
    writes: dict[str, str]
    # Roles of numbers that multiply the whole stream.
    factors: set[str]

    def __init__(self, source: Checkpoint, placed: Mapping[Key, PlacedPart], stack: str = "depth"):
        self.source, self.placed = source, placed
        parts = {
            role: one.part
            for (role, layer), one in placed.items()
            if layer is not None and one.part.stack == stack
        }

        # Norms that write the stream come after the sum in LayerNorm families, which have biases,
        # and behind the branches in families with root-mean-square norms.
        norms = {role for role, part in parts.items() if part.norm and part.writes == "stream"}
        self.post_norm = any(parts[role].subtracts_mean for role in norms)
        behind = {role for role in norms if parts[role].reads == "branch"}
        self.zero_gains = set() if self.post_norm else behind
        self.post_norms = norms if self.post_norm else set()

        in_order = [role.rpartition(".")[0] for role in parts if role in self.post_norms]
        self.last_norm = f"{in_order[-1]}." if in_order else ""
        self.writes = {role: part.writes for role, part in parts.items()}
        self.outputs = {role for role, part in parts.items() if _writes_hidden(part)}
        self.factors = {role for role, part in parts.items() if _multiplies_stream(part)}

    def silences(self, role: str) -> bool:
        """Whether a tensor of such a layer is zero."""
        # In some models only some branches have a norm behind them.
        adds = role in self.outputs and self.writes.get(role) == "stream"
        return role in self.zero_gains or (role in self.outputs and not self.zero_gains) or adds

    def is_last_norm(self, role: str) -> bool:
        """Whether a role belongs to a layer's last norm after the sum."""
        return role in self.post_norms and role.startswith(self.last_norm)

    def build_tensor(
        self, key: Key, lazy: LazyTensor, how: str, random: Callable[[], SeededRandom]
    ) -> LazyTensor:
        """A tensor of a layer that starts as the identity.

        Args:
            key: role and layer of the source's tensor that stands in the same place.
            lazy: that tensor.
            how: the depth operator; `llama_pro` copies what need not be zero, others draw it.
            random: of random entries.
        """
        role, part = key[0], self.placed[key].part

        # Moments of a layer that did not exist are zero; second moments keep the copied layer's
        # size, so that the first steps are not too long.
        if self.source.holds != "weights":
            keeps = self.source.holds == "exp_avg_sq" or self.is_last_norm(role)
            return lazy if keeps else constant_tensor(lazy, 0.0)

        if role in self.factors:
            return constant_tensor(lazy, 1.0)
        # A gain of zero silences the branch and lets its maps learn at once (L10).
        if role in self.zero_gains:
            return constant_tensor(lazy, -1.0 if part.axes.unit else 0.0)
        if self.is_last_norm(role):
            provenance = Provenance(
                "copied", lazy.provenance.sources, "taken over from the norm before"
            )
            return replace(lazy, provenance=provenance)
        if role in self.post_norms:
            return self.neutral_norm(key, lazy)

        # Without such a norm the output maps are zero; the maps before them keep live entries.
        if self.silences(role):
            return constant_tensor(lazy, 0.0)
        if how == "llama_pro":
            return randomize_zero_rows(lazy, random)
        return random_tensor(lazy, part, random)

    def neutral_norm(self, key: Key, lazy: LazyTensor) -> LazyTensor:
        """A norm without an affine map of its own: gain one, bias zero; its moments are zero."""
        axes = self.placed[key].part.axes
        one = axes.kind == "gain" and not axes.unit and self.source.holds == "weights"
        return constant_tensor(lazy, 1.0 if one else 0.0)


def _writes_hidden(part: Part) -> bool:
    is_output = not part.norm and part.axes.kind in ("map", "bias")
    return is_output and any("hidden" in output for output in part.axes.outputs)


def _multiplies_stream(part: Part) -> bool:
    is_number = part.axes.kind in ("plain", "scale") and not part.norm
    return is_number and part.reads == part.writes == "stream"


def constant_tensor(lazy: LazyTensor, value: float) -> LazyTensor:
    """A tensor of one number."""
    # A gain of zero may be stored as minus one.
    provenance = Provenance("zero" if value in (0.0, -1.0) else "fresh", (), f"all {value:g}")
    return replace(
        lazy, provenance=provenance, read=lambda: torch.full(lazy.shape, value, dtype=lazy.dtype)
    )


def random_tensor(lazy: LazyTensor, part: Part, random: Callable[[], SeededRandom]) -> LazyTensor:
    """Random numbers for maps, neutral ones for gains and biases; scales stay.

    Args:
        lazy: the same tensor of the layer below, whose standard deviation the numbers have.
        part: what it is.
        random: makes their source anew, so that every reading gives the same.
    """
    kind = part.axes.kind
    if kind == "bias" or part.norm:
        return constant_tensor(lazy, 0.0 if kind == "bias" or part.axes.unit else 1.0)
    if kind == "scale":
        return lazy

    def draw() -> Float[Tensor, "*shape"]:
        return random().uniform(lazy.shape, estimate_std(lazy.read()), lazy.dtype)

    provenance = Provenance("fresh", (), "uniform, as spread out as the layer below")
    return replace(lazy, provenance=provenance, read=draw)


def randomize_zero_rows(lazy: LazyTensor, random: Callable[[], SeededRandom]) -> LazyTensor:
    """A copy of a matrix whose all-zero rows hold random numbers: behind a zero gain they would
    never learn.
    """
    if len(lazy.shape) != 2:
        return lazy

    def compute() -> Float[Tensor, "outputs inputs"]:
        value = lazy.read()
        silent = (value == 0).all(1)  # (outputs,)
        if bool(silent.any()):
            value = value.clone()
            shape = (int(silent.sum()), value.shape[1])
            value[silent] = random().uniform(shape, estimate_std(value), value.dtype)
        return value

    return replace(lazy, read=compute)
