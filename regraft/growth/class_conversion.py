"""Class bridges: a checkpoint written as another family, which computes the same and ties fewer
sizes together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.anatomy import Config, Key, PlacedPart, find_anatomy
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.lineage import versions
from ..core.shapes import Float, Int
from ..errors import RegraftError
from . import rotary
from .tensor import compute_dtype

WIDEN_HINT = "widen it as it is, hidden together with the heads"
RotaryConversion = tuple[dict[str, Any], Int[Tensor, " dim"] | None]


@dataclass(frozen=True)
class ClassConversion:
    """How checkpoints of one family are written as another, which has its parts under the same
    roles.
    """

    # What the source's config must say, in words.
    when: str
    # Target key -> (source key, what the source's class takes when it is missing).
    keys: Mapping[str, tuple[str, Any]]
    # Target keys that have one value.
    sets: Mapping[str, Any]
    # Source keys that the target does not have.
    drops: tuple[str, ...]
    # Map -> norm whose gain and bias it takes over, because the target has one norm for several
    # maps.
    folds: Mapping[str, str] = field(default_factory=dict)
    # From the source's config and head_dim: the target's rotary keys, and for each coordinate of a
    # head which one of the source it is (None: the same).
    rotary: Callable[[Config, int], RotaryConversion] = lambda config, dim: ({}, None)


def parse_partial_rotary(config: Config, dim: int) -> tuple[dict[str, Any], int]:
    """(rotary parameters, coordinates of a head that turn) of a GPT-NeoX config.

    Missing keys are filled as its class does. An odd number of coordinates turns together with one
    more, at the odd number's frequencies.

    Args:
        config: the source's config.
        dim: coordinates of a head.
    """
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope["rope_type"] = rotary.rotary_type(rope)
    rope.pop("type", None)
    rope.setdefault("rope_theta", config.get("rotary_emb_base", 10000.0))
    rope.setdefault("partial_rotary_factor", config.get("rotary_pct", 0.25))
    return rope, int(dim * rope["partial_rotary_factor"])


def convert_partial_rotary(config: Config, dim: int) -> RotaryConversion:
    """GPT-NeoX's rotary positions for a class that turns the first coordinates too, but only an
    even number (Phi).
    """
    rope, count = parse_partial_rotary(config, dim)
    if count % 2:
        # Frequencies are theta ** (-2i / count): with one more coordinate theta makes up for it.
        _check_rotary_type(rope, f"{count} of {dim} coordinates, an odd number,")
        rope["rope_theta"] = rotary.compute_theta_power(rope["rope_theta"], (count + 1) / count)
        rope["partial_rotary_factor"] = rotary.compute_partial_factor(count + 1, dim)
    return {"rope_parameters": rope, "partial_rotary_factor": rope["partial_rotary_factor"]}, None


def convert_full_rotary(config: Config, dim: int) -> RotaryConversion:
    """GPT-NeoX's rotary positions for a class that turns coordinate i with i + dim / 2: pairs that
    do not turn get frequency zero, and coordinates move to where their partner is expected
    (StarCoder2).

    RegraftError for odd heads and for rotary types that cannot turn a part of a head.
    """
    rope, count = parse_partial_rotary(config, dim)

    # Every pair turns already: the rotary settings carry over as they are.
    if count == dim and dim % 2 == 0:
        del rope["partial_rotary_factor"]
        return {"rope_parameters": rope}, None
    _check_rotary_type(rope, f"{count} of {dim} coordinates")
    if dim % 2:
        raise RegraftError(
            f"starcoder2 turns all coordinates of a head in pairs, and head_dim {dim} is odd:"
            f" {WIDEN_HINT}"
        )

    # Type "proportional" turns the first pairs of a head and leaves the others still. Theta is
    # raised so that their frequencies, theta ** (-2i / dim) of the whole head, stay those of the
    # turning part.
    half, pairs = dim // 2, -(-count // 2)
    theta = rotary.compute_theta_power(rope["rope_theta"], dim / max(count, 1), WIDEN_HINT)
    factor = rotary.compute_partial_factor(2 * pairs, dim)
    parameters = {
        "rope_type": "proportional",
        "rope_theta": theta,
        "partial_rotary_factor": factor,
    }
    if rope["rope_type"] == "linear":
        parameters["factor"] = rope["factor"]

    # The source pairs coordinate i with i + pairs, the target i with i + half: second halves of the
    # turning pairs move behind the first half of the head.
    old = torch.arange(dim)
    order = torch.cat(
        [old[:pairs], old[2 * pairs : half + pairs], old[pairs : 2 * pairs], old[half + pairs :]]
    )
    return {"rope_parameters": parameters, "partial_rotary_factor": factor}, order


def _check_rotary_type(rope: Mapping[str, Any], what: str) -> None:
    if rope["rope_type"] not in ("default", "linear"):
        raise RegraftError(
            f"rotary type '{rope['rope_type']}' over {what} has no counterpart in the target, only"
            f" default and linear have: {WIDEN_HINT}"
        )


# What the classes take for keys that a config lacks. The target's class may take something else, so
# every key is written.
SHARED_DEFAULTS = {
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
NEOX_DEFAULTS = {key: value for key, value in SHARED_DEFAULTS.items() if key != "rms_norm_eps"} | {
    "hidden_act": "gelu",
    "bos_token_id": 0,
}
NEOX_KEYS = {key: (key, value) for key, value in NEOX_DEFAULTS.items()}
NEOX_DROPS = (
    "use_parallel_residual",
    "attention_bias",
    "classifier_dropout",
    "hidden_dropout",
    "is_decoder",
    # What `ClassConversion.rotary` says in other words.
    "rotary_emb_base",
    "rotary_pct",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
DROPOUT, EPSILON = ("hidden_dropout", 0.0), ("layer_norm_eps", 1e-5)

CONVERSIONS: dict[tuple[str, str], ClassConversion] = {
    ("llama", "mistral"): ClassConversion(
        when="no attention_bias and no mlp_bias",
        keys={key: (key, value) for key, value in SHARED_DEFAULTS.items()},
        sets={"sliding_window": None},
        # Auto would read a mistral with kinds of layers as another class.
        drops=("attention_bias", "mlp_bias", "pretraining_tp", "layer_types"),
    ),
    ("gpt_neox", "phi"): ClassConversion(
        when="use_parallel_residual true",
        keys=NEOX_KEYS | {"layer_norm_eps": EPSILON, "resid_pdrop": DROPOUT, "embd_pdrop": DROPOUT},
        sets={"qk_layernorm": False},
        drops=NEOX_DROPS,
        folds={
            "attn.q": "norm.attn",
            "attn.k": "norm.attn",
            "attn.v": "norm.attn",
            "mlp.up": "norm.mlp",
        },
        rotary=convert_partial_rotary,
    ),
    ("gpt_neox", "starcoder2"): ClassConversion(
        when="use_parallel_residual false",
        keys=NEOX_KEYS
        | {
            "norm_epsilon": EPSILON,
            "residual_dropout": DROPOUT,
            "embedding_dropout": DROPOUT,
        },
        sets={"use_bias": True, "sliding_window": None},
        drops=(*NEOX_DROPS, "layer_norm_eps"),
        rotary=convert_full_rotary,
    ),
}
CLASSES = {
    "mistral": "MistralForCausalLM",
    "phi": "PhiForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}


def find_target_family(source: Checkpoint, to: str | None) -> str:
    """The family to write a checkpoint as.

    RegraftError when its config has no bridge, or none to `to`; the message lists all bridges.

    Args:
        source: the checkpoint.
        to: a family; None: the one that the source's table names.
    """
    anatomy = source.anatomy
    if anatomy.causal and "head.weight" not in anatomy.parts:
        raise RegraftError(
            f"no bridge for {source.config['architectures'][0]}: only models with the head of a "
            "language model are written as another class"
        )
    name = anatomy.bridge(anatomy.fill_defaults(source.config))
    if name is not None and (anatomy.family, name) in CONVERSIONS and to in (None, name):
        return name
    known = "; ".join(
        f"{old} to {new} ({conversion.when})" for (old, new), conversion in CONVERSIONS.items()
    )
    wanted = f" to {to}" if to else ""
    hint = f"use --bridge {name}" if name else WIDEN_HINT
    raise RegraftError(f"this {anatomy.family} has no bridge{wanted}: {hint}. Bridges are {known}")


def convert_to_family(source: Checkpoint, to: str) -> Checkpoint:
    """The checkpoint as one of family `to`, which `find_target_family` allows.

    RegraftError when the tables of the two families do not fit each other.
    """
    conversion = CONVERSIONS[source.anatomy.family, to]
    rotary_keys, order = conversion.rotary(source.config, source.sizes["dim"])
    config = _build_config(source, to, conversion) | rotary_keys
    anatomy = find_anatomy(config)
    targets = anatomy.place(config)
    if (sizes := anatomy.solve(config)) != source.sizes:
        raise RegraftError(f"{to} config gives axes {sizes}, not {source.sizes}: mend its table")

    # Each tensor is computed when it is read. What no target tensor takes from would be lost.
    tensors = {
        key: _convert_tensor(source, conversion, key, target, order)
        for key, target in targets.items()
    }
    used = {name for lazy in tensors.values() for name in lazy.provenance.sources}
    if lost := sorted(set(source.names.values()) - used):
        raise RegraftError(
            f"'{lost[0]}' has no place in {to}: add its role to regraft/growth/class_conversion.py"
        )
    names = {key: target.name for key, target in targets.items()}
    return replace(
        source, config=config, anatomy=anatomy, sizes=sizes, tensors=tensors, names=names
    )


def _build_config(source: Checkpoint, to: str, conversion: ClassConversion) -> dict[str, Any]:
    """The target's config, rotary keys aside: nothing that the two classes fill in differently is
    left out.
    """
    # The target's embedding takes the padding token as a row, the source's may be given any number.
    config, vocab = source.config, source.sizes["vocab"]
    pad = config.get("pad_token_id")
    if pad is not None and not -vocab <= pad < vocab:
        raise RegraftError(
            f"{to} wants pad_token_id below vocab_size {vocab}, got {pad}: set it to null in"
            " config.json"
        )

    # Later tables win: what the classes say differently, then what only the target's class needs.
    shared = {key: value for key, value in config.items() if key not in conversion.drops}
    sizes = find_anatomy({"model_type": to}).config_keys(source.sizes)
    renamed = {key: config.get(old, default) for key, (old, default) in conversion.keys.items()}
    target_class = {
        "model_type": to,
        "architectures": [CLASSES[to]],
        "transformers_version": versions()["transformers"],
    }
    return shared | sizes | renamed | dict(conversion.sets) | target_class


def _convert_tensor(
    source: Checkpoint,
    conversion: ClassConversion,
    key: Key,
    target: PlacedPart,
    order: Int[Tensor, " dim"] | None,
) -> LazyTensor:
    """One tensor of the target."""
    role, layer = key
    base, _, ending = role.rpartition(".")

    # A norm whose gain and bias go into the maps behind it keeps nothing of its own.
    if base in conversion.folds.values():
        value, note = float(ending == "weight"), "its gain and bias are in the maps that read it"
        return _constant_tensor(source, target, value, note)
    if base in conversion.folds:
        lazy = _fold_norm(source, base, conversion.folds[base], ending, layer)
    else:
        copied = _copy_tensor(source, key, target)
        # The target's class has biases that the source's has not.
        if copied is None:
            note = f"{source.anatomy.family} has none here"
            return _constant_tensor(source, target, 0.0, note)
        lazy = copied

    if order is None or base not in ("attn.q", "attn.k"):
        return lazy
    return _reorder_head_coordinates(lazy, order)


def _constant_tensor(source: Checkpoint, target: PlacedPart, value: float, note: str) -> LazyTensor:
    """A tensor of one number, in the dtype of the source's embedding."""
    dtype = source.tensors["embed.weight", None].dtype
    provenance = Provenance("fresh" if value else "zero", (), note)
    return LazyTensor(
        target.shape, dtype, provenance, lambda: torch.full(target.shape, value, dtype=dtype)
    )


def _find_tensor_name(source: Checkpoint, key: Key) -> str | None:
    """Name of the tensor that holds a role, alone or with others; None when this model has none."""
    role, layer = key
    base, _, ending = role.rpartition(".")
    for name, part in source.anatomy.parts.items():
        holds = name == role or (base in part.fused and name.endswith(f".{ending}"))
        if holds and (name, layer) in source.tensors:
            return source.names[name, layer]
    return None


def _copy_tensor(source: Checkpoint, key: Key, target: PlacedPart) -> LazyTensor | None:
    """A role's tensor as the target stores it, taken out of a fused one; None when it has none."""
    name = _find_tensor_name(source, key)
    if name is None:
        return None
    lazy = source[key]
    note = "" if key in source.tensors else lazy.provenance.note
    # `source[key]` gives maps output first.
    flips = target.part.stored == "in out" and target.part.axes.kind == "map"
    read: Callable[[], Tensor] = (lambda: lazy.read().T) if flips else lazy.read
    return LazyTensor(target.shape, lazy.dtype, Provenance("copied", (name,), note), read)


def _fold_norm(
    source: Checkpoint, base: str, norm: str, ending: str, layer: int | None
) -> LazyTensor:
    """A map behind the affine map of a norm, as one: W diag(g) and b + W n, computed in float32 at
    least.
    """
    # W (g x + n) + b = (W diag(g)) x + (W n + b): the norm's gain goes into the weight, its bias
    # through the weight into the bias.
    weight, gain = source[f"{base}.weight", layer], source[f"{norm}.weight", layer]
    shift, bias_key = source[f"{norm}.bias", layer], (f"{base}.bias", layer)
    bias = source[bias_key] if _find_tensor_name(source, bias_key) else None

    def scale_weight() -> Float[Tensor, "outputs inputs"]:
        value = weight.read()
        return (value.to(compute_dtype(value.dtype)) * gain.read()).to(value.dtype)

    def shift_bias() -> Float[Tensor, " outputs"]:
        value = weight.read()
        value = value.to(compute_dtype(value.dtype)) @ shift.read().to(compute_dtype(value.dtype))
        return (value if bias is None else value + bias.read()).to(weight.dtype)

    def provenance(note: str, *roles: str) -> Provenance:
        names = [_find_tensor_name(source, (role, layer)) for role in roles]
        return Provenance("grown", tuple(name for name in names if name), note)

    if ending == "weight":
        origin = provenance(f"times the gain of {norm}", f"{base}.weight", f"{norm}.weight")
        return LazyTensor(weight.shape, weight.dtype, origin, scale_weight)
    roles = (f"{base}.weight", f"{norm}.{ending}", f"{base}.bias")
    origin = provenance(f"plus the bias of {norm}", *roles)
    return LazyTensor(weight.shape[:1], weight.dtype, origin, shift_bias)


def _reorder_head_coordinates(lazy: LazyTensor, order: Int[Tensor, " dim"]) -> LazyTensor:
    """Queries or keys with the coordinates of every head in another order."""

    def compute() -> Float[Tensor, "outputs ..."]:
        # (heads, dim, ..)
        heads = lazy.read().unflatten(0, (-1, len(order)))
        return heads.index_select(1, order).flatten(0, 1)

    provenance = Provenance(
        "grown", lazy.provenance.sources, "coordinates of every head in rotary order"
    )
    return replace(lazy, provenance=provenance, read=compute)
