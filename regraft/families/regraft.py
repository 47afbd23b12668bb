"""A linearized model: its host's parts under "host.", and a mixer's own in every slot that has one."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.anatomy import Anatomy, Config, Key, Part, Placed, find
from ..core.axes import signature
from ..errors import RegraftError
from ..mixers.base import Attention
from ..mixers.registry import weights

AUTO_MAP = {
    "AutoConfig": "configuration_regraft.RegraftConfig",
    "AutoModelForCausalLM": "modeling_regraft.RegraftForCausalLM",
}


@dataclass(frozen=True)
class Regrafted(Anatomy):
    """The anatomy of `model_type: "regraft"`: derived from the config's host, mixers and attentions."""

    def filled(self, config: Config) -> dict[str, Any]:
        """The host's config with the host family's defaults."""
        return find(config["host"]).filled(config["host"])

    def solve(self, config: Config) -> dict[str, int]:
        """Axis sizes of the host."""
        return find(config["host"]).solve(config["host"])

    def place(self, config: Config) -> dict[Key, Placed]:
        """Host parts outside converted attentions by their role, mixer weights as ("mixer.<local name>", layer)."""
        host, sizes = find(config["host"]), self.solve(config)
        placed: dict[Key, Placed] = {}
        for (role, layer), spot in host.place(config["host"]).items():
            if layer is None or config["mixers"][layer] is None or not role.startswith("attn."):
                name = f"host.{spot.name}"
                placed[role, layer] = Placed(name, replace(spot.part, name=name), spot.shape)
        for layer, spec in enumerate(config["mixers"]):
            for local, weight in weights(spec, Attention(**config["attention"][layer])).items() if spec else ():
                part = Part(f"host.{host.slot.format(layer)}.mixer.{local}", weight.signature)
                placed[f"mixer.{local}", layer] = Placed(part.name, part, signature(weight.signature).shape(sizes))
        return placed

    def untied(self, config: Config) -> Config:
        """With the host's head of its own."""
        return {**config, "host": find(config["host"]).untied(config["host"])}

    def host(self, config: Config) -> Anatomy:
        """The stock family that the mixers were put into."""
        return find(config["host"])

    def host_config(self, config: Config) -> Config:
        """The stock config."""
        host: Config = config["host"]
        return host

    def resized(
        self,
        config: Config,
        sizes: Mapping[str, int],
        order: Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The host resized; mixers follow their layers. RegraftError for other heads than the mixers were made for."""
        old = self.solve(config)
        if changed := [axis for axis in ("kv", "group", "dim") if old[axis] != sizes[axis]]:
            raise RegraftError(
                f"mixers were made for {changed[0]} {old[changed[0]]}, not {sizes[changed[0]]}: grow heads first, then "
                "linearize"
            )
        family = find(config["host"])
        host = family.resized(config["host"], sizes, order, extra)
        order = order or range(len(config["mixers"]))
        specs = [config["mixers"][layer] for layer in order]
        attention = [None if spec is None else family.attention(host, layer) for layer, spec in enumerate(specs)]
        for layer, spec, shape in zip(order, specs, attention, strict=True):
            if spec and shape and axes(spec, shape) != axes(spec, config["attention"][layer]):
                raise RegraftError(f"mixer '{spec['name']}' has widths of its own: grow first, then linearize")
        return {**config, "host": host, "mixers": specs, "attention": attention}

    def attention(self, config: Config, layer: int) -> dict[str, Any]:
        """The host's attention of a layer."""
        return find(config["host"]).attention(config["host"], layer)

    def extras(self, directory: str, config: Config) -> None:
        """The code files that `trust_remote_code` loads."""
        importlib.import_module("regraft.modeling.remote_code").write(directory, config)


def axes(spec: dict[str, Any], attention: dict[str, Any]) -> list[str]:
    """Signatures of a mixer's weights, which hold numbers where it has widths of its own."""
    return [weight.signature for weight in weights(spec, Attention(**attention)).values()]


# As a part of another model, transformers writes GPT-NeoX's head as its own files have it.
aliases = {"host.embed_out.": "host.lm_head."}
anatomy = Regrafted(family="regraft", parts={}, sizes=(), slot="", aliases=aliases)
