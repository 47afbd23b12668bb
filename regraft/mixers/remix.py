"""Remix: another token mixer in some layers, everything else unchanged."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.anatomy import Key, PlacedPart, find_anatomy
from ..core.attention import has_softmax
from ..core.auto_map import find_architecture, find_auto_map
from ..core.axes import Sizes, broadcast_axes, parse_signature
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.step import step_entry
from ..errors import RegraftError
from ..families.regraft import join_host
from .attention import QK_NORM_FORMS, Attention
from .inherit import parse_inherit
from .initialize import create_initial_tensor
from .older_names import first_name
from .registry import begins_with_bos, mixer_class, mixers, validate, weights
from .remix_options import RemixOptions
from .source_windows import chunked_layers, source_windows
from .weight_spec import WeightSpec

# Of queries and keys, or of what they are made of.
NORMS = (*QK_NORM_FORMS, "gain kv dim", "gain latent", "gain query_latent")


@dataclass(frozen=True)
class Remix(RemixOptions):
    """Replace softmax attention by a mixer in all layers but some (XATL, arXiv 2404.02684).

    Preserves: embeddings, norms, MLPs, head and kept layers bit for bit; with keep="all" the
    logits.

    Refuses: unknown mixers, layers beyond the last, a model that is already linearized.
    """

    @classmethod
    def from_options(cls, options: RemixOptions, **changes: Any) -> Remix:
        """The step with the fields of `options`, apart from `changes`."""
        names = [one.name for one in dataclasses.fields(RemixOptions)]
        return cls(**{name: getattr(options, name) for name in names} | changes)

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The linearized checkpoint: `model_type: "regraft"`, beside the source's config."""
        config = self.build_config(source)
        anatomy = find_anatomy(config)
        step = step_entry(self)
        if notes := self.list_notes(source, config):
            step["notes"] = notes
        tensors: dict[Key, LazyTensor] = {}
        names: dict[Key, str] = {}
        used: set[str] = set()
        for key, placed in anatomy.place(config).items():
            names[key] = placed.name
            tensors[key] = self.build_tensor(source, config, key, placed)
            used.update(tensors[key].provenance.sources)

        # What no tensor was made from is listed with the reason, so that nothing is lost unseen.
        reason = f"mixer '{self.mixer}' does not use it"
        if self.inherit != "all":
            reason += f" with inherit '{self.inherit}'"
        unused = {name: reason for name in source.names.values() if name not in used}
        return Checkpoint(
            source.origin,
            config,
            anatomy,
            source.sizes,
            tensors,
            names,
            source.folder,
            source.dropped | unused,
            (*source.history, step),
            allow_nonfinite=source.allow_nonfinite,
            copy_code=source.copy_code,
        )

    def build_tensor(
        self, source: Checkpoint, config: dict[str, Any], key: Key, placed: PlacedPart
    ) -> LazyTensor:
        """One tensor of the result: the source's own, or a mixer's."""
        if key in source.tensors:
            lazy = source.tensors[key]
            provenance = Provenance("copied", (source.names[key],))
            return LazyTensor(lazy.shape, lazy.dtype, provenance, lazy.read)

        role, layer = key
        assert layer is not None
        table = weights(config["mixers"][layer], Attention(**config["attention"][layer]))
        weight = table[role.removeprefix("mixer.")]
        return self.build_weight(source, weight, layer, placed.name, placed.shape)

    def build_config(self, source: Checkpoint) -> dict[str, Any]:
        """config.json of the result."""
        if source.config["model_type"] == "regraft":
            raise RegraftError(
                f"'{source.origin}' is linearized already: run this on its source "
                f"({source.history[-1:]})"
            )
        check_supported(source)

        kept = self.kept_layers(source.layers) | {
            layer
            for layer in range(source.layers)
            if not has_softmax(source.anatomy, source.config, layer)
        }
        kept |= {*chunked_layers(source.config)}
        eps = source.anatomy.epsilon(source.config)
        specs = [
            None if layer in kept else name_eps(self.build_spec(window), eps)
            for layer, window in enumerate(source_windows(source.config, states=True))
        ]
        shapes = [source.anatomy.attention(source.config, layer) for layer in range(source.layers)]
        attention = [
            None if spec is None else shape for spec, shape in zip(specs, shapes, strict=True)
        ]
        own = {
            "model_type": "regraft",
            "architectures": [find_architecture(source.config)],
            "auto_map": find_auto_map(source.config),
            "slot": source.anatomy.slot,
            "mixers": specs,
            "attention": attention,
        }
        full = source.anatomy.fill_defaults(source.config)
        return {
            **join_host(own, source.config),
            "dtype": source.config.get("dtype") or source.config.get("torch_dtype") or "float32",
            "tie_word_embeddings": full["tie_word_embeddings"],
        }

    def build_spec(self, source_window: int | None = None) -> dict[str, Any]:
        """The mixer spec of a converted layer.

        Args:
            source_window: tokens that the source's attention sees there; None for all.
        """
        if self.mixer == "gated":
            raise RegraftError(
                f"mixer 'gated' is what window {self.window} adds: name its linear mixer, such as "
                "supra"
            )
        kind = mixer_class(self.mixer)
        if self.window < 0 or self.sinks < 0 or (kind.is_window and self.window == 0):
            raise RegraftError(
                f"window {self.window} with {self.sinks} sinks sees nothing: use --window 64 "
                "--sinks 4"
            )

        window: dict[str, Any] = {"name": "window", "window": self.window, "sinks": self.sinks}
        if source_window is not None and source_window <= self.window:
            # Nothing is seen that the source does not see: its first tokens least of all.
            window |= {"window": source_window, "sinks": 0}
        plain: dict[str, Any] = {"name": self.mixer}
        if kind.is_window:
            own = {field.name for field in dataclasses.fields(kind.Options)}
            plain |= {key: value for key, value in window.items() if key in own}
        plain |= self.options
        width = getattr(kind.parse(plain), "window", None)
        if source_window is not None and isinstance(width, int) and width > source_window:
            plain |= {"window": source_window}
        plain |= {"inherit": self.inherit} if self.inherit != "all" else {}
        validate(plain)
        if kind.is_window or self.window == 0:
            return plain

        # The branches share one output projection, so it must be the source's.
        if "o" not in parse_inherit(self.inherit):
            raise RegraftError(
                f"--inherit '{self.inherit}' leaves out o, which the window branch of "
                f"{self.window} tokens shares: add o, or give --window 0"
            )
        # The default start is left out, as it was before there was an option for it.
        start = {} if self.gate == Remix.gate else {"start": self.gate}
        past = {"past_window": True} if self.past_window else {}
        return {"name": "gated", "linear": plain, "window": window} | start | past

    def list_notes(self, source: Checkpoint, config: Mapping[str, Any]) -> list[str]:
        """What a user should know of the conversion beyond its weights.

        Args:
            source: the model that is linearized.
            config: of the result.
        """
        notes, windows = [], source_windows(source.config, states=True)
        if beside := sum(role.startswith("carried.") for role, _ in source.tensors):
            notes.append(
                f"the language model alone changes: {beside} tensors beside it are carried as they"
                " are, in training on text too"
            )
        replaced = [layer for layer, spec in enumerate(config["mixers"]) if spec]
        eps = source.anatomy.epsilon(source.config)
        asked = name_eps(self.build_spec(), eps) if replaced else None
        if narrow := [layer for layer in replaced if config["mixers"][layer] != asked]:
            notes.append(
                f"{len(narrow)} replaced layers slide in the source, so their windows see"
                f" {windows[narrow[0]]} tokens and no sinks, as the source's attention does"
            )

        capped = [i for i in replaced if config["attention"][i].get("softcap")]
        if replaced and not mixer_class(self.mixer).takes_alibi:
            if config["attention"][replaced[0]].get("alibi") is not None:
                notes.append(
                    f"{self.mixer} keeps the decays that it was published with and drops the"
                    " source's ALiBi; lightning, supra and hedgehog have it as their decay"
                )
        sinks = [i for i in replaced if config["attention"][i].get("sinks")]
        if sinks and not mixer_class(self.mixer).is_window:
            notes.append(
                f"linear attention has no softmax, so {self.mixer} drops the source's learned"
                " sinks; softmax within a window keeps them"
            )
        if chunked := chunked_layers(source.config):
            notes.append(
                f"{len(chunked)} layers attend within chunks, anew in each, and stay as they are"
            )
        if replaced and (tokens := tokens_without_factor(source)):
            notes.append(
                "mixers leave out the factor on queries, which is 1 for the first"
                f" {tokens} tokens of a text"
            )
        if capped and not mixer_class(self.mixer).is_window:
            cap = config["attention"][capped[0]]["softcap"]
            notes.append(
                f"linear attention has no scores, so {self.mixer} drops the source's cap on them"
                f" ({cap:g}); softmax within a window keeps it"
            )
        return notes

    def build_weight(
        self, source: Checkpoint, weight: WeightSpec, layer: int, name: str, shape: tuple[int, ...]
    ) -> LazyTensor:
        """One weight of a mixer, inherited or new."""
        if weight.source is not None:
            return inherit_weight(source, weight, layer, shape)

        # By name, so that a tensor does not depend on which others there are. 32 bits: torch's
        # generator ignores the others.
        seed = zlib.crc32(first_name(name).encode(), self.seed)
        spec = weight.fresh or "zeros"
        kind = "zero" if spec == "zeros" else "fresh"
        dtype = source.tensors["embed.weight", None].dtype
        read = _init_reader(spec, shape, seed, dtype)
        return LazyTensor(shape, dtype, Provenance(kind, (), spec), read)


def tokens_without_factor(source: Checkpoint) -> int | None:
    """The first tokens of a text whose queries have a factor of 1; None where all have.

    Ministral 3 changes it at multiples of a length, Llama 4 a token earlier.
    """
    full = source.anatomy.fill_defaults(source.config)
    rope = full.get("rope_parameters") or {}
    if rope.get("llama_4_scaling_beta"):
        return rope.get("original_max_position_embeddings")
    scale = full.get("attn_temperature_tuning") and full.get("floor_scale")
    return int(scale) - 1 if scale else None


def needs_bos(checkpoint: Checkpoint) -> bool:
    """Whether a model is made for texts that begin with the BOS token: linearized or exported, it
    has the mixer of its last linearization.
    """
    made = [step for step in checkpoint.history if step.get("step") == Remix.__name__]
    specs = [{"name": step.get("arguments", {}).get("mixer")} for step in made[-1:]]
    known = [spec for spec in specs if spec["name"] in mixers()]
    return begins_with_bos([*(checkpoint.config.get("mixers") or ()), *known])


def name_eps(spec: dict[str, Any], eps: float) -> dict[str, Any]:
    """A mixer spec with the epsilon of the source's norms where it says "source"."""
    linear = spec.get("linear")
    if isinstance(linear, dict):
        return spec | {"linear": name_eps(linear, eps)}
    return spec | {"eps": eps} if spec.get("eps") == "source" else spec


def check_supported(source: Checkpoint) -> None:
    """Raise RegraftError for models whose attention the mixers cannot replace."""
    anatomy = source.anatomy
    if anatomy.inputs in ("token pairs", "audio"):
        raise RegraftError(
            f"{anatomy.family} has an encoder and a decoder, which grow but are not linearized "
            "yet: give a decoder"
        )
    if not anatomy.causal:
        raise RegraftError(
            f"{anatomy.family} reads in both directions, linear mixers read from left to right: "
            "give a decoder"
        )
    if not anatomy.continues_text(source.config):
        raise RegraftError(
            f"'{source.origin}' is a {source.config['architectures'][0]} without the head of a "
            "language model, which mixers are made for: give a decoder with one"
        )

    if why := anatomy.closed.get("attention"):
        raise RegraftError(
            f"the attention of {anatomy.family}, which has no table, cannot be linearized by the "
            f"inferred one: {why}"
        )
    if anatomy.keeps_softmax:
        raise RegraftError(
            f"{anatomy.family} {anatomy.keeps_softmax}: mixers do not carry that over yet, give"
            " another decoder"
        )

    slot = anatomy.slot.partition("{}")[2]
    for (_, layer), placed in anatomy.place(source.config).items():
        part, text = placed.part, placed.part.axes.text
        if layer is None or not has_softmax(anatomy, source.config, layer):
            continue
        # A norm over another axis than hidden is one of queries and keys.
        in_slot = f"{slot}." in part.name
        # Those that subtract a mean are known over each head alone.
        is_known = text in ("gain dim", "-> dim") if part.subtracts_mean else text in NORMS
        if in_slot and part.norm and "hidden" not in text and not is_known:
            raise RegraftError(
                f"{anatomy.family} norms queries and keys by '{text}'"
                + (", less the mean" if part.subtracts_mean else "")
                + ", which mixers do not carry over yet: linearize a family with root-mean-square"
                " norms, or none"
            )


def inherit_weight(
    source: Checkpoint, weight: WeightSpec, layer: int, shape: tuple[int, ...]
) -> LazyTensor:
    """A weight of the source, its outputs broadcast over axes it lacks (`group`: per head).

    Raises RegraftError when its inputs are others than the mixer's.
    """
    assert weight.source is not None
    lazy = source[weight.source, layer]
    have, want = source.signature(weight.source), parse_signature(weight.signature)
    # An axis of size 1 makes no difference: a model without groups has none in its signature.
    have_inputs = _drop_unit_axes(have.inputs, source.sizes)
    want_inputs = _drop_unit_axes(want.inputs, source.sizes)
    if have.kind != want.kind or have_inputs != want_inputs:
        raise RegraftError(
            f"cannot inherit '{weight.signature}' from '{have.text}' ({weight.source}): inputs "
            "differ"
        )

    names = lazy.provenance.sources
    if lazy.shape == shape:
        provenance = Provenance("copied", names, lazy.provenance.note)
        return LazyTensor(shape, lazy.dtype, provenance, lazy.read)

    (have_outputs,), (want_outputs,) = have.outputs, want.outputs
    read = _broadcast_reader(lazy.read, have_outputs, want_outputs, source.sizes)
    provenance = Provenance("broadcast", names, f"'{weight.signature}' from '{have.text}'")
    return LazyTensor(shape, lazy.dtype, provenance, read)


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
