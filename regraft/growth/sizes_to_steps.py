"""Sizes as a user asks for them turned into growth steps, and how far an inexact one moves the
function.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.anatomy import find_anatomy
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..io.files import read_json
from . import depth
from .ligo_maps import COPY, Ligo
from .operators import AUTO, AUTO_POST_NORM
from .sizes import TargetSizes
from .steps.bridge import Bridge
from .steps.deepen import Deepen
from .steps.ligo import Learned
from .steps.transplant import Transplant
from .steps.widen import Widen

LEARNED, AUTOMATIC = "ligo", "auto"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Growth(TargetSizes):
    """What `regraft grow` and `regraft plan` are asked: sizes or a target config `to`, operators,
    storage dtype.
    """

    to: str | None = None
    width_init: str = "pad"
    depth_init: str = "identity"
    fold: Literal["auto", "stream", "eps"] = "auto"
    noise: float | None = None
    bridge: bool = False
    dtype: str | None = None
    seed: int = 0

    def resolve_auto(self, source: Checkpoint) -> Growth:
        """With `auto` replaced by what trained best for such a model; a depth operator that was
        asked for stays.
        """
        if self.width_init != AUTOMATIC:
            return self
        if self.depth_init != "identity":
            return replace(self, width_init=AUTO[0])
        quiet = depth.IdentityLayer(source, source.anatomy.place(source.config))
        width, deep = AUTO_POST_NORM if quiet.hands_on else AUTO
        return replace(self, width_init=width, depth_init=deep)

    @property
    def has_requests(self) -> bool:
        """Whether anything but defaults is asked."""
        return self != Growth(seed=self.seed)

    def is_exact(self, source: Checkpoint) -> bool:
        """Whether every operator keeps the function."""
        chosen = self.resolve_auto(source)
        ways, deeper = (
            set(re.split("[,=]", chosen.width_init)),
            self.layers is not None or self.to is not None,
        )
        return not {"aki", LEARNED, COPY} & ways and (
            not deeper or chosen.depth_init in depth.EXACT
        )

    def __call__(self, source: Checkpoint, fitted: Learned | None = None) -> Checkpoint:
        """The grown checkpoint; `fitted` stands in for the start of learned maps. RegraftError when
        nothing grows, or says what the class cannot hold.
        """
        steps = self.steps(source)
        if fitted:
            steps[-1] = fitted
        if not steps:
            raise RegraftError(
                f"nothing to grow in '{source.origin}': give --hidden, --ffn, --heads, --kv-heads,"
                " --head-dim, --layers or --to CONFIG_DIR"
            )
        for step in steps:
            source = step(source)
        return cast_checkpoint(source, self.dtype) if self.dtype else source

    def steps(self, source: Checkpoint) -> list[Callable[[Checkpoint], Checkpoint]]:
        """The growth steps in order."""
        if self.width_init == AUTOMATIC:
            return self.resolve_auto(source).steps(source)
        # The bridge comes first: the sizes are then those of the class that the result has.
        steps: list[Callable[[Checkpoint], Checkpoint]] = [Bridge()] if self.bridge else []
        asked = self.with_target_sizes(steps[0](source) if steps else source)
        if self.width_init == LEARNED and any(size is not None for size in asked.sizes.values()):
            return [*steps, Learned(**asked.sizes, method=self.ligo_options(), seed=self.seed)]
        if self.width_init == COPY and any(size is not None for size in asked.sizes.values()):
            if self.depth_init != "identity":
                raise RegraftError(
                    "--width-init copy begins new layers at random: leave out --depth-init"
                    f" {self.depth_init}"
                )
            return [*steps, Transplant(**asked.sizes, seed=self.seed)]

        # Width before depth: new layers then have the new width from the start.
        widths = {name: size for name, size in asked.sizes.items() if name != "layers"}
        if any(size is not None for size in widths.values()):
            steps.append(
                Widen(
                    **widths, how=self.width_init, fold=self.fold, noise=self.noise, seed=self.seed
                )
            )
        if asked.layers is not None:
            steps.append(Deepen(asked.layers, self.depth_init, self.seed))
        return steps

    def ligo_options(self, **options: Any) -> Ligo:
        """LiGO's options; `depth_init` other than its default is the order of layers that it begins
        with.
        """
        order = {} if self.depth_init == "identity" else {"depth": self.depth_init}
        return Ligo(**order | options)

    def with_target_sizes(self, source: Checkpoint) -> Growth:
        """With the sizes of the target config, if there is one."""
        if self.to is None:
            return self
        if given := [f.name for f in fields(self)[:6] if getattr(self, f.name) is not None]:
            raise RegraftError(
                f"--to '{self.to}' gives all sizes: leave out --{given[0].replace('_', '-')}"
            )
        # Attention without groups (GPT-2, BERT) has no key/value heads of its own to ask for.
        sizes = read_target_sizes(source, self.to)
        heads = sizes["kv"] * sizes["group"]
        kv = None if "group" in source.anatomy.fixed else sizes["kv"]
        wide, deep = sizes["hidden"], sizes["depth"]
        return replace(
            self,
            hidden=wide,
            ffn=sizes["ffn"],
            heads=heads,
            kv_heads=kv,
            head_dim=sizes["dim"],
            layers=deep,
        )


def read_target_sizes(source: Checkpoint, to: str) -> dict[str, int]:
    """Axis sizes of the config in a directory (or of a config.json). RegraftError when it is
    another kind of model.
    """
    file = Path(to) / "config.json" if Path(to).is_dir() else Path(to)
    if not file.is_file():
        raise RegraftError(f"no config.json at '{to}': give a directory with the target's config")
    config = read_json(file)
    anatomy = find_anatomy(config)
    if anatomy.family != source.anatomy.family:
        raise RegraftError(
            f"'{to}' is a {anatomy.family}, the source a {source.anatomy.family}: growth stays in a"
            f" family, give a {source.anatomy.family} config"
        )

    sizes = anatomy.solve(config)
    # Axes that growth never changes must agree.
    fixed = {
        axis: size
        for axis, size in sizes.items()
        if axis in ("vocab", "pos", "expert", "label", "type")
    }
    for axis, size in fixed.items():
        if source.sizes[axis] != size:
            raise RegraftError(
                f"'{to}' has {axis} {size}, the source {source.sizes[axis]}: growth does not change"
                f" {axis}"
            )
    return sizes


def cast_checkpoint(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The same numbers stored in another dtype."""
    if name not in DTYPES:
        raise RegraftError(f"unknown --dtype '{name}': use one of {', '.join(DTYPES)}")
    dtype = DTYPES[name]
    tensors = {
        key: replace(lazy, dtype=dtype, read=lambda lazy=lazy: lazy.read().to(dtype))  # type: ignore[misc]
        for key, lazy in checkpoint.tensors.items()
    }
    step: dict[str, Any] = {"step": "Store", "arguments": {"dtype": name}}
    keys = {key: name for key in ("dtype", "torch_dtype") if key in checkpoint.config} or {
        "dtype": name
    }
    config = checkpoint.config | keys
    return replace(checkpoint, tensors=tensors, config=config, history=(*checkpoint.history, step))
