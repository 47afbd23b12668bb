"""The recipe of a comparison: its models, text, budgets and arms."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import RegraftError
from ..growth.ligo_maps import Ligo
from ..growth.sizes import TargetSizes
from ..growth.sizes_to_steps import Growth
from ..linearize.method import expand_method_block
from ..mixers.remix import Remix
from ..recipes import schema
from ..train.stage import Stage

MAIN = "source"
OPTIONAL_STAGE_KEYS = ("layer_drop", "token_drop")  # of a stage: said only when there is any


@dataclass(frozen=True)
class Budget:
    """How a source or an arm is trained, in the words of a training stage; `tokens` counts images for images.

    `lr` is the peak learning rate of every weight.
    """

    tokens: int
    length: int = 128
    batch: int = 8
    lr: float = 1e-3
    warmup: float = 0.05
    cooldown: float = 0.5
    weight_decay: float = 0.01
    mask_share: float = 0.15
    layer_drop: float = 0.0
    token_drop: float = 0.0


@dataclass(frozen=True)
class Operators:
    """How an arm grows, in the words of `regraft grow`; the sizes are the recipe's target."""

    width_init: str = "pad"
    depth_init: str = "identity"
    fold: Literal["auto", "stream", "eps"] = "auto"
    noise: float | None = None


@dataclass(frozen=True)
class PartialStage:
    """A share of an arm's tokens on some layers only: `bottom:3` (a sub-model of them) or `train:6-11` (the rest
    frozen); what the legs leave is trained on all layers."""

    layers: str
    share: float


@dataclass(frozen=True)
class LinearizeOptions(Remix):
    """How an arm is linearized, in the words of `Remix` (`seed` is the run's), and trained.

    A file may name a `method` (`regraft.linearize.methods`) and what differs from it; `keep` may be a rule that is measured.
    `calibration`: tokens for the closed-form start. `stages`: each in the words of a training stage, what it leaves out
    as in the comparison's `train`; stages without `tokens` share what the others leave of its tokens.
    """

    calibration: int = 0
    stages: list[dict[str, Any]] = field(default_factory=lambda: [{}])

    def remix(self, **changes: Any) -> Remix:
        """The step alone."""
        return Remix(
            **{one.name: getattr(self, one.name) for one in dataclasses.fields(Remix)} | changes
        )


@dataclass(frozen=True)
class Arm:
    """One way to the target: exactly one of `scratch`, `random` (direct copy, the rest random), `grow`, `ligo` and
    `linear`; `scratch` with `linear` is that architecture with nothing inherited.

    `against`: the scratch arm it is measured against, needed where there are several.
    `source`: which source it grows. `moments`: Adam's state grows too. `lr`, `warmup`, `layer_drop`, `token_drop`: its
    own instead of the budget's. `legs`: stages that come before training all layers.
    """

    name: str
    scratch: bool = False
    random: bool = False
    grow: Operators | None = None
    ligo: Ligo | None = None
    linear: LinearizeOptions | None = None
    against: str | None = None
    source: str = MAIN
    moments: bool = False
    lr: float | None = None
    warmup: float | None = None
    layer_drop: float | None = None
    token_drop: float | None = None
    legs: list[PartialStage] = field(default_factory=list)

    def growth(self, target: TargetSizes, seed: int) -> Growth:
        """The growth of a `grow` arm."""
        return Growth(
            **dataclasses.asdict(target), **dataclasses.asdict(self.grow or Operators()), seed=seed
        )


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    `source`: a config in transformers' words, pretrained here, or the directory of a model. `others`: further sources,
    each as keys that differ from `source`, or a directory. `target`: sizes that all arms train, the source's if open.
    `data`: text (a file or folder), or images (.npz); None for Python's own documentation and docstrings, or
    scikit-learn's digits. `heldout`: likewise, None for a part of the data. `vocabulary`: of the byte-level BPE that is
    trained when the source is a config. `every`: steps between evaluations on at most `rows` held-out rows.
    """

    task: Literal["next", "mask", "image"]
    source: str | dict[str, Any]
    pretrain: Budget
    train: Budget
    arms: list[Arm]
    target: TargetSizes = field(default_factory=TargetSizes)
    others: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    data: str | None = None
    heldout: str | None = None
    vocabulary: int = 1024
    every: int = 20
    rows: int = 64

    def arm(self, name: str) -> Arm:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def scratch_name(self, arm: Arm) -> str:
        """The name of the scratch arm that an arm is measured against: itself, the one it names, or the only one."""
        return (
            arm.name
            if arm.scratch
            else arm.against or next(one.name for one in self.arms if one.scratch)
        )

    def sources(self) -> dict[str, str | dict[str, Any]]:
        """Every source that an arm grows: a config to pretrain, or a directory."""
        table: dict[str, Any] = {MAIN: self.source}
        for name, one in self.others.items():
            table[name] = (
                {**self.source, **one}
                if isinstance(one, dict) and isinstance(self.source, dict)
                else one
            )
        used = {MAIN} | {arm.source for arm in self.arms if not arm.scratch}
        return {name: one for name, one in table.items() if name in used}

    def stage(self, budget: Budget, **changes: Any) -> Stage:
        """A training stage of a budget."""
        words = dataclasses.asdict(budget) | changes
        rate = words.pop("lr")
        length = 1 if self.task == "image" else words.pop("length")
        words.pop("length", None)
        words = {
            key: value for key, value in words.items() if key not in OPTIONAL_STAGE_KEYS or value
        }
        return Stage(
            self.task,
            length=length,
            lr_new=rate,
            lr_mixer=rate,
            lr_body=rate,
            precision="float32",
            **words,
        )

    def stages(self, arm: Arm) -> list[Stage]:
        """The stages of an arm: its legs, then all layers; the cooldown begins where it does for one stage alone."""
        own = {key: getattr(arm, key) for key in ("lr", "warmup", "layer_drop", "token_drop")}
        budget = dataclasses.replace(
            self.train, **{key: value for key, value in own.items() if value is not None}
        )
        whole = 1 - sum(leg.share for leg in arm.legs)
        legs = [
            self.stage(
                budget, tokens=round(leg.share * budget.tokens), cooldown=0.0, layers=leg.layers
            )
            for leg in arm.legs
        ]
        used = sum(stage.steps for stage in legs)
        step = budget.batch * (1 if self.task == "image" else budget.length)
        if arm.linear is not None:
            return self.linear_stages(arm, budget)
        tokens = (budget.tokens // step - used) * step
        return [
            *legs,
            self.stage(budget, tokens=tokens, cooldown=min(1.0, budget.cooldown / whole)),
        ]

    def linear_stages(self, arm: Arm, budget: Budget) -> list[Stage]:
        """The stages of a linearized arm; RegraftError for words that a stage does not have."""
        assert arm.linear is not None
        said = [dict(words) for words in arm.linear.stages]
        left = budget.tokens - sum(words.get("tokens", 0) for words in said)
        share = left // max(1, sum("tokens" not in words for words in said))
        whole = [
            dataclasses.asdict(self.stage(budget, tokens=budget.tokens)) | {"tokens": share} | w
            for w in said
        ]
        return [
            schema.build(words, f"stage {at} of arm '{arm.name}'", Stage)
            for at, words in enumerate(whole)
        ]


def load(recipe: str, overrides: Mapping[str, str]) -> Comparison:
    """A comparison from a YAML file with dotted overrides. RegraftError on an unknown key, a wrong type, or arms that
    cannot be told apart or compared."""
    fields = schema.from_yaml(Path(recipe))
    for key, value in overrides.items():
        schema.override(fields, key, yaml.safe_load(value))
    expand_methods(fields)
    made: Comparison = schema.build(fields, recipe, Comparison)
    check(made)
    return made


def expand_methods(fields: dict[str, Any]) -> None:
    """Spell out the methods that arms name, on the budget of `train`."""
    budget = fields.get("train")
    for arm in fields.get("arms") or []:
        linear = arm.get("linear") if isinstance(arm, dict) else None
        if isinstance(linear, dict) and isinstance(budget, dict) and "tokens" in budget:
            sizes = {key: budget.get(key, getattr(Budget, key)) for key in ("length", "batch")}
            arm["linear"] = expand_method_block(linear, budget["tokens"], **sizes)


def check(recipe: Comparison) -> None:
    """RegraftError for what the types do not say."""
    names = [arm.name for arm in recipe.arms]
    scratch = [arm.name for arm in recipe.arms if arm.scratch]
    if not scratch:
        raise RegraftError(f"arms {names} hold no scratch arm: give one with scratch: true")
    for arm in recipe.arms:
        only = scratch[0] if not scratch[1:] else None
        if arm.against if arm.scratch else (arm.against or only) not in scratch:
            raise RegraftError(
                f"arm '{arm.name}' is against '{arm.against}': of several scratch arms each other arm names its own, "
                f"one of {', '.join(scratch)}"
            )
    if len(set(names)) < len(names):
        raise RegraftError(f"arms {names} repeat a name: every arm needs its own")
    if not recipe.seeds or len(set(recipe.seeds)) < len(recipe.seeds):
        raise RegraftError(f"seeds {recipe.seeds} must be at least one, none twice")
    known = [MAIN, *recipe.others]
    for arm in recipe.arms:
        check_arm(arm, known)


def check_arm(arm: Arm, sources: list[str]) -> None:
    """RegraftError for an arm that is none, or whose options do not go together."""
    every = ("scratch", "random", "grow", "ligo", "linear")
    kinds = [kind for kind in every if getattr(arm, kind) not in (False, None)]
    if not re.fullmatch(r"[\w.+-]+", arm.name):
        raise RegraftError(
            f"arm name '{arm.name}' becomes a folder: use letters, digits and . _ + - only"
        )
    if len(kinds) != 1 and kinds != ["scratch", "linear"]:
        raise RegraftError(
            f"arm '{arm.name}' has {kinds or 'no kind'}: give one of {', '.join(every)}"
        )
    if arm.linear is not None and (arm.legs or arm.layer_drop or arm.token_drop):
        raise RegraftError(
            f"arm '{arm.name}' is linear with {len(arm.legs)} legs or drops: give it stages instead"
        )
    if arm.source not in sources:
        raise RegraftError(
            f"arm '{arm.name}' grows source '{arm.source}': use one of {', '.join(sources)}"
        )
    if arm.moments and kinds != ["grow"]:
        raise RegraftError(
            f"arm '{arm.name}' is {kinds[0]} with moments: only `grow` arms carry Adam's state over"
        )
    if any(leg.share <= 0 for leg in arm.legs) or sum(leg.share for leg in arm.legs) >= 1:
        raise RegraftError(
            f"legs of arm '{arm.name}' share {[leg.share for leg in arm.legs]}: give less than 1"
        )


def dump(recipe: Comparison) -> dict[str, Any]:
    """The recipe as plain values."""
    return dataclasses.asdict(recipe)
