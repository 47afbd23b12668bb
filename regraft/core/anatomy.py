"""Tables of model families: what each parameter computes, and how config keys give axis sizes.

A family's file in `regraft/families` holds one `Anatomy`. Everything that depends on the
architecture (widening, FLOPs, which attention a mixer replaces) is read from it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from ..errors import RegraftError
from .anatomy_defaults import (
    always,
    module_name,
    no_bridge,
    no_keys,
    no_prefix,
    older_rope_keys,
    read_clip,
    replace_prefix,
    softmax_scale,
)
from .attention import AttentionFields, describe_attention
from .axes import UNITS, product
from .class_heads import adapt_to_class
from .config_checks import (
    check_config,
    check_divisors,
    check_family,
    check_multiples,
    check_open,
    check_sizes,
)
from .part import Config, Inputs, Key, Part, PlacedPart, linear, norm
from .stock_config import fill_nulls, find_layer_lists

# Files of model types with a hyphen, which no module's name can have.
HYPHENATED = ("audio-spectrogram-transformer", "blenderbot-small", "deberta-v2", "xlm-roberta")

__all__ = [
    "Anatomy",
    "AttentionFields",
    "Config",
    "Key",
    "Part",
    "PlacedPart",
    "list_families",
    "list_served_families",
    "find_anatomy",
    "linear",
    "norm",
    "older_rope_keys",
    "read_as_auto",
]


@dataclass(frozen=True)
class Anatomy:
    """The table of one model family.

    Every tensor in a checkpoint must be claimed by exactly one part or be ignored for a stated
    reason; any other tensor is refused.

    Config keys that begin with "_" are derived: `defaults` computes them from other keys, `finish`
    turns them back into real ones, and they are never written.
    """

    # The config's `model_type`, which is also the name of the file in regraft/families.
    family: str
    # Parameters by role, such as "attn.q.weight".
    parts: dict[str, Part]
    # (config key, product of axes) pairs, such as ("hidden_size", "kv dim"). Read from left to
    # right they give axis sizes (`solve`), from right to left config keys (`config_keys`).
    sizes: tuple[tuple[str, str], ...]
    # Name of the attention module that a mixer replaces; "{}" stands for the layer.
    slot: str
    # Values of config keys that are missing or null; a function gets the config filled so far.
    defaults: dict[str, Any] = field(default_factory=dict)
    # Sizes of axes that no config key sets, such as {"group": 1} without grouped queries.
    fixed: dict[str, int] = field(default_factory=dict)
    # Name prefix in the state dict -> prefix under which the family's class writes it.
    filed: dict[str, str] = field(default_factory=dict)
    # Regular expression over a tensor's whole name -> why such tensors are dropped, where
    # transformers does not know it.
    ignored: dict[str, str] = field(default_factory=dict)
    # Config key of the norms' epsilon. One that begins with "_" is written in the class.
    eps: str = "rms_norm_eps"
    latent_eps: float | None = None  # that of norms over latents, where it is not `eps`
    # Whether norms over the stream subtract the mean and have no parameters at all.
    bare_norms: bool = False
    # Whether queries and keys are rotated by position.
    rotary: bool = True
    # Whether neighbouring coordinates (2i, 2i + 1) turn together; else i and i + half.
    rotary_pairs: bool = False
    # Where the class's tables of cos and sin have pair i: at i and i + half ("halves"), at 2i and
    # 2i + 1 ("neighbours"), or at i alone ("once", or "once, sin first" where cos comes second).
    rotary_tables: Literal["halves", "neighbours", "once", "once, sin first"] = "halves"
    # (config, layer) -> whether that layer rotates, in families with `rotary`.
    rotates: Callable[[Config, int], bool] = always
    # Config -> minus log2 of ALiBi's last slope (arXiv 2108.12409); None: scores get no ALiBi.
    alibi: Callable[[Config], float] | None = None
    # Config -> limit that queries, keys and values are clipped to; None: they are not.
    clip: Callable[[Config], float | None] = read_clip
    # Config -> by layer, the last tokens that a token sees, where the class has keys of its own.
    windows: Callable[[Config], list[int | None]] | None = None
    # The MLP's width over that of the stream, where the class fixes it; 0: it has a key.
    ffn_ratio: int = 0
    # The same of the axis "inner", the channels of layers with a state or a convolution.
    inner_ratio: int = 0
    # Whether queries and keys are normed after they are rotated, not before.
    norms_rotated: bool = False
    # Why no mixer can take the place of its attention; empty: some can.
    keeps_softmax: str = ""
    factors: tuple[str, ...] = ()  # config keys of constant factors on embeddings, branches, logits
    # (config, head dim, layer) -> factor on the attention logits.
    scale: Callable[[Config, int, int], float] = softmax_scale
    # (config key of the cap on the logits, its value when the key is missing; null is no cap).
    softcap: tuple[str, float | None] | None = None
    # Config -> name prefix that fills "{p}" in the names of parts.
    prefix: Callable[[Config], str] = no_prefix
    # Config with new sizes -> further keys that change with them; RegraftError for other sizes.
    finish: Callable[[Config], dict[str, Any]] = no_keys
    # Config -> the same settings under keys that older releases of transformers read.
    older: Callable[[Config], dict[str, Any]] = older_rope_keys
    # Config -> family that can hold shapes this class cannot (used by --bridge); None: none can.
    bridge: Callable[[Config], str | None] = no_bridge
    # Config -> keys that Auto changes when it reads the file, and those that the class needs.
    rewrite: Callable[[Config], dict[str, Any]] = no_keys
    # Config keys whose null the class takes, but cannot run with.
    not_null: tuple[str, ...] = ()
    # (key, divisor key): the class requires the first to be a multiple of the second.
    divides: tuple[tuple[str, str], ...] = ()
    # Axis -> number that its size must be a multiple of.
    multiples: dict[str, int] = field(default_factory=dict)
    # Whether embeddings are multiplied by sqrt(hidden), or the config key that says so.
    embed_scale: bool | str = False
    # Config key that says whether what the head reads is divided by sqrt(hidden); empty: never.
    head_scale: str = ""
    # Whether it is a decoder, in which a token attends only to earlier ones.
    causal: bool = True
    inputs: Inputs = "tokens"  # what the model reads
    # Config key of the MLP's activation function. One with "_" before it is written in the class.
    activation: str = "hidden_act"
    # Config key of the number of experts a token is sent to; empty without.
    routed: str = ""
    # Whether it is a form that `regraft export` writes: it grows only where `closed` says how far.
    served_only: bool = False
    # Whether it reads settings of single layers (`per_layer_config`), as inferred tables do.
    reads_layer_settings: bool = False
    # Axes that do not grow -> why; "attention": why it is not linearized. Of inferred tables.
    closed: Mapping[str, str] = field(default_factory=dict)

    def check(self, config: Config) -> None:
        """RegraftError when a key of a config is of a wrong type, or a count out of bounds."""
        check_config(config, self)

    def fill_defaults(self, config: Config) -> dict[str, Any]:
        """The config with the family's defaults for keys that are missing or null."""
        full = dict(config)
        for key, default in self.defaults.items():
            if full.get(key) is None:
                full[key] = default(full) if callable(default) else default
        return full

    def solve(self, config: Config) -> dict[str, int]:
        """Axis sizes of a config.

        RegraftError when a key is missing or no positive whole number, when the equations
        contradict each other, or when they leave an axis open.
        """
        for key in sorted(self.required_keys()):
            self._check_size(config, key)
        config = self.fill_defaults(config)
        sizes = dict(self.fixed)

        # An equation with several unknown axes waits until others have filled some in.
        waiting = list(self.sizes)
        while waiting:
            unsolved = [pair for pair in waiting if not self._solve_one(config, *pair, sizes)]
            if len(unsolved) == len(waiting):
                raise RegraftError(
                    f"{self.family} table leaves axes of '{unsolved[0][1]}' open: "
                    "add a config key to `sizes`"
                )
            waiting = unsolved

        check_sizes(self.family, sizes)
        return sizes

    def _solve_one(self, config: Config, key: str, text: str, sizes: dict[str, int]) -> bool:
        """Solve config[key] == product of the axes in `text`, adding to `sizes`.

        Returns whether it could be solved: False while two or more axes are unknown.
        """
        value, axes = self._check_size(config, key), text.split()
        unknown = [axis for axis in axes if axis not in sizes and axis not in UNITS]
        if len(unknown) > 1:
            return False

        known = product(tuple(axis for axis in axes if axis not in unknown), sizes)
        # The key may repeat what others said, such as GPT-2's n_embd for "kv dim".
        if not unknown and known != value:
            raise RegraftError(
                f"{self.family} config has {key} = {value}, but {text} is {known}: make them equal"
            )
        if unknown and value % known:
            raise RegraftError(
                f"{self.family} config has {key} = {value}, not a multiple of {known} "
                f"(of {text}): fix it"
            )
        if unknown:
            sizes[unknown[0]] = value // known
        return True

    def _check_size(self, config: Config, key: str) -> int:
        """The value of a key; RegraftError when it is no positive whole number."""
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise RegraftError(
                f"{self.family} config has {key} = {value!r}: it must be a positive whole number"
            )
        return value

    def config_keys(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Config keys for axis sizes, the inverse of `solve`.

        RegraftError when two products share a key and differ, such as `hidden` and `kv dim` in
        GPT-2's `n_embd`.
        """
        keys: dict[str, tuple[int, str]] = {}
        for key, text in self.sizes:
            value = product(tuple(text.split()), sizes)
            if key in keys and keys[key][0] != value:
                other, axes = keys[key]
                raise RegraftError(
                    f"{self.family} has one key {key} for {axes} ({other}) and {text} ({value}): "
                    "grow them together"
                )
            keys[key] = (value, text)
        return {key: value for key, (value, _) in keys.items()}

    def place(self, config: Config) -> dict[Key, PlacedPart]:
        """Every parameter of a model with this config, by (role, layer).

        The layer is None outside the stack. Experts have a role each: "mlp.{e}.up.weight" becomes
        "mlp.0.up.weight" and so on.
        """
        full, sizes = self.fill_defaults(config), self.solve(config)
        placed: dict[Key, PlacedPart] = {}
        prefix = self.prefix(full)

        for role, part in self.parts.items():
            if not part.is_present(full):
                continue
            shape = part.axes.shape(sizes, part.stored)
            layers = range(sizes[part.stack]) if "{}" in part.name else (None,)
            experts = range(sizes["expert"]) if "{e}" in part.name else (0,)
            for layer in layers:
                if not part.is_in_layer(full, layer):
                    continue
                for expert in experts:
                    name = part.name.format(layer, e=expert, p=prefix)
                    placed[role.format(e=expert), layer] = PlacedPart(name, part, shape)

        return placed

    def epsilon(self, config: Config) -> float:
        """The epsilon of the norms."""
        return float(self.fill_defaults(config)[self.eps])

    def untie_embeddings(self, config: Config) -> Config:
        """The config of the same model with an output embedding of its own."""
        return dict(config) | {"tie_word_embeddings": False}

    def host(self, config: Config) -> Anatomy:
        """The stock family that the model is built from: this one, unless it is linearized."""
        return self

    def host_config(self, config: Config) -> Config:
        """The config of the stock family `host`."""
        return config

    def text_config(self, config: Config) -> Config:
        """The config of the language model: `host_config`, unless it is a part of a larger one."""
        return self.host_config(config)

    def name_slot(self, layer: int) -> str:
        """The name, in files, of a layer's attention module."""
        return self.slot.format(layer)

    def first_layers(self, config: Config) -> int:
        """How many layers have to stay the first ones: none, in a model of one part."""
        return 0

    def complete(self, config: Config, changes: Config) -> dict[str, Any]:
        """The config with what Auto changes, and no key null that the class does not take so."""
        return fill_nulls({**config, **changes}, self)

    def add_older_keys(self, config: Config) -> dict[str, Any]:
        """The config with the keys that older readers look for; keys it has itself stay."""
        return self.older(config) | dict(config)

    def continues_text(self, config: Config) -> bool:
        """Whether it is a decoder with a language model's head."""
        host = self.host(config)
        return host.causal and "head.weight" in host.parts

    def resize_config(
        self,
        config: Config,
        sizes: Mapping[str, int],
        order: Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The config of a model with other axis sizes, or other layers.

        Args:
            config: the config as it is.
            sizes: all axis sizes of the new model.
            order: for each new layer, the old one whose settings it takes; None: the layers stay.
            extra: keys that are set as well.

        RegraftError when the family cannot hold the sizes.
        """
        if self.served_only and not self.closed:
            raise RegraftError(
                f"{self.family} is a form that models are served in, which does not grow: grow the "
                "model that it was exported from"
            )
        check_sizes(self.family, sizes)
        check_open(self, config, sizes)
        full, keys = self.fill_defaults(config), self.config_keys(sizes)
        # Checked whatever grows; what the class derives from a layer's number is written out.
        lists = find_layer_lists(config, self)
        if order is not None:
            keys |= {key: [value[layer] for layer in order] for key, value in lists.items()}
            keys["_order"] = list(order)

        # `finish` sees the derived keys ("_..."), and the sizes before; only after it may they go.
        keys["_before"] = self.solve(config)
        keys |= self.finish(full | keys)
        check_divisors(self, config, keys)
        check_multiples(self, sizes)
        written = {key: value for key, value in keys.items() if not key.startswith("_")}
        return dict(config) | self._drop_defaults(config, written) | dict(extra or {})

    def _drop_defaults(self, config: Config, written: Mapping[str, Any]) -> dict[str, Any]:
        """`written` without keys that `config` lacks and whose value the defaults give anyway."""
        # What a reader would get from the required keys and the config's, null ones as null.
        required = self.required_keys()
        stated = {
            key: value if key in required or config[key] is not None else None
            for key, value in (dict(config) | dict(written)).items()
            if key in config or key in required
        }
        implied = self.fill_defaults(stated)

        return {
            key: value
            for key, value in written.items()
            if config.get(key) is not None or implied.get(key) != value
        }

    def bridge_hint(self, config: Config) -> str:
        """The end of an error message: --bridge, if another family can hold the shape."""
        name = self.bridge(self.fill_defaults(config))
        return f", or --bridge to write it as {name}" if name else ""

    def required_keys(self) -> set[str]:
        """Config keys that have no default."""
        return {key for key, _ in self.sizes if key not in self.defaults}

    def canonical_name(self, name: str) -> str:
        """The state-dict name of a tensor under the name that the family's class writes."""
        return replace_prefix(name, {new: old for old, new in self.filed.items()})

    def name_in_file(self, name: str) -> str:
        """The name under which the family's class writes a parameter."""
        return replace_prefix(name, self.filed)

    def reason_to_drop(self, name: str) -> str | None:
        """Why a tensor of a file is dropped; None when the table does not know it.

        Args:
            name: the tensor's name in the file.
        """
        matches = (why for pattern, why in self.ignored.items() if re.fullmatch(pattern, name))
        return next(matches, None)

    def attention(self, config: Config, layer: int) -> AttentionFields:
        """The attention of a layer, as arguments of `mixers.attention.Attention`."""
        return describe_attention(self, config, layer)

    def write_extras(self, directory: str, config: Config) -> None:
        """Write further files that a saved model needs: none, unless it is linearized."""


@cache
def list_families() -> tuple[str, ...]:
    """The model types that have a table, which are the files in regraft/families."""
    package = importlib.import_module("regraft.families")
    found = [one.name for one in pkgutil.iter_modules(package.__path__) if not one.ispkg]
    hyphenated = {module_name(name): name for name in HYPHENATED}
    return tuple(sorted(hyphenated.get(name, name) for name in found))


def list_served_families() -> list[str]:
    """The families that are only written by `regraft export` and opened again."""
    return [name for name in list_families() if _import_table(name).served_only]


def find_anatomy(config: Config) -> Anatomy:
    """The table for a config's `model_type` and `architectures`, inferred where none is written.

    RegraftError when no table can hold the type, and when a key of the config is of a wrong type.
    """
    family = check_family(config)
    if family not in list_families():
        wrapped = importlib.import_module("regraft.families.multimodal.wrapped_model")
        infer = importlib.import_module("regraft.families.inference.inferred").find_inferred
        anatomy: Anatomy = wrapped.find_wrapped(config) or infer(config)
        anatomy.check(config)
        return anatomy
    anatomy = _import_table(_import_table(family).rewrite(config).get("model_type", family))
    anatomy.check(config)
    return adapt_to_class(anatomy, config)


def read_as_auto(config: Config) -> dict[str, Any]:
    """The config that transformers' Auto classes make of the mapping in a config.json.

    Its `model_type` is that of the class that Auto takes, and no key is null that the class does
    not take as null. RegraftError as of `find_anatomy`.
    """
    anatomy = find_anatomy(config)
    if anatomy.host(config) is not anatomy:
        return {**config, **anatomy.rewrite(config)}  # its host was read when it was linearized
    own = _import_table(config["model_type"]) if anatomy.family in list_families() else anatomy
    return anatomy.complete(config, own.rewrite(config))


def _import_table(family: str) -> Anatomy:
    anatomy: Anatomy = importlib.import_module(f"regraft.families.{module_name(family)}").anatomy
    return anatomy
