"""Experts in place of an MLP: which class holds them, its config, and what each tensor holds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.anatomy import Anatomy, Key, PlacedPart, find_anatomy
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.lineage import versions
from ..core.shapes import Float
from ..errors import RegraftError
from ..io.schema import shorten
from ..modeling.meta import build_stock_config
from .target_config import NEUTRAL, find_reason, read_with_defaults
from .tensor import SeededRandom, compute_dtype, estimate_std

ROUTER = "mlp.router.weight"
# A map of an expert, by its number, or of the one that is shared by all tokens.
EXPERT_MAP = re.compile(r"mlp\.(\d+|shared)\.(gate|up|down)\.weight")
SHARED_GATE = "mlp.shared_gate.weight"
DEFAULT_STD = 0.02  # of a router where the config has no initializer_range


@dataclass(frozen=True)
class ExpertClass:
    """The stock class that holds experts with the MLP of a dense family.

    Its router takes the softmax over all experts and gives the `top_k` largest, whose gates add to
    one.
    """

    name: str
    # Keys with one value: gates that add to one, experts in every layer.
    sets: Mapping[str, Any] = field(default_factory=dict)
    # Whether every token also goes to a shared expert, through a gate of its own.
    has_shared: bool = False


EVERY_LAYER = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
# Family with experts -> its class. These are the routers for which growth is proved.
CLASSES = {
    "mixtral": ExpertClass("MixtralForCausalLM"),
    "qwen3_moe": ExpertClass("Qwen3MoeForCausalLM", EVERY_LAYER),
    "qwen2_moe": ExpertClass("Qwen2MoeForCausalLM", EVERY_LAYER, has_shared=True),
}
# Dense family -> the one that has experts in place of its MLP.
TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe", "qwen2": "qwen2_moe"}
# Keys of a dense class that say which layers have a window; there must be none.
WINDOW_KEYS = ("layer_types", "max_window_layers")


def find_expert_family(source: Checkpoint) -> str:
    """The family that holds a checkpoint with experts; its own where it has some already.

    RegraftError when there is none.
    """
    family = source.anatomy.family
    if family in CLASSES:
        return family
    if source.anatomy.routed or family not in TARGETS:
        known = ", ".join([*TARGETS, *CLASSES])
        raise RegraftError(
            f"--experts is not for {family}: its experts are not known to be exact, use one of"
            f" {known}"
        )
    if "head.weight" not in source.anatomy.parts:
        raise RegraftError(
            f"--experts is not for {source.config['architectures'][0]}: only models with the head"
            " of a language model are written as another class"
        )
    return TARGETS[family]


def build_expert_config(source: Checkpoint, to: str, experts: int, top_k: int) -> dict[str, Any]:
    """The config of a dense model with experts in place of its MLP.

    RegraftError for a key that the class with experts does not have, and for sizes that it cannot
    hold.

    Args:
        source: the dense model.
        to: the family with experts.
        experts: how many.
        top_k: how many a token is sent to.
    """
    # Both classes' defaults are written out: they differ.
    full, stock = read_with_defaults(source.config), type_defaults(source.anatomy.family)
    kinds = full.pop("layer_types", None) or []
    anatomy, target = find_anatomy({"model_type": to}), CLASSES[to]
    known = {*type_defaults(to), *(key for key, _ in anatomy.sizes)}
    if "sliding_attention" in kinds and len({*kinds}) > 1:
        raise RegraftError(
            f"{to} has no layer_types, and layers of '{source.origin}' differ: {shorten(kinds)}"
        )
    for key, value in full.items():
        is_said = key in known or key in WINDOW_KEYS or find_reason(key, NEUTRAL)
        if not is_said and value not in (stock.get(key), None):
            raise RegraftError(
                f"{to} has no {key}, which is {shorten(value)} in '{source.origin}': experts would"
                " change the function"
            )

    sizes = expert_sizes(source, anatomy, experts)
    config = {key: value for key, value in full.items() if key in known}
    config |= anatomy.config_keys(sizes) | dict(target.sets) | {anatomy.routed: top_k}
    config |= {
        "model_type": to,
        "architectures": [target.name],
        "transformers_version": versions()["transformers"],
    }
    config |= {key: source.config[key] for key in ("dtype", "torch_dtype") if key in source.config}
    return find_anatomy(config).resize_config(config, sizes)


def type_defaults(family: str) -> dict[str, Any]:
    """What a family's class says without a config.json."""
    return build_stock_config({"model_type": family}).to_dict()


def expert_sizes(source: Checkpoint, anatomy: Anatomy, experts: int) -> dict[str, int]:
    """Axis sizes of a dense model with experts as wide as its MLP."""
    axes = {axis for _, text in anatomy.sizes for axis in text.split()}
    widths = {axis: source.sizes["ffn"] for axis in axes if axis.endswith("ffn")}
    return {**source.sizes, **widths, "expert": experts}


@dataclass(frozen=True)
class ExpertTensors:
    """What the tensors of a model with more experts hold."""

    source: Checkpoint
    # The target's config; of a dense source another class's.
    config: Mapping[str, Any]
    # Standard deviation of the noise on every map of an expert, relative to the map's own.
    noise: float
    # Share of every expert's neurons that are drawn anew (Drop-Upcycling).
    reinit: float
    seed: int

    @property
    def is_dense(self) -> bool:
        """Whether the source has an MLP where the target has experts."""
        return not self.source.anatomy.routed

    def build(self, key: Key, target: PlacedPart) -> LazyTensor:
        """One tensor of the target."""
        role, layer = key
        if (match := EXPERT_MAP.fullmatch(role)) and layer is not None:
            return self._build_expert(match[1], match[2], layer, key, target)
        if self.is_dense and role == SHARED_GATE:
            note = "a gate of one half on the shared expert"
            dtype = self.source.tensors["embed.weight", None].dtype
            return LazyTensor(
                target.shape,
                dtype,
                Provenance("zero", (), note),
                lambda: torch.zeros(target.shape, dtype=dtype),
            )
        if role == ROUTER:
            return self._draw_router(target, layer) if self.is_dense else self._repeat_router(key)
        return self.source.tensors[key]

    def _build_expert(
        self, which: str, kind: str, layer: int, key: Key, target: PlacedPart
    ) -> LazyTensor:
        """A map of an expert: of the MLP, or of the expert that it is a copy of."""
        if self.is_dense:
            origin = self.source[f"mlp.{kind}.weight", layer]
        elif which == "shared":
            return self.source.tensors[key]
        else:
            origin = self.source.tensors[
                f"mlp.{int(which) % self.source.sizes['expert']}.{kind}.weight", layer
            ]
        # What the shared expert gives with a gate of one half, the others give the rest of.
        family = find_anatomy(self.config).family
        halves = self.is_dense and CLASSES[family].has_shared and which != "shared"
        factor = 0.5 if halves and kind == "down" else 1.0
        changes = which != "shared" and bool(self.noise or self.reinit)
        if factor == 1.0 and not changes:
            return replace(origin, shape=target.shape)

        def compute() -> Float[Tensor, "*stored"]:
            value = origin.read().to(compute_dtype(origin.dtype)) * factor
            if changes:
                value = self._change(value, which, kind, layer)
            return value.to(origin.dtype)

        note = f"of expert {which}: times {factor:g}, noise {self.noise:g}, {self.reinit:g} anew"
        return replace(
            origin,
            shape=target.shape,
            provenance=Provenance("grown", origin.provenance.sources, note),
            read=compute,
        )

    def _change(
        self, value: Float[Tensor, "out in"], which: str, kind: str, layer: int
    ) -> Float[Tensor, "out in"]:
        """A map of an expert with some neurons drawn anew, and noise."""
        random = SeededRandom(self.seed, f"mlp.{which}.{kind}.{layer}")
        std = estimate_std(value)
        if self.reinit:
            # The same neurons in all three maps of an expert (arXiv 2502.19261, section 3.1).
            axis = 1 if kind == "down" else 0
            chosen = self._choose_neurons(which, layer, value.shape[axis])
            old = value.index_select(axis, chosen)
            fresh = random.uniform(old.shape, float(old.std()), value.dtype) + old.mean()
            value = value.index_copy(axis, chosen, fresh)
        if self.noise:
            value = value + random.uniform(value.shape, self.noise * std, value.dtype)
        return value

    def _choose_neurons(self, which: str, layer: int, count: int) -> Tensor:
        draw = SeededRandom(self.seed, f"neurons of expert {which}.{layer}")
        order = draw.uniform((count,), 1.0, torch.float32).argsort(stable=True)
        return order[: round(self.reinit * count)]

    def _draw_router(self, target: PlacedPart, layer: int | None) -> LazyTensor:
        """A random router: whatever it chooses among equal experts gives the same."""
        dtype = self.source.tensors["embed.weight", None].dtype
        std = float(self.config.get("initializer_range") or DEFAULT_STD)

        def compute() -> Float[Tensor, "expert hidden"]:
            return SeededRandom(self.seed, f"{ROUTER}.{layer}").uniform(target.shape, std, dtype)

        return LazyTensor(target.shape, dtype, Provenance("fresh", (), "random"), compute)

    def _repeat_router(self, key: Key) -> LazyTensor:
        """The rows of a router once more for each copy of the experts."""
        lazy, count = self.source.tensors[key], self.source.sizes["expert"]
        experts = find_anatomy(self.config).solve(self.config)["expert"]
        provenance = Provenance(
            "grown", lazy.provenance.sources, f"rows of {count} experts for {experts}"
        )
        return replace(
            lazy,
            shape=(experts, *lazy.shape[1:]),
            provenance=provenance,
            read=lambda: lazy.read().repeat(experts // count, 1),
        )
