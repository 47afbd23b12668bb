"""GraniteSWAForCausalLM: Llama-shaped, each layer full or sliding, a learned sink per head.

Windows with learned sinks are this class's own attention. A plain window and a layer that sees
everything are the same with sinks that take nothing. The class has biases on all projections or on
none; those that a layer lacks are zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.anatomy import Config, Key, PlacedPart, find_anatomy
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.stock_config import read_stock_config
from ...families.granite_swa import anatomy as granite
from ...mixers.sink_window import SHUT
from ...mixers.source_windows import KINDS
from ...mixers.window import SINKS, WindowOptions
from ..conversion import (
    build_checkpoint,
    carry_keys,
    copy_tensor,
    find_own,
    find_unread_keys,
    has_mlp_biases,
    mixers_of,
    name_mixer,
    windows_of,
)
from ..llama_shape import find_differences
from ..target import ExportTarget, name_engines

FULL, SLIDING = KINDS


def find_misfits(config: Config) -> list[str]:
    """What the class cannot hold; nothing when it holds the model."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    if host.family == granite.family:
        return ["it is one already: --to hf writes it as it is"]
    if found := find_differences(host_config, host):
        return found
    return find_window_misfits(config) + find_unread_keys(host_config)


def find_window_misfits(config: Config) -> list[str]:
    """Layers that see other tokens than all of them or the last ones, as many in each."""
    for layer, spec in enumerate(mixers_of(config)):
        name = spec["name"] if spec else "sink_window"
        if spec and name == "window" and spec.get("sinks", WindowOptions.sinks):
            return [
                f"the window of layer {layer} also sees the first"
                f" {spec.get('sinks', WindowOptions.sinks)} tokens: linearize with --for"
                " granite_swa, or with --mixer window --sinks 0"
            ]
        if name not in ("window", "sink_window"):
            assert spec is not None
            return [
                f"layer {layer} has the mixer {name_mixer(spec)}: linearize with --for granite_swa"
            ]

    widths = sorted({width for width in windows_of(config) if width is not None})
    if len(widths) < 2:
        return []
    return [
        f"layers have windows of {', '.join(map(str, widths))} tokens, the class has one"
        f" sliding_window: linearize with --window {widths[-1]}"
    ]


def build_config(config: Config) -> dict[str, Any]:
    """config.json in the class's words."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    stock, windows = read_stock_config(host_config, host), windows_of(config)
    attention = host.attention(host_config, 0)
    # The class makes a mask of this width even where no layer slides.
    width = next((one for one in windows if one is not None), stock.max_position_embeddings)
    return {
        **carry_keys(config, granite, "GraniteSWAForCausalLM"),
        "attention_bias": True,
        "mlp_bias": has_mlp_biases(config),
        "attention_multiplier": attention["scale"],
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": width,
        "layer_rope_theta": [stock.rope_parameters["rope_theta"]] * len(windows),
    }


def convert(checkpoint: Checkpoint) -> Checkpoint:
    """The model as one of the class."""
    config = build_config(checkpoint.config)
    return build_checkpoint(
        checkpoint, config, granite, lambda key, part: build_tensor(checkpoint, key, part)
    )


def build_tensor(checkpoint: Checkpoint, key: Key, placed: PlacedPart) -> LazyTensor:
    """One tensor of the class: the model's own, or the number that leaves it out."""
    role, layer = key
    own = find_own(checkpoint, role, layer)
    if own is not None:
        return copy_tensor(own)
    value = SHUT if role == SINKS else 0.0
    dtype = checkpoint.tensors["norm.final.weight", None].dtype
    kind = "zero" if value == 0 else "fresh"
    note = f"constant {value:g}"
    return LazyTensor(
        placed.shape, dtype, Provenance(kind, (), note), constant_reader(placed.shape, value, dtype)
    )


def constant_reader(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Any:
    """Reads a tensor of one number."""

    def read() -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    return read


target = ExportTarget(
    name="granite_swa",
    loads="GraniteSWAForCausalLM of transformers",
    engines=name_engines(
        "GraniteSWAForCausalLM", others=("not SGLang 0.5.23, which leaves out the biases",)
    ),
    find_misfits=find_misfits,
    convert=convert,
    build_config=build_config,
    remix={"mixer": "sink_window", "window": 256, "sinks": 0},
)
