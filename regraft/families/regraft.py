"""A linearized model: its host's parts under "host.", a mixer's own in every slot with one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.anatomy import Anatomy, Config, Key, Part, PlacedPart, find_anatomy
from ..core.axes import parse_signature
from ..errors import RegraftError
from ..mixers.base import Attention
from ..mixers.registry import weights

AUTO_MAP = {
    "AutoConfig": "configuration_regraft.RegraftConfig",
    "AutoModelForCausalLM": "modeling_regraft.RegraftForCausalLM",
}


@dataclass(frozen=True)
class RegraftAnatomy(Anatomy):
    """The anatomy of `model_type: "regraft"`: derived from the config's host, mixers and
    attentions.
    """

    def fill_defaults(self, config: Config) -> dict[str, Any]:
        """The host's config with the host family's defaults."""
        return find_anatomy(config["host"]).fill_defaults(config["host"])

    def solve(self, config: Config) -> dict[str, int]:
        """Axis sizes of the host."""
        return find_anatomy(config["host"]).solve(config["host"])

    def place(self, config: Config) -> dict[Key, PlacedPart]:
        """Host parts outside converted attentions by their role, mixer weights as ("mixer.<local
        name>", layer).
        """
        host, sizes = find_anatomy(config["host"]), self.solve(config)
        placed: dict[Key, PlacedPart] = {}
        for (role, layer), spot in host.place(config["host"]).items():
            if layer is None or config["mixers"][layer] is None or not role.startswith("attn."):
                name = f"host.{spot.name}"
                placed[role, layer] = PlacedPart(name, replace(spot.part, name=name), spot.shape)
        for layer, spec in enumerate(config["mixers"]):
            for local, weight in (
                weights(spec, Attention(**config["attention"][layer])).items() if spec else ()
            ):
                part = Part(f"host.{host.slot.format(layer)}.mixer.{local}", weight.signature)
                placed[f"mixer.{local}", layer] = PlacedPart(
                    part.name, part, parse_signature(weight.signature).shape(sizes)
                )
        return placed

    def untie_embeddings(self, config: Config) -> Config:
        """With the host's head of its own."""
        return {**config, "host": find_anatomy(config["host"]).untie_embeddings(config["host"])}

    def host(self, config: Config) -> Anatomy:
        """The stock family that the mixers were put into."""
        return find_anatomy(config["host"])

    def host_config(self, config: Config) -> Config:
        """The stock config."""
        host: Config = config["host"]
        return host

    def resize_config(
        self,
        config: Config,
        sizes: Mapping[str, int],
        order: Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The host resized; mixers follow their layers. RegraftError for other heads than the
        mixers were made for.
        """
        old = self.solve(config)
        if changed := [axis for axis in ("kv", "group", "dim") if old[axis] != sizes[axis]]:
            raise RegraftError(
                f"mixers were made for {changed[0]} {old[changed[0]]}, not {sizes[changed[0]]}:"
                " grow heads first, then linearize"
            )
        family = find_anatomy(config["host"])
        host = family.resize_config(config["host"], sizes, order, extra)
        order = order or range(len(config["mixers"]))
        specs = [config["mixers"][layer] for layer in order]
        attention = [
            None if spec is None else family.attention(host, layer)
            for layer, spec in enumerate(specs)
        ]
        for layer, spec, shape in zip(order, specs, attention, strict=True):
            if (
                spec
                and shape
                and weight_signatures(spec, shape)
                != weight_signatures(spec, config["attention"][layer])
            ):
                raise RegraftError(
                    f"mixer '{spec['name']}' has widths of its own: grow first, then linearize"
                )
        return {**config, "host": host, "mixers": specs, "attention": attention}

    def attention(self, config: Config, layer: int) -> dict[str, Any]:
        """The host's attention of a layer."""
        return find_anatomy(config["host"]).attention(config["host"], layer)

    def write_extras(self, directory: str, config: Config) -> None:
        """The code files that `trust_remote_code` loads."""
        importlib.import_module("regraft.modeling.remote_code").write_remote_code(directory, config)


def weight_signatures(spec: dict[str, Any], attention: dict[str, Any]) -> list[str]:
    """Signatures of a mixer's weights, which hold numbers where it has widths of its own."""
    return [weight.signature for weight in weights(spec, Attention(**attention)).values()]


# As a part of another model, transformers writes GPT-NeoX's head as its own files have it.
aliases = {"host.embed_out.": "host.lm_head."}
anatomy = RegraftAnatomy(family="regraft", parts={}, sizes=(), slot="", aliases=aliases)
