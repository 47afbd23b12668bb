"""The table of a multimodal model: that of its language model, and what stands around it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from ...core.anatomy import Anatomy, AttentionFields, find_anatomy
from ...core.anatomy_defaults import no_bridge, no_keys
from ...core.config_checks import check_numbers
from ...core.part import Config, Part
from ...core.stock_config import fill_nulls
from ...errors import RegraftError
from .outline import Outline, read_outline, read_whole_config
from .text_tables import TEXT_TABLES, drop_sections, find_causal_class
from .wrappers import WRAPPERS, Wrapper

ROPE_KEYS = ("rope_parameters", "rope_scaling")
TEXT, TIE = "text_config", "tie_word_embeddings"


@dataclass(frozen=True, kw_only=True)
class MultimodalAnatomy(Anatomy):
    """The table of a model around a language model, for one config.

    Sizes, growth and attention are those of the language model, whose config is `text_config`. Its
    parts have the names that they have in the whole model's files. Tensors beside it are carried,
    except those that write into the stream, which grow with it.
    """

    # The language model's own table.
    text: Anatomy
    # What the type has around it.
    wrapper: Wrapper

    def text_config(self, config: Config) -> Config:
        """The language model's config, with the tie of the whole model."""
        text = config.get(TEXT)
        if not isinstance(text, Mapping):
            return config  # it is one already
        kept = {key: value for key, value in text.items() if key != "architectures"}
        return {**kept, "model_type": self.text.family, TIE: config.get(TIE, False)}

    @property
    def own_family(self) -> str:
        """The family that holds the language model alone."""
        name, _ = TEXT_TABLES.get(self.text.family, (self.text.family, None))
        return name

    def list_closed(self) -> dict[str, str]:
        """Axes that do not grow, and "attention" -> why."""
        why = self.keeps_softmax
        return {**self.wrapper.closed, **({"attention": why} if why else {})}

    def take_text_config(self, config: Config) -> dict[str, Any]:
        """The config of the language model as a model of its own.

        RegraftError when no class of transformers holds it alone.
        """
        kind = find_causal_class(self.own_family)
        text = {**self.text_config(config), "model_type": self.own_family, "architectures": [kind]}
        for key in ROPE_KEYS:
            if isinstance(text.get(key), Mapping):
                text[key] = drop_sections(text[key])
        dtype = config.get("dtype") or config.get("torch_dtype")
        return {**text, "dtype": dtype} if dtype else text

    def check(self, config: Config) -> None:
        """RegraftError when a key is of a wrong type, or a count out of bounds."""
        check_numbers(self.family, config)
        self.text.check(self.text_config(config))

    def complete(self, config: Config, changes: Config) -> dict[str, Any]:
        """The config with the whole of `text_config`, as the class reads it."""
        return complete_config(config)

    def fill_defaults(self, config: Config) -> dict[str, Any]:
        """The language model's config with its family's defaults."""
        return self.text.fill_defaults(self.text_config(config))

    def solve(self, config: Config) -> dict[str, int]:
        """Axis sizes of the language model."""
        return self.text.solve(self.text_config(config))

    def attention(self, config: Config, layer: int) -> AttentionFields:
        """The attention of one of the language model's layers."""
        return self.text.attention(self.text_config(config), layer)

    def name_slot(self, layer: int) -> str:
        """The name, in files, of a layer's attention module."""
        return _prefix_of(self) + _slot_inside(self.text).format(layer)

    def first_layers(self, config: Config) -> int:
        """Layers that have to stay the first ones."""
        return self.wrapper.first_layers(config)

    def untie_embeddings(self, config: Config) -> Config:
        """The config of the same model with an output embedding of its own."""
        return _set_tie(config, False)

    def add_older_keys(self, config: Config) -> dict[str, Any]:
        """The config, its `text_config` with the keys that older readers look for."""
        text = config[TEXT]
        older = {key: value for key, value in self.text.older(text).items() if key not in text}
        return {**config, TEXT: {**text, **older}}

    def resize_config(
        self,
        config: Config,
        sizes: Mapping[str, int],
        order: Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The config with a resized language model, and keys beside it that follow.

        RegraftError when the language model, or what stands around it, cannot have the sizes.
        """
        before, old = self.text_config(config), self.solve(config)
        for axis, why in self.wrapper.closed.items():
            if sizes[axis] != old[axis]:
                raise RegraftError(
                    f"{self.family} cannot grow its {axis} from {old[axis]} ({why}): grow other "
                    "sizes, or its language model alone (regraft convert --part text)"
                )
        view = self.text.resize_config(before, sizes, order, extra)
        text = {key: value for key, value in view.items() if key != TIE}
        changed = {key for key in text if text[key] != before.get(key)}
        # Some files repeat keys of the language model beside it.
        repeated = {key: text[key] for key in changed if config.get(key, text) == before.get(key)}
        resized = {**config, TEXT: {**config[TEXT], **text}, **repeated}
        resized = self._follow(resized, config, old["hidden"], sizes["hidden"])
        return _set_tie(resized, view[TIE]) if view[TIE] != before[TIE] else resized

    def _follow(self, resized: Config, config: Config, old: int, new: int) -> dict[str, Any]:
        """The config with the keys beside the language model that are the stream's width."""
        follows = self.wrapper.follows if old != new else ()
        whole = read_whole_config(config) if follows else {}
        found = dict(resized)
        for path in follows:
            part, _, key = path.rpartition(".")
            if part and (whole.get(part) or {}).get(key) == old:
                found[part] = {**found.get(part, {}), key: new}
            elif not part and whole.get(key) == old:
                found[key] = new
        return found


def _set_tie(config: Config, tie: bool) -> dict[str, Any]:
    """The config with another tie; some classes read that of the language model's config too."""
    text = config[TEXT]
    return {**config, TIE: tie, TEXT: {**text, TIE: tie} if TIE in text else text}


def find_text_table(text: Config) -> Anatomy:
    """The table of a language model inside another model, by its config."""
    _, known = TEXT_TABLES.get(str(text.get("model_type")), ("", None))
    return known or find_anatomy({key: text[key] for key in text if key != "architectures"})


def find_wrapped(config: Config) -> Anatomy | None:
    """The table of a model around a language model; None for a type that is none.

    RegraftError when its class refuses the config, or a table does not fit.
    """
    if config.get("model_type") not in WRAPPERS:
        return None
    check_numbers(str(config["model_type"]), config)
    return _build(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=64)
def _build(config: str) -> Anatomy:
    """The table for a config as JSON."""
    complete = complete_config(json.loads(config))
    family = str(complete["model_type"])
    text = find_text_table(complete[TEXT])
    bare = _copy_table(text, family)
    # With an output embedding of its own, which has a name then.
    short = _shorten(bare, _set_tie(complete, False))
    outline = _outline(json.dumps(short, sort_keys=True))
    return replace(
        bare,
        parts=_list_parts(bare, short, outline),
        slot=f"{outline.module}.{_slot_inside(text)}",
    )


def _copy_table(text: Anatomy, family: str) -> MultimodalAnatomy:
    """A language model's table under the name of the whole model."""
    kept = {one.name: getattr(text, one.name) for one in fields(Anatomy)}
    own = {
        "family": family,
        "filed": {},
        "bridge": no_bridge,
        "rewrite": no_keys,
        "keeps_softmax": WRAPPERS[family].keeps_softmax,
    }
    return MultimodalAnatomy(**kept | own, text=text, wrapper=WRAPPERS[family])


def complete_config(config: Config) -> dict[str, Any]:
    """A config with the sizes and type of its language model in `text_config`, and its tie.

    Files leave out what the class fills in; older ones have the language model's keys beside the
    others.
    """
    whole = read_whole_config(config)
    text, stated = whole[TEXT], config.get(TEXT)
    top = dict(config)
    if not isinstance(stated, Mapping):
        flat = {key for key in config if key in text and key not in whole}
        flat |= {"rope_theta", "rope_scaling", "rope_parameters"}
        top = {key: value for key, value in config.items() if key not in flat}
        stated = {key: value for key, value in text.items() if not key.startswith("_")}
    table = find_text_table(text)
    needed = {key: text[key] for key in table.required_keys() if text.get(key) is not None}
    named = {**stated, "model_type": text["model_type"]}
    filled = {key: value for key, value in needed.items() if named.get(key) is None}
    tie = bool(whole.get(TIE, False))
    return {**top, TEXT: fill_nulls({**named, **filled}, table), TIE: tie}


def _shorten(anatomy: MultimodalAnatomy, config: Config) -> dict[str, Any]:
    """The config with one layer of the language model, which is as good for names and quicker."""
    try:
        return anatomy.resize_config(config, {**anatomy.solve(config), "depth": 1}, [0])
    except RegraftError:
        return dict(config)


@lru_cache(maxsize=64)
def _outline(config: str) -> Outline:
    return read_outline(json.loads(config))


def _prefix_of(text: Anatomy) -> str:
    """What stands before the names of a language model's tensors in its own table."""
    return text.name_in_file(text.parts["embed.weight"].name).removesuffix("embed_tokens.weight")


def _slot_inside(text: Anatomy) -> str:
    """The place of a layer's attention in a language model."""
    return text.slot.removeprefix(_prefix_of(text)).lstrip(".")


def _list_parts(anatomy: MultimodalAnatomy, config: Config, outline: Outline) -> dict[str, Part]:
    """The rows of the table; RegraftError when they do not fit the class's language model."""
    text, prefix = anatomy.text, _prefix_of(anatomy.text)
    parts: dict[str, Part] = {}
    for role, part in text.parts.items():
        name = text.name_in_file(part.name)
        if name.startswith(prefix) and role != "head.weight":
            parts[role] = replace(part, name=outline.prefix + name.removeprefix(prefix))
        elif role == "head.weight" and outline.head:
            parts[role] = replace(part, name=outline.head)
        elif outline.head:
            raise RegraftError(
                f"{text.family} has '{name}', which a {anatomy.family} does not: open its language "
                "model alone"
            )
    if not outline.head:
        parts = {
            role: replace(part, writes="normed" if part.writes == "head" else part.writes)
            for role, part in parts.items()
        }
    _check_fit(replace(anatomy, parts=parts), config, outline)
    hidden = anatomy.solve(config)["hidden"]
    return parts | {
        f"carried.{name.replace('.', '/')}": _write_row(anatomy.wrapper, name, *place, hidden)
        for name, place in outline.others.items()
    }


def _check_fit(anatomy: MultimodalAnatomy, config: Config, outline: Outline) -> None:
    """RegraftError when the class's language model has other tensors than its table."""
    claimed = {one.name: one.shape for one in anatomy.place(config).values()}
    claimed.pop(outline.head, None)
    if claimed != outline.text:
        wrong = sorted({*claimed.items()} ^ {*outline.text.items()})
        raise RegraftError(
            f"the table of {anatomy.text.family} does not fit the language model of a "
            f"{anatomy.family} at {wrong[0]}: check that config.json is as it was published"
        )


def _write_row(
    wrapper: Wrapper, name: str, in_model: str, shape: tuple[int, ...], hidden: int
) -> Part:
    """The row of a tensor beside the language model.

    Args:
        wrapper: says which of them write into the stream.
        name: in files.
        in_model: in the model.
        shape: of the tensor.
        hidden: width of the stream.
    """
    module = in_model.removeprefix("model.")
    kind = _find_writer(wrapper, module)
    is_linear = module.endswith((".weight", ".bias"))
    # A matrix that is no linear layer's has its outputs last.
    stored = "out in" if is_linear else "in out"
    width, inputs = (shape[0], shape[-1]) if is_linear else (shape[-1], shape[0])
    if not kind or width != hidden:
        signature, writes = " ".join(map(str, shape)) or "scalar", "own"
    else:
        reads_inner = kind == "stream" and "inner" in wrapper.writers.values()
        read = "" if len(shape) == 1 else "hidden" if reads_inner else str(inputs)
        signature, writes = f"{read} -> hidden", "stream" if kind == "stream" else "own"
    return Part(name, signature.strip(), stored, reads="own", writes=writes, at="image")


def _find_writer(wrapper: Wrapper, module: str) -> str:
    """What `Wrapper.writers` says of a tensor, by its name in the model; "" when nothing."""
    for pattern, kind in wrapper.writers.items():
        if re.fullmatch(rf"{pattern}(\.(weight|bias))?", module):
            return kind
    return ""
