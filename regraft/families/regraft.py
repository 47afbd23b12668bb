"""A linearized model: a stock model, the host, with mixers in place of some attentions.

The host's parts keep their names; each mixer adds its own weights in the slot of the
attention that it replaces.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from ..core.anatomy import Anatomy, AttentionFields, Config, Key, Part, PlacedPart, find_anatomy
from ..core.auto_map import AUTO_MAP
from ..core.axes import parse_signature
from ..errors import RegraftError
from ..io.schema import check_json, check_version, shorten
from ..mixers.attention import Attention
from ..mixers.older_names import leave_out_caps, rename_older
from ..mixers.registry import validate, weights

# Keys of config.json that are not the host's.
OWN_KEYS = ("model_type", "architectures", "auto_map", "host", "slot", "mixers", "attention")


class RegraftFields(TypedDict):
    """The keys of config.json that make a linearized model; others are transformers' own."""

    host: str | dict[str, Any]  # model_type of the stock model; its whole config in old files
    mixers: list[dict[str, Any] | None]  # by layer, the mixer's name and options
    attention: list[AttentionFields | None]  # by layer, the attention that the mixer replaced


@dataclass(frozen=True)
class RegraftAnatomy(Anatomy):
    """The table of `model_type: "regraft"`, derived from keys of the config.

    `host` is the stock model's family, whose keys stand beside these; `mixers` has a mixer's
    options per layer (None: the attention stays), `attention` the fields of each replaced
    attention.
    """

    def check(self, config: Config) -> None:
        """RegraftError when a key is of a wrong type, or hosts and mixers do not go together."""
        check_version(config, "regraft config")
        check_json(config, RegraftFields, "regraft config", "make the model again")
        if self.host_config(config).get("model_type") == self.family:
            raise RegraftError(
                f"regraft config has host = '{self.family}': the host is a stock model, make the"
                " model again"
            )

        sizes, mixers, fields = self.solve(config), config["mixers"], config["attention"]
        if not len(mixers) == len(fields) == sizes["depth"]:
            raise RegraftError(
                f"regraft config has {len(mixers)} mixers and {len(fields)} fields of attention for"
                f" {sizes['depth']} layers: make the model again"
            )
        for layer, (spec, attention) in enumerate(zip(mixers, fields, strict=True)):
            if spec is None:
                continue
            validate(spec)
            axes = ("hidden", "kv", "group", "dim")
            if attention is None or any(attention[axis] != sizes[axis] for axis in axes):
                raise RegraftError(
                    f"regraft config has attention[{layer}] = {shorten(attention)}, the host"
                    f" { {axis: sizes[axis] for axis in axes} }: make the model again"
                )

    def fill_defaults(self, config: Config) -> dict[str, Any]:
        """The host's config with the host family's defaults."""
        return self.host(config).fill_defaults(self.host_config(config))

    def solve(self, config: Config) -> dict[str, int]:
        """Axis sizes of the host."""
        return self.host(config).solve(self.host_config(config))

    def place(self, config: Config) -> dict[Key, PlacedPart]:
        """The host's parts without the replaced attentions, and the mixers' weights.

        A mixer's weights have the key ("mixer.<name in the mixer>", layer).
        """
        host, sizes = self.host(config), self.solve(config)
        placed: dict[Key, PlacedPart] = {}

        for (role, layer), before in host.place(self.host_config(config)).items():
            replaced = layer is not None and config["mixers"][layer] is not None
            if not (replaced and role.startswith("attn.")):
                placed[role, layer] = replace(before, part=replace(before.part, name=before.name))

        # The mixer keeps the place of the attention module: "<slot>.mixer.<name>".
        for layer, spec in enumerate(config["mixers"]):
            if not spec:
                continue
            attention = Attention(**config["attention"][layer])
            for local, weight in weights(spec, attention).items():
                name = f"{host.name_slot(layer)}.mixer.{local}"
                shape = parse_signature(weight.signature).shape(sizes)
                placed[f"mixer.{local}", layer] = PlacedPart(
                    name, Part(name, weight.signature), shape
                )

        return placed

    def untie_embeddings(self, config: Config) -> Config:
        """The config with an output embedding of the host's own."""
        return join_host(config, self.host(config).untie_embeddings(self.host_config(config)))

    def host(self, config: Config) -> Anatomy:
        """The family of the stock model whose attentions the mixers replace."""
        return find_anatomy(self.host_config(config))

    def host_config(self, config: Config) -> Config:
        """The stock config."""
        host = config["host"]
        if isinstance(host, dict):
            return host
        keys = {key: value for key, value in config.items() if key not in OWN_KEYS}
        return {**keys, "model_type": host}

    def text_config(self, config: Config) -> Config:
        """The language model's config, of which a host of several parts has its own."""
        return self.host(config).text_config(self.host_config(config))

    def canonical_name(self, name: str) -> str:
        """The state-dict name of a tensor found in a file."""
        name = rename_older(name)
        # GPT-NeoX's files have another name for its head.
        return name.replace("embed_out.", "lm_head.", 1) if name.startswith("embed_out.") else name

    def resize_config(
        self,
        config: Config,
        sizes: Mapping[str, int],
        order: Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The config with the host resized, in which mixers follow their layers.

        RegraftError when a mixer's weights would need other shapes.
        """
        before = self.solve(config)
        if changed := [axis for axis in ("kv", "group", "dim") if before[axis] != sizes[axis]]:
            axis = changed[0]
            raise RegraftError(
                f"mixers were made for {axis} {before[axis]}, not {sizes[axis]}: "
                "grow heads first, then linearize"
            )

        family = self.host(config)
        host = family.resize_config(self.host_config(config), sizes, order, extra)
        order = order or range(len(config["mixers"]))
        specs = [config["mixers"][layer] for layer in order]
        attention = [
            None if spec is None else family.attention(host, layer)
            for layer, spec in enumerate(specs)
        ]
        for old_layer, fields in zip(order, attention, strict=True):
            if fields and config["attention"][old_layer].get("softcap", 0.0) is None:
                fields["softcap"] = None

        # Numbers in the signatures are widths that a mixer derived from the old attention (a
        # feature map as wide as the hidden size, say). Nothing grows them.
        for old_layer, spec, fields in zip(order, specs, attention, strict=True):
            if not (spec and fields):
                continue
            old_fields = config["attention"][old_layer]
            if weight_signatures(spec, fields) != weight_signatures(spec, old_fields):
                raise RegraftError(
                    f"mixer '{spec['name']}' has widths of its own: grow first, then linearize"
                )

        return {**join_host(config, host), "mixers": specs, "attention": attention}

    def attention(self, config: Config, layer: int) -> AttentionFields:
        """Shape and conventions of the attention in a layer of the host."""
        return self.host(config).attention(self.host_config(config), layer)

    def write_extras(self, directory: str, config: Config) -> None:
        """The code files that `trust_remote_code` loads."""
        importlib.import_module("regraft.modeling.remote_code").write_remote_code(directory, config)


def weight_signatures(spec: dict[str, Any], attention: AttentionFields) -> list[str]:
    """Signatures of a mixer's weights; a width of the mixer's own stands in them as a number."""
    return [weight.signature for weight in weights(spec, Attention(**attention)).values()]


def join_host(own: Config, host: Config) -> dict[str, Any]:
    """config.json of a linearized model: the keys of `own` that say what replaces what, and the
    host's.
    """
    keys = {key: value for key, value in host.items() if key not in OWN_KEYS}
    said = {key: own[key] for key in OWN_KEYS if key in own}
    return {**keys, **said, "host": host["model_type"]}


def flatten_host(config: Config) -> dict[str, Any]:
    """Keys that a config with the host's config inside, as older versions wrote it, has now."""
    host = config.get("host")
    if not isinstance(host, dict):
        return {}
    kept = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
    flat = {key: value for key, value in join_host({}, host).items() if key not in kept}
    # Beside the host stood kinds of layers that its class does not know.
    others = {"layer_types": None} if "layer_types" in config else {}
    own: dict[str, Any] = {"auto_map": AUTO_MAP}
    if find_anatomy(host).softcap:
        own["attention"] = leave_out_caps(config.get("attention") or [])
    return others | flat | own


anatomy = RegraftAnatomy(family="regraft", parts={}, sizes=(), slot="", rewrite=flatten_host)
