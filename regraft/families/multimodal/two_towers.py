"""Models with a tower for texts and one for images, whose vectors are compared (CLIP, SigLIP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...core.anatomy import Anatomy, AttentionFields
from ...core.anatomy_defaults import no_prefix
from ...core.axes import UNITS
from ...core.config_checks import check_numbers
from ...core.part import Config, Key, Part, PlacedPart
from ...core.stock_config import fill_nulls
from ...errors import RegraftError
from ..bert import architecture
from .outline import read_whole_config

TOWERS = ("text", "vision")
# Words of signatures that are no axes of a tower.
KEPT_WORDS = frozenset(("->", "+", "gain", "1+gain", "scale", "scalar", *UNITS))


@dataclass(frozen=True, kw_only=True)
class TwoTowerAnatomy(Anatomy):
    """The table of a model with two towers, made of the towers' own tables.

    Roles begin with "text." or "vision.". Axes are those of the text tower; those of the image
    tower begin with "vision_". It grows tower by tower (`growth.steps.grow_tower`).
    """

    # The class that holds both.
    kind: str
    # Tower -> its own table, with names as the whole model has them.
    towers: Mapping[str, Anatomy]
    # Tower -> the class whose parts it has.
    classes: Mapping[str, str]
    # Keys beside the towers' configs that both towers read.
    shared: tuple[str, ...] = ()
    # Parts beside the towers.
    own_parts: Mapping[str, Part] = field(default_factory=dict)
    # Whether images' vectors are as wide as the image tower, so that the map at the end of the text
    # tower has to be too.
    texts_follow: bool = False

    def tower_config(self, config: Config, tower: str) -> dict[str, Any]:
        """The config of a tower as that of a model of its own."""
        own = {"model_type": self.towers[tower].family, "architectures": [self.classes[tower]]}
        return {**config[f"{tower}_config"], **{key: config[key] for key in self.shared}, **own}

    def put_tower(self, config: Config, tower: str, grown: Config) -> dict[str, Any]:
        """The config with another one for a tower, as `tower_config` gives it."""
        left_out = {"model_type", "architectures", *self.shared}
        changed = {key: value for key, value in grown.items() if key not in left_out}
        return {**config, f"{tower}_config": {**config[f"{tower}_config"], **changed}}

    def check(self, config: Config) -> None:
        """RegraftError for a key of a wrong type, a count out of bounds, and another class."""
        check_numbers(self.family, config)
        architecture(config, {self.kind: ""})
        config = self.complete(config, {})
        for tower, table in self.towers.items():
            table.check(self.tower_config(config, tower))

    def complete(self, config: Config, changes: Config) -> dict[str, Any]:
        """The config with the sizes of both towers, which files may leave out."""
        whole = read_whole_config(config)
        # Older files have a tower's keys a second time, and the class takes those.
        twice = {f"{tower}_config_dict" for tower in TOWERS}
        found = {key: value for key, value in config.items() if key not in twice}
        for tower, table in self.towers.items():
            name = f"{tower}_config"
            full = {key: value for key, value in whole[name].items() if not key.startswith("_")}
            stated = full if f"{name}_dict" in config else config.get(name) or {}
            needed = {key: full[key] for key in table.required_keys() if stated.get(key) is None}
            found[name] = fill_nulls({**stated, **needed}, table)
        return found | {key: whole[key] for key in self.shared if found.get(key) is None}

    def fill_defaults(self, config: Config) -> dict[str, Any]:
        """The text tower's config with its defaults."""
        return self.towers["text"].fill_defaults(self.tower_config(config, "text"))

    def text_config(self, config: Config) -> Config:
        """The text tower's config."""
        return self.tower_config(config, "text")

    def attention(self, config: Config, layer: int) -> AttentionFields:
        """The attention of one of the text tower's layers."""
        return self.towers["text"].attention(self.tower_config(config, "text"), layer)

    def solve(self, config: Config) -> dict[str, int]:
        """Axis sizes of both towers."""
        text, vision = (
            table.solve(self.tower_config(config, tower)) for tower, table in self.towers.items()
        )
        return text | {f"vision_{axis}": size for axis, size in vision.items()}

    def place(self, config: Config) -> dict[Key, PlacedPart]:
        """Every parameter of both towers and beside them."""
        placed: dict[Key, PlacedPart] = {}
        for tower, table in self.towers.items():
            for (role, layer), one in table.place(self.tower_config(config, tower)).items():
                part = name_axes(one.part) if tower == "vision" else one.part
                placed[f"{tower}.{role}", layer] = replace(one, part=part)
        for role, part in self.own_parts.items():
            placed[role, None] = PlacedPart(part.name, part, part.axes.shape({}))
        return placed

    def resize_config(
        self,
        config: Config,
        sizes: Mapping[str, int],
        order: Sequence[int] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The config as it is; RegraftError for other sizes, since towers grow one by one."""
        if dict(sizes) != self.solve(config) or order or extra:
            raise RegraftError(
                f"{self.family} has a tower for texts and one for images, which grow one by one: "
                "use GrowTower"
            )
        return dict(config)


def name_axes(part: Part) -> Part:
    """A part of the image tower, with the axes that it has in the whole model."""
    words = [
        word if word in KEPT_WORDS or word.isdigit() else f"vision_{word}"
        for word in part.signature.split()
    ]
    return replace(part, signature=" ".join(words), stack="vision_depth")


def within(table: Anatomy, start: str) -> Anatomy:
    """A table whose parts have names that begin with `start`."""
    parts = {
        role: replace(part, name=start + part.name.replace("{p}", ""))
        for role, part in table.parts.items()
    }
    return replace(table, parts=parts, prefix=no_prefix)


def build_two_towers(
    family: str, kind: str, text: Anatomy, vision: Anatomy, classes: Sequence[str], **fields: Any
) -> TwoTowerAnatomy:
    """The table of a model with two towers.

    Args:
        family: its model type.
        kind: its class.
        text: the text tower's own table.
        vision: the image tower's.
        classes: the classes whose parts the towers have.
        fields: further fields of `TwoTowerAnatomy`.
    """
    towers = dict(zip(TOWERS, (text, vision), strict=True))
    own: Mapping[str, Part] = fields.get("own_parts", {})
    parts = {f"text.{role}": part for role, part in text.parts.items()}
    parts |= {f"vision.{role}": name_axes(part) for role, part in vision.parts.items()}
    return TwoTowerAnatomy(
        family=family,
        kind=kind,
        towers=towers,
        classes=dict(zip(TOWERS, classes, strict=True)),
        parts={**parts, **own},
        sizes=(),
        slot=text.slot,
        eps=text.eps,
        rotary=False,
        causal=False,
        inputs="texts and images",
        **fields,
    )
