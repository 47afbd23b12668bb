"""From a request of `regraft grow` or `regraft plan` to growth steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.anatomy import Key
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..families.multimodal.two_towers import TOWERS, TwoTowerAnatomy
from ..io.finite import cast_finite
from .identity_layer import IdentityLayer
from .ligo_options import COPY, Ligo
from .new_tokens import NewToken
from .operators import AUTO, AUTO_POST_NORM
from .stacks import ENCODER, refuse_two_stacks
from .steps.add_experts import AddExperts
from .steps.bridge import Bridge
from .steps.deepen import Deepen
from .steps.grow_tower import GrowTower, check_towers, take_tower
from .steps.grow_vocab import GrowVocab
from .steps.ligo import Learned
from .steps.transplant import Transplant
from .steps.untie import Untie
from .steps.widen import Widen
from .target_config import match_target, match_ties, read_target
from .target_sizes import TargetSizes
from .vocabulary import VocabInit

GrowthStep = Callable[[Checkpoint], Checkpoint]
LEARNED, AUTOMATIC = "ligo", "auto"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Growth(TargetSizes):
    """A request for growth: sizes or a target config, operators, storage dtype."""

    # Layers of one stack, for models with an encoder and a decoder.
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    # Which tower grows of a model with one for texts and one for images; None: both.
    tower: str | None = None
    # A target's config.json, or its directory, instead of sizes.
    to: str | None = None
    # The width operators as `build.parse_width_operators` reads them, or `auto`, `ligo`, `copy`.
    width_init: str = "pad"
    # The depth operator.
    depth_init: str = "identity"
    # How norms over a padded stream keep their mean square (`Widen`).
    fold: Literal["auto", "stream", "eps"] = "auto"
    # Relative standard deviation of the noise of readers of copies; None: what operators need.
    noise: float | None = None
    # Whether the checkpoint is first written as another family (`Bridge`).
    bridge: bool = False
    # Name of the dtype that the result is stored in; None: as the source.
    dtype: str | None = None
    # Of everything random.
    seed: int = 0
    # Whether a tied output embedding is untied first (`Untie`); a target config may ask for it too.
    untie: bool = False
    # Keys of the target config that are taken although the function changes (`Adopt`).
    adopt: tuple[str, ...] = ()
    # Rows of the vocabulary, tokens that the tokenizer gets, what new rows hold (`GrowVocab`).
    vocab: int | None = None
    tokens: tuple[NewToken, ...] = ()
    vocab_init: VocabInit = "pieces"
    # Experts in place of the MLP, of which a token goes to `top_k`; noise on them, and the share of
    # their neurons that are drawn anew (`AddExperts`).
    experts: int | None = None
    top_k: int | None = None
    expert_noise: float = 0.0
    expert_reinit: float = 0.0

    def resolve_auto(self, source: Checkpoint) -> Growth:
        """The same request with `auto` replaced by what trained best for such a model; a depth
        operator that is given stays.
        """
        if self.width_init != AUTOMATIC:
            return self
        if self.depth_init != "identity":
            return replace(self, width_init=AUTO[0])
        identity_layer = IdentityLayer(source, source.anatomy.place(source.config))
        width_init, depth_init = AUTO_POST_NORM if identity_layer.post_norm else AUTO
        return replace(self, width_init=width_init, depth_init=depth_init)

    @property
    def has_requests(self) -> bool:
        """Whether the request asks for anything."""
        return self != Growth(seed=self.seed)

    def __call__(self, source: Checkpoint, fitted: Learned | None = None) -> Checkpoint:
        """The grown checkpoint.

        RegraftError when the request asks for nothing or the class cannot hold it.

        Args:
            source: the checkpoint to grow.
            fitted: a step with learned maps, in place of the one with the maps' start.
        """
        steps = self.steps(source)
        if not steps:
            raise RegraftError(
                f"nothing to grow in '{source.origin}': give --hidden, --ffn, --heads, --kv-heads,"
                " --head-dim, --layers, --experts, --vocab, --add-tokens, --untie or --to"
                " CONFIG_DIR"
            )

        # What steps compute is rounded to the stored dtype: a wider one comes first.
        early = self.dtype is not None and widens(source, self.dtype)
        if self.dtype and early:
            source = cast_checkpoint(source, self.dtype)
        for step in steps:
            source = fitted(source) if fitted and isinstance(step, Learned) else step(source)
        return cast_checkpoint(source, self.dtype) if self.dtype and not early else source

    def steps(self, source: Checkpoint) -> list[GrowthStep]:
        """The growth steps in order; RegraftError for options that do not go together."""
        if self.tower is not None or isinstance(source.anatomy, TwoTowerAnatomy):
            return tower_steps(self, source)
        if self.width_init == AUTOMATIC:
            return self.resolve_auto(source).steps(source)
        if self.width_init in (LEARNED, COPY):
            refuse_two_stacks(source, f"--width-init {self.width_init}")
        if self.untie:
            refuse_two_stacks(source, "--untie")
        if self.experts is not None:
            refuse_two_stacks(source, "--experts")
        if self.adopt and self.to is None:
            raise RegraftError(
                f"--adopt {','.join(self.adopt)} takes over keys of a target: give --to CONFIG_DIR"
            )
        grows_vocab = self.vocab is not None or self.tokens or self.to is not None
        if self.vocab_init != "pieces" and not grows_vocab:
            raise RegraftError(
                f"--vocab-init {self.vocab_init} would change nothing: give --vocab or --add-tokens"
            )

        first = self.first_steps(source)
        for step in first:
            source = step(source)
        request = self.with_target_sizes(source)
        last = []
        if self.to is not None:
            last = [match_target(source, read_target(source, self.to), self.adopt)]
        return [*first, *request.size_steps(), *last, *self.expert_steps()]

    def expert_steps(self) -> list[GrowthStep]:
        """The step that adds experts, as wide as the MLP has become; none where none are asked for.

        RegraftError for options of experts without any.
        """
        options = (self.top_k, self.expert_noise or None, self.expert_reinit or None)
        if self.experts is None:
            names = ("--top-k", "--expert-noise", "--expert-reinit")
            for name, value in zip(names, options, strict=True):
                if value is not None:
                    raise RegraftError(f"{name} {value} would change nothing: give --experts")
            return []
        return [
            AddExperts(self.experts, self.top_k, self.expert_noise, self.expert_reinit, self.seed)
        ]

    def first_steps(self, source: Checkpoint) -> list[GrowthStep]:
        """The steps before sizes change: another class, an output embedding of its own, rows of the
        vocabulary.
        """
        steps: list[GrowthStep] = []
        # The bridge comes first: the sizes are then those of the class that the result has.
        if self.bridge:
            steps.append(Bridge())
            source = steps[0](source)
        target = read_target(source, self.to) if self.to is not None else None
        if self.untie:
            steps.append(Untie())
        elif target is not None:
            steps += match_ties(source, target)

        # Tokens may take the rows that a target has; a target may have more.
        wanted = target.sizes.get("vocab") if target is not None else None
        vocab = self.vocab if wanted in (None, source.sizes.get("vocab")) else wanted
        if vocab is not None or self.tokens:
            steps.append(GrowVocab(vocab, self.tokens, self.vocab_init))
        return steps

    def size_steps(self) -> list[GrowthStep]:
        """The steps that change sizes; RegraftError for operators that do not go together."""
        has_sizes = any(size is not None for size in self.sizes.values())
        if self.width_init == LEARNED and has_sizes:
            return [Learned(**self.sizes, method=self.ligo_options(), seed=self.seed)]
        if self.width_init == COPY and has_sizes:
            if self.depth_init != "identity":
                raise RegraftError(
                    "--width-init copy begins new layers at random: leave out --depth-init"
                    f" {self.depth_init}"
                )
            return [Transplant(**self.sizes, seed=self.seed)]

        # Width before depth: new layers then have the new width from the start.
        steps: list[GrowthStep] = []
        widths = {name: size for name, size in self.sizes.items() if name != "layers"}
        if any(size is not None for size in widths.values()):
            how, fold, noise = self.width_init, self.fold, self.noise
            steps.append(Widen(**widths, how=how, fold=fold, noise=noise, seed=self.seed))
        depths = (self.layers, self.encoder_layers, self.decoder_layers)
        if any(layers is not None for layers in depths):
            steps.append(Deepen(depths[0], self.depth_init, self.seed, *depths[1:]))
        return steps

    def ligo_options(self, **options: Any) -> Ligo:
        """LiGO's options; w begins with the order of layers of a `depth_init` that is not the
        default.

        Args:
            options: fields of `Ligo`, which win.
        """
        order = {} if self.depth_init == "identity" else {"depth": self.depth_init}
        return Ligo(**order | options)

    def with_target_sizes(self, source: Checkpoint) -> Growth:
        """The same request with the sizes of the target config, if there is one.

        RegraftError when sizes are given as well, or the config is of another kind of model.
        """
        if self.to is None:
            return self
        sizes = self.sizes | {"vocab": self.vocab}
        if given := [name for name, size in sizes.items() if size is not None]:
            raise RegraftError(
                f"--to '{self.to}' gives all sizes: leave out --{given[0].replace('_', '-')}"
            )

        # Attention without groups (GPT-2, BERT) has no key/value heads of its own to ask for.
        sizes = read_target(source, self.to).sizes
        heads = sizes["kv"] * sizes["group"]
        kv = None if "group" in source.anatomy.fixed else sizes["kv"]
        return replace(
            self,
            hidden=sizes["hidden"],
            ffn=sizes["ffn"],
            heads=heads,
            kv_heads=kv,
            head_dim=sizes["dim"],
            layers=None if ENCODER in sizes else sizes["depth"],
            encoder_layers=sizes.get(ENCODER),
            decoder_layers=sizes["depth"] if ENCODER in sizes else None,
        )


# Fields of a request that say how towers grow; others would change what both have in common.
TOWER_FIELDS = (
    *(field.name for field in fields(TargetSizes)),
    *("tower", "width_init", "depth_init", "fold", "noise", "dtype", "seed"),
)


def tower_steps(growth: Growth, source: Checkpoint) -> list[GrowthStep]:
    """The steps of a request for a model with a tower for texts and one for images.

    RegraftError for other models, for options that no tower takes, and for sizes of both towers
    where these differ in them.
    """
    check_towers(source, growth.tower)
    usual = Growth()
    refused = [
        field.name
        for field in fields(Growth)
        if field.name not in TOWER_FIELDS
        and getattr(growth, field.name) != getattr(usual, field.name)
    ]
    if growth.width_init in (LEARNED, COPY):
        refused.append("width_init")
    if refused:
        name = refused[0].replace("_", "-")
        raise RegraftError(
            f"--{name} {getattr(growth, refused[0])} is not for {source.anatomy.family}, whose two "
            "towers grow in sizes alone: leave it out"
        )
    if growth.tower is None:
        _check_equal_towers(growth, source)
    towers = (growth.tower,) if growth.tower else TOWERS
    if all(size is None for size in growth.sizes.values()):
        return []
    return [_grow_tower(growth, source, tower) for tower in towers]


def _grow_tower(growth: Growth, source: Checkpoint, tower: str) -> GrowTower:
    """The step of a request for one tower."""
    request = growth.resolve_auto(take_tower(source, tower))
    how, depth_how = request.width_init, request.depth_init
    more: dict[str, Any] = {"fold": growth.fold, "noise": growth.noise, "seed": growth.seed}
    return GrowTower(tower=tower, how=how, depth_how=depth_how, **growth.sizes, **more)


def _check_equal_towers(growth: Growth, source: Checkpoint) -> None:
    """RegraftError for a size that the towers do not have alike."""
    axes = {"heads": "kv", "kv_heads": "kv", "head_dim": "dim", "layers": "depth"}
    for name, size in growth.sizes.items():
        axis = axes.get(name, name)
        text, vision = source.sizes[axis], source.sizes[f"vision_{axis}"]
        if size is not None and text != vision:
            flag = name.replace("_", "-")
            raise RegraftError(
                f"'{source.origin}' has {flag} {text} in its tower for texts and {vision} in that "
                f"for images: say which grows to {size} with --tower text or --tower vision"
            )


def widens(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a dtype, a key of DTYPES, holds all numbers of a checkpoint as they are.

    RegraftError for other names.
    """
    wide, stored = find_dtype(name), {lazy.dtype for lazy in checkpoint.tensors.values()}
    return all(torch.promote_types(dtype, wide) == wide for dtype in stored)


def find_dtype(name: str) -> torch.dtype:
    """The dtype of a key of DTYPES; RegraftError for other names."""
    if name not in DTYPES:
        raise RegraftError(f"unknown --dtype '{name}': use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def cast_checkpoint(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The same numbers stored in another dtype, a key of DTYPES; RegraftError for other names."""
    dtype = find_dtype(name)

    def build_reader(key: Key) -> Callable[[], Tensor]:
        read, tensor = checkpoint.tensors[key].read, checkpoint.names[key]
        return lambda: cast_finite(read(), dtype, tensor)

    tensors = {
        key: replace(lazy, dtype=dtype, read=build_reader(key))
        for key, lazy in checkpoint.tensors.items()
    }

    # transformers 4 calls the key torch_dtype.
    keys = [key for key in ("dtype", "torch_dtype") if key in checkpoint.config] or ["dtype"]
    config = checkpoint.config | dict.fromkeys(keys, name)
    step = {"step": "Store", "arguments": {"dtype": name}}
    return replace(checkpoint, tensors=tensors, config=config, history=(*checkpoint.history, step))
