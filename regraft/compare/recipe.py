"""The recipe of a comparison: its models, text, budgets and arms."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import RegraftError
from ..growth.ligo_options import Ligo
from ..growth.target_sizes import TargetSizes
from ..io.typed import convert
from ..io.yaml_loader import parse_yaml
from ..linearize.method import expand_method_block
from ..mixers.remix_options import RemixOptions
from ..recipes import schema
from ..train.stage import Stage

MAIN = "source"
ARM_KINDS = ("scratch", "random", "grow", "ligo", "linear")
ARM_BUDGET_KEYS = ("lr", "warmup", "layer_drop", "token_drop")  # an arm may have its own
OPTIONAL_STAGE_KEYS = ("layer_drop", "token_drop")  # a stage gets them only when they are not 0


@dataclass(frozen=True)
class Budget:
    """How a source or an arm is trained; keys as of a training stage.

    Attributes:
        tokens: tokens to train on; images where the task is images.
        length: tokens of a row.
        batch: rows of a step.
        lr: peak learning rate of every weight.
        warmup: share of the steps in which the rate rises.
        cooldown: share of the steps in which it falls to zero.
        weight_decay: of AdamW.
        mask_share: share of tokens that task `mask` hides.
        layer_drop: largest probability that a layer is left out of a step.
        token_drop: share of the tokens that skip the middle layers.
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
    """How an arm grows, flags as of `regraft grow`; the sizes are the recipe's target.

    Attributes:
        width_init: width operator.
        depth_init: depth operator.
        fold: how norms keep their mean square over a padded stream.
        noise: spread of the noise that separates copies, relative to a tensor's own.
    """

    width_init: str = "pad"
    depth_init: str = "identity"
    fold: Literal["auto", "stream", "eps"] = "auto"
    noise: float | None = None


@dataclass(frozen=True)
class PartialStage:
    """A stage that trains some layers only, before all layers are trained.

    Attributes:
        layers: `bottom:3` (a sub-model of these layers) or `train:6-11` (the rest is frozen).
        share: of the arm's tokens.
    """

    layers: str
    share: float


@dataclass(frozen=True)
class LinearizeOptions(RemixOptions):
    """How an arm is linearized and trained; fields of `RemixOptions`, whose `seed` is the run's.

    A file may name a `method` (`regraft.linearize.methods`) and what differs from it; `keep` may be
    a rule that chooses layers by measuring.

    Attributes:
        calibration: tokens for the closed-form start; 0 for none.
        stages: keys of a training stage each. What a stage leaves out is as in the comparison's
            `train`; stages without `tokens` share what the others leave of its tokens.
    """

    calibration: int = 0
    stages: list[dict[str, Any]] = field(default_factory=lambda: [{}])


@dataclass(frozen=True)
class Arm:
    """One way to the target.

    It has exactly one kind: `scratch`, `random`, `grow`, `ligo` or `linear`. `scratch` may go with
    `linear`: the linearized architecture with nothing inherited.

    Attributes:
        name: of the arm; a folder gets it.
        scratch: train a random model of the target's sizes.
        random: copy the source into a corner of the weights; the rest is random.
        grow: grow with these operators.
        ligo: learn the growth with these options.
        linear: linearize with these options.
        against: scratch arm that it is measured against; needed where there are several.
        source: which source it grows.
        moments: whether Adam's state grows too.
        lr: its own instead of the budget's, as the next three.
        warmup: see `Budget`.
        layer_drop: see `Budget`.
        token_drop: see `Budget`.
        legs: stages before all layers are trained.
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


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Attributes:
        task: next token, masked tokens, or classes of images.
        source: a transformers config, pretrained here, or the directory of a model.
        pretrain: how sources given as configs are trained.
        train: how arms are trained.
        arms: what is compared.
        target: sizes that all arms train; the source's where they are open.
        others: further sources by name, each as keys that differ from `source`, or a directory.
        seeds: of the runs of every source and arm.
        data: text (a file or folder), or images (.npz); None for Python's own documentation and
            docstrings, or scikit-learn's digits.
        heldout: likewise; None for a part of the data.
        vocabulary: tokens of the byte-level BPE that is trained when the source is a config.
        every: steps between evaluations.
        rows: held-out rows at most.
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
        """The scratch arm it is measured against: itself, the one it names, or the only one."""
        if arm.scratch:
            return arm.name
        return arm.against or next(one.name for one in self.arms if one.scratch)

    def sources(self) -> dict[str, str | dict[str, Any]]:
        """Every source that an arm grows: a config to pretrain, or a directory."""
        sources: dict[str, Any] = {MAIN: self.source}
        for name, other in self.others.items():
            if isinstance(other, dict) and isinstance(self.source, dict):
                sources[name] = {**self.source, **other}
            else:
                sources[name] = other

        # The main source is always needed: the target's open sizes are its own.
        used = {MAIN} | {arm.source for arm in self.arms if not arm.scratch}
        return {name: source for name, source in sources.items() if name in used}

    def stage(self, budget: Budget, **changes: Any) -> Stage:
        """A training stage of a budget.

        Args:
            budget: what is trained.
            changes: fields of the budget that differ, or further fields of a stage.
        """
        settings = dataclasses.asdict(budget) | changes
        rate, length = settings.pop("lr"), settings.pop("length")
        for key in OPTIONAL_STAGE_KEYS:
            if not settings[key]:
                del settings[key]

        # An image is a row of length 1: `tokens` then counts images.
        return Stage(
            self.task,
            length=1 if self.task == "image" else length,
            lr_new=rate,
            lr_mixer=rate,
            lr_body=rate,
            precision="float32",
            **settings,
        )

    def stages(self, arm: Arm) -> list[Stage]:
        """The stages of an arm: its legs, then all layers, for the budget's tokens in all.

        The learning rate begins to fall at the step at which it does without legs.
        """
        own = {key: getattr(arm, key) for key in ARM_BUDGET_KEYS if getattr(arm, key) is not None}
        budget = dataclasses.replace(self.train, **own)
        if arm.linear is not None:
            return self.linear_stages(arm, arm.linear, budget)

        legs = [
            self.stage(
                budget, tokens=round(leg.share * budget.tokens), cooldown=0.0, layers=leg.layers
            )
            for leg in arm.legs
        ]

        # Counted in steps: rounding of the legs' shares must not change the number of all steps.
        tokens_per_step = budget.batch * (1 if self.task == "image" else budget.length)
        steps = budget.tokens // tokens_per_step - sum(leg.steps for leg in legs)
        share = 1 - sum(leg.share for leg in arm.legs)
        cooldown = min(1.0, budget.cooldown / share)
        return [*legs, self.stage(budget, tokens=steps * tokens_per_step, cooldown=cooldown)]

    def linear_stages(self, arm: Arm, linear: LinearizeOptions, budget: Budget) -> list[Stage]:
        """The stages of a linearized arm; RegraftError for keys that a stage does not have."""
        requests = linear.stages
        where = f"stage tokens of arm '{arm.name}'"
        given = [
            convert(request["tokens"], int, where) for request in requests if "tokens" in request
        ]
        left = budget.tokens - sum(given)
        without_tokens = sum("tokens" not in request for request in requests)
        share = left // max(1, without_tokens)

        stages = []
        for index, request in enumerate(requests):
            defaults = dataclasses.asdict(self.stage(budget, tokens=budget.tokens))
            settings = defaults | {"tokens": share} | request
            stages.append(schema.build(settings, f"stage {index} of arm '{arm.name}'", Stage))
        return stages


def load(recipe: str, overrides: Mapping[str, str]) -> Comparison:
    """A comparison from a YAML file.

    RegraftError on an unknown key, a wrong type, or arms that cannot be told apart or compared.

    Args:
        recipe: path of the file.
        overrides: values as YAML by dotted key, such as `train.lr`.
    """
    fields = schema.from_yaml(Path(recipe))
    for key, value in overrides.items():
        schema.override(fields, key, parse_yaml(value, f"override '{key}'"))
    expand_methods(fields)
    comparison: Comparison = schema.build(fields, recipe, Comparison)
    check(comparison)
    return comparison


def expand_methods(fields: dict[str, Any]) -> None:
    """Replace the methods that arms name by their options, on the budget of `train`.

    `fields` are as the file has them, not yet checked: what has the wrong type is left for the
    schema to refuse.
    """
    budget, arms = fields.get("train"), fields.get("arms")
    if not isinstance(budget, dict) or not isinstance(arms, list):
        return
    sizes = {key: budget.get(key, getattr(Budget, key)) for key in ("length", "batch")}
    if any(type(size) is not int for size in (budget.get("tokens"), *sizes.values())):
        return
    for arm in arms:
        linear = arm.get("linear") if isinstance(arm, dict) else None
        if isinstance(linear, dict):
            arm["linear"] = expand_method_block(linear, budget["tokens"], **sizes)


def check(recipe: Comparison) -> None:
    """RegraftError for what the types do not say."""
    names = [arm.name for arm in recipe.arms]
    check_against(recipe.arms)
    if len(set(names)) < len(names):
        raise RegraftError(f"arms {names} repeat a name: every arm needs its own")
    if not recipe.seeds or len(set(recipe.seeds)) < len(recipe.seeds):
        raise RegraftError(f"seeds {recipe.seeds} must be at least one, none twice")
    for name in recipe.others:
        check_name("source", name)
    for arm in recipe.arms:
        check_arm(arm, [MAIN, *recipe.others])


def check_against(arms: Sequence[Arm]) -> None:
    """RegraftError where an arm has no scratch arm to be measured against, or not just one."""
    scratch = [arm.name for arm in arms if arm.scratch]
    if not scratch:
        names = [arm.name for arm in arms]
        raise RegraftError(f"arms {names} hold no scratch arm: give one with scratch: true")

    only = scratch[0] if len(scratch) == 1 else None
    for arm in arms:
        valid = not arm.against if arm.scratch else (arm.against or only) in scratch
        if not valid:
            raise RegraftError(
                f"arm '{arm.name}' is against '{arm.against}': of several scratch arms each other "
                f"arm names its own, one of {', '.join(scratch)}"
            )


def check_name(what: str, name: str) -> None:
    """RegraftError for a name that is no plain name of a folder."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise RegraftError(
            f"{what} name '{name}' becomes a folder: begin with a letter or digit, and use "
            "letters, digits and . _ + - only"
        )


def check_kind(arm: Arm) -> list[str]:
    """The kinds an arm has; RegraftError unless it is one, or scratch and linear."""
    kinds = [kind for kind in ARM_KINDS if getattr(arm, kind) not in (False, None)]
    if len(kinds) != 1 and kinds != ["scratch", "linear"]:
        raise RegraftError(
            f"arm '{arm.name}' has {kinds or 'no kind'}: give one of {', '.join(ARM_KINDS)}"
        )
    return kinds


def check_arm(arm: Arm, sources: Sequence[str]) -> None:
    """RegraftError for an arm of no kind or of two, or whose options do not go together."""
    kinds = check_kind(arm)
    check_name("arm", arm.name)

    # A linearized arm's stages are its own, where drops and layers can be given one by one.
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

    shares = [leg.share for leg in arm.legs]
    if any(share <= 0 for share in shares) or sum(shares) >= 1:
        raise RegraftError(f"legs of arm '{arm.name}' share {shares}: give less than 1")


def dump(recipe: Comparison) -> dict[str, Any]:
    """The recipe as plain values."""
    return dataclasses.asdict(recipe)
