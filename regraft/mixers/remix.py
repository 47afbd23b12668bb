"""Remix: another token mixer in some layers, everything else unchanged."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.anatomy import Key, find_anatomy
from ..core.axes import Sizes, broadcast_axes, parse_signature
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.step import step_entry
from ..errors import RegraftError
from ..families.regraft import AUTO_MAP
from .base import Attention, WeightSpec
from .inherit import parse_inherit
from .initialize import create_initial_tensor
from .registry import validate, weights


@dataclass(frozen=True)
class Remix:
    """Replace softmax attention by `mixer` in all layers but those of `keep` (XATL, arXiv 2404.02684).

    `keep`: "every:4" keeps layers 0, 4, 8, ...; "0,7,14" these; "all"; "none". A linear mixer with `window` > 0 gets a
    gated branch of sliding-window attention with `sinks` first tokens always seen; window 0 leaves it alone. `seed` is
    of fresh weights, drawn per tensor name. `options` are the mixer's own (see its class), such as {"grouped": False}.
    `inherit`: which projections of the source's attention the linear mixer copies: "all", "none", or a list such as
    "v,o" (XATL copies "o"); the others begin anew (`mixers.inherit`). The window branch is the source's own.

    `gate`: logit of the share that the linear branch beside a window has at first (0: half).
    `scores`: how the layers of `keep` were chosen, when they were measured (`regraft.linearize.select_layers`); changes nothing here.

    Preserves: embeddings, norms, MLPs, head and kept layers bit for bit; with keep="all" the logits.
    Refuses: unknown mixers, layers beyond the last, a model that is already linearized.
    """

    mixer: str = "gated_deltanet"
    keep: str = "every:4"
    window: int = 64
    sinks: int = 4
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    inherit: str = "all"
    gate: float = -4.0
    scores: dict[str, Any] = field(default_factory=dict)

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The linearized checkpoint: `model_type: "regraft"`, the source's config as `host`."""
        config = self.build_config(source)
        anatomy = find_anatomy(config)
        tensors: dict[Key, LazyTensor] = {}
        names: dict[Key, str] = {}
        used: set[str] = set()
        for key, spot in anatomy.place(config).items():
            role, layer = key
            names[key] = spot.name
            if key in source.tensors:
                lazy = source.tensors[key]
                tensors[key] = LazyTensor(
                    lazy.shape, lazy.dtype, Provenance("copied", (source.names[key],)), lazy.read
                )
            else:
                assert layer is not None
                weight = weights(config["mixers"][layer], Attention(**config["attention"][layer]))[
                    role[6:]
                ]
                tensors[key] = self.build_weight(source, weight, layer, spot.name, spot.shape)
            used.update(tensors[key].story.sources)
        reason = f"mixer '{self.mixer}' does not use it" + f" with inherit '{self.inherit}'" * (
            self.inherit != "all"
        )
        unused = {name: reason for name in source.names.values() if name not in used}
        history = (*source.history, step_entry(self))
        dropped = source.dropped | unused
        return Checkpoint(
            source.origin,
            config,
            anatomy,
            source.sizes,
            tensors,
            names,
            source.folder,
            dropped,
            history,
        )

    def build_config(self, source: Checkpoint) -> dict[str, Any]:
        """config.json of the result."""
        if source.config["model_type"] == "regraft":
            raise RegraftError(
                f"'{source.origin}' is linearized already: run this on its source ({source.history[-1:]})"
            )
        check_supported(source)
        kept = self.kept_layers(source.layers)
        specs = [None if layer in kept else self.build_spec() for layer in range(source.layers)]
        attention = [
            source.anatomy.attention(source.config, layer) for layer in range(source.layers)
        ]
        special = {key: source.config[key] for key in SPECIAL if source.config.get(key) is not None}
        return {
            "model_type": "regraft",
            "architectures": ["RegraftForCausalLM"],
            "auto_map": AUTO_MAP,
            "dtype": source.config.get("dtype") or source.config.get("torch_dtype") or "float32",
            "host": source.config,
            "slot": source.anatomy.slot,
            "mixers": specs,
            "attention": [
                None if spec is None else shape
                for spec, shape in zip(specs, attention, strict=True)
            ],
            "tie_word_embeddings": source.anatomy.fill_defaults(source.config)[
                "tie_word_embeddings"
            ],
            **special,
        }

    def build_spec(self) -> dict[str, Any]:
        """The mixer spec of every converted layer."""
        if self.window < 0 or self.sinks < 0 or (self.mixer == "window" and self.window == 0):
            raise RegraftError(
                f"window {self.window} with {self.sinks} sinks sees nothing: use --window 64 --sinks 4"
            )
        if self.mixer == "gated":
            raise RegraftError(
                f"mixer 'gated' is what window {self.window} adds: name its linear mixer, such as supra"
            )
        window = {"name": "window", "window": self.window, "sinks": self.sinks}
        plain = window if self.mixer == "window" else {"name": self.mixer, **self.options}
        plain |= {"inherit": self.inherit} if self.inherit != "all" else {}
        validate(plain)
        gated = self.mixer != "window" and self.window > 0
        if gated and "o" not in parse_inherit(self.inherit):
            raise RegraftError(
                f"--inherit '{self.inherit}' leaves out o, which the window branch of {self.window} tokens shares: add "
                "o, or give --window 0"
            )
        if not gated:
            return plain
        start = {} if self.gate == Remix.gate else {"start": self.gate}
        return {"name": "gated", "linear": plain, "window": window} | start

    def kept_layers(self, layers: int) -> frozenset[int]:
        """The layers that keep softmax attention, out of `layers`."""
        word, _, number = self.keep.partition(":")
        if self.keep in ("all", "none"):
            return frozenset(range(layers) if self.keep == "all" else ())
        if word in RULES:
            raise RegraftError(
                f"--keep '{self.keep}' is measured on the weights: regraft linearize does that, and its lineage then "
                "says which layers; a plan needs every:N, a list, all or none"
            )
        try:
            if word == "every" and (every := int(number)) > 0:
                return frozenset(range(0, layers, every))
            chosen = [int(item) for item in self.keep.split(",")]
        except ValueError:
            raise RegraftError(
                f"--keep '{self.keep}' is not every:N, a list such as 0,7,14, all, none, or a rule to "
                f"measure by ({', '.join(RULES)}) and how many layers, such as {RULES[0]}:8"
            ) from None
        if beyond := [layer for layer in chosen if not 0 <= layer < layers]:
            raise RegraftError(
                f"--keep '{self.keep}' names layer {beyond[0]}: the last layer is {layers - 1}"
            )
        return frozenset(chosen)

    def build_weight(
        self, source: Checkpoint, weight: WeightSpec, layer: int, name: str, shape: tuple[int, ...]
    ) -> LazyTensor:
        """One weight of a mixer: inherited or fresh."""
        if weight.source is not None:
            return inherit_weight(source, weight, layer, shape)
        spec = weight.fresh or "zeros"
        seed = zlib.crc32(
            name.encode(), self.seed
        )  # within 32 bits: torch's generator ignores the others
        kind = "zero" if spec == "zeros" else "fresh"
        dtype = source.tensors["norm.final.weight", None].dtype
        read = _init_reader(spec, shape, seed, dtype)
        return LazyTensor(shape, dtype, Provenance(kind, (), spec), read)


def check_supported(source: Checkpoint) -> None:
    """RegraftError for models whose attention the mixers do not carry over."""
    anatomy = source.anatomy
    if not anatomy.causal:
        raise RegraftError(
            f"{anatomy.family} reads in both directions, linear mixers read from left to right: give a decoder"
        )
    for spot in anatomy.place(source.config).values():
        text = spot.part.axes.text
        if spot.part.norm and "hidden" not in text and text not in ("gain dim",):
            raise RegraftError(
                f"{anatomy.family} norms queries and keys by '{text}', which mixers do not carry over yet: linearize a "
                "family with plain RMS norms per head, or none"
            )


RULES = (
    "bypass",
    "halo",
    "recall",
    "restore",
)  # ways to choose layers by measurement, see `regraft.choosing`
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def inherit_weight(
    source: Checkpoint, weight: WeightSpec, layer: int, shape: tuple[int, ...]
) -> LazyTensor:
    """A weight of the source with the axes it lacks broadcast on the output side (`group`: per head)."""
    assert weight.source is not None
    lazy = source[weight.source, layer]
    have, want = source.signature(weight.source), parse_signature(weight.signature)
    if have.kind != want.kind or _drop_unit_axes(have.inputs, source.sizes) != _drop_unit_axes(
        want.inputs, source.sizes
    ):
        raise RegraftError(
            f"cannot inherit '{weight.signature}' from '{have.text}' ({weight.source}): inputs differ"
        )
    names = lazy.story.sources
    if lazy.shape == shape:
        return LazyTensor(
            shape, lazy.dtype, Provenance("copied", names, lazy.story.note), lazy.read
        )
    (mine,), (theirs,) = have.outputs, want.outputs
    read = _broadcast_reader(lazy.read, mine, theirs, source.sizes)
    return LazyTensor(
        shape,
        lazy.dtype,
        Provenance("broadcast", names, f"'{weight.signature}' from '{have.text}'"),
        read,
    )


def _drop_unit_axes(axes: tuple[str, ...], sizes: Sizes) -> tuple[str, ...]:
    return tuple(axis for axis in axes if sizes[axis] > 1)


def _broadcast_reader(
    read: Callable[[], Tensor], have: tuple[str, ...], want: tuple[str, ...], sizes: Sizes
) -> Callable[[], Tensor]:
    return lambda: broadcast_axes(read(), have, want, sizes)


def _init_reader(
    spec: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> Callable[[], Tensor]:
    return lambda: create_initial_tensor(spec, shape, torch.Generator().manual_seed(seed)).to(dtype)
