"""GraniteSWAForCausalLM: Llama-shaped, each layer full or sliding, a learned sink per head.

Windows with learned sinks are this class's own attention. A plain window and a layer that sees
everything are the same with sinks that take nothing. The class has biases on all projections or on
none; those that a layer lacks are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...core.anatomy import Config, Key, PlacedPart, find_anatomy
from ...core.checkpoint import Checkpoint, LazyTensor, Provenance
from ...core.stock_config import config_class, read_stock_config
from ...families.granite_swa import anatomy as granite
from ...mixers.sink_window import SHUT
from ...mixers.source_windows import KINDS, source_windows
from ...mixers.window import WindowOptions
from ..llama_shape import find_differences
from ..target import ExportTarget

FULL, SLIDING = KINDS
SINKS = "attn.sinks.weight"
# Keys of a Llama-shaped config that are written anew or taken over by name.
TAKEN = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range rms_norm_eps
    use_cache pad_token_id bos_token_id eos_token_id tie_word_embeddings rope_parameters
    attention_dropout""".split()
# What each of these says is in the layers' windows, parameters or rotary positions; or nothing of
# today's classes reads it.
ACCOUNTED = """model_type architectures auto_map attention_bias mlp_bias layer_types sliding_window
    use_sliding_window max_window_layers rope_theta rope_scaling partial_rotary_factor
    original_max_position_embeddings pretraining_tp dtype torch_dtype transformers_version
    _name_or_path""".split()


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
            inner = f" ({spec['linear']['name']} beside a window)" if name == "gated" else ""
            return [f"layer {layer} has the mixer {name}{inner}: linearize with --for granite_swa"]

    widths = sorted({width for width in windows_of(config) if width is not None})
    if len(widths) < 2:
        return []
    return [
        f"layers have windows of {', '.join(map(str, widths))} tokens, the class has one"
        f" sliding_window: linearize with --window {widths[-1]}"
    ]


def find_unread_keys(config: Config) -> list[str]:
    """Settings of the source's class, away from their defaults, that this class does not have."""
    anatomy = find_anatomy(config)
    kind, base = config_class(anatomy.family), config_class(None)()
    usual = kind()
    return [
        f"{key} is {value}, which the class does not read"
        for key, value in config.items()
        if key not in (*TAKEN, *ACCOUNTED)
        and hasattr(usual, key)
        and not hasattr(base, key)
        and value != getattr(usual, key)
    ][:1]


def mixers_of(config: Config) -> list[dict[str, Any] | None]:
    """The spec of each layer's mixer; None for a layer of the source."""
    depth = find_anatomy(config).solve(config)["depth"]
    specs: list[dict[str, Any] | None] = config.get("mixers") or [None] * depth
    return specs


def windows_of(config: Config) -> list[int | None]:
    """How many tokens each layer sees; None: all."""
    host = find_anatomy(config).host_config(config)
    return [
        spec.get("window", WindowOptions.window) if spec else width
        for spec, width in zip(mixers_of(config), source_windows(host), strict=True)
    ]


def build_config(config: Config) -> dict[str, Any]:
    """config.json in the class's words."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    stock, windows = read_stock_config(host_config, host), windows_of(config)
    attention, base, usual = host.attention(host_config, 0), config_class(None)(), type(stock)()
    # Keys that every class takes, and those that none reads, stay as they are.
    shared = {
        key: value
        for key, value in host_config.items()
        if key not in (*TAKEN, *ACCOUNTED) and (hasattr(base, key) or not hasattr(usual, key))
    }
    # The class makes a mask of this width even where no layer slides.
    width = next((one for one in windows if one is not None), stock.max_position_embeddings)
    return {
        **shared,
        "model_type": granite.family,
        "architectures": ["GraniteSWAForCausalLM"],
        **{key: getattr(stock, key) for key in TAKEN if hasattr(stock, key)},
        "head_dim": attention["dim"],
        "num_key_value_heads": attention["kv"],
        "attention_bias": True,
        "mlp_bias": any(
            role.startswith("mlp.") and role.endswith(".bias")
            for role, _ in host.place(host_config)
        ),
        "attention_multiplier": attention["scale"],
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "layer_types": [FULL if window is None else SLIDING for window in windows],
        "sliding_window": width,
        "layer_rope_theta": [stock.rope_parameters["rope_theta"]] * len(windows),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
    }


def convert(checkpoint: Checkpoint) -> Checkpoint:
    """The model as one of the class."""
    config = build_config(checkpoint.config)
    placed = granite.place(config)
    tensors = {key: build_tensor(checkpoint, key, part) for key, part in placed.items()}
    return Checkpoint(
        checkpoint.origin,
        config,
        granite,
        granite.solve(config),
        tensors,
        {key: part.name for key, part in placed.items()},
        checkpoint.folder,
        checkpoint.dropped,
        checkpoint.history,
        in_memory=checkpoint.in_memory,
        allow_nonfinite=checkpoint.allow_nonfinite,
        copy_code=checkpoint.copy_code,
    )


def build_tensor(checkpoint: Checkpoint, key: Key, placed: PlacedPart) -> LazyTensor:
    """One tensor of the class: the model's own, or the number that leaves it out."""
    role, layer = key
    own = find_own(checkpoint, role, layer)
    if own is not None:
        return LazyTensor(
            own.shape, own.dtype, Provenance("copied", own.provenance.sources), own.read
        )
    value = SHUT if role == SINKS else 0.0
    dtype = checkpoint.tensors["norm.final.weight", None].dtype
    kind = "zero" if value == 0 else "fresh"
    note = f"constant {value:g}"
    return LazyTensor(
        placed.shape, dtype, Provenance(kind, (), note), constant_reader(placed.shape, value, dtype)
    )


def find_own(checkpoint: Checkpoint, role: str, layer: int | None) -> LazyTensor | None:
    """The model's tensor of a role, alone or fused with others; None where it has none."""
    spec = mixers_of(checkpoint.config)[layer] if layer is not None else None
    if spec and role.startswith("attn."):
        _, part, kind = role.split(".")
        local = "sinks" if part == "sinks" else f"{part}_proj.{kind}"
        return checkpoint.tensors.get((f"mixer.{local}", layer))
    if (role, layer) in checkpoint.tensors:
        return checkpoint.tensors[role, layer]
    host = checkpoint.anatomy.host(checkpoint.config)
    fused: Mapping[str, Any] = {
        f"{name}.{whole.rpartition('.')[2]}": part
        for whole, part in host.parts.items()
        for name in part.fused
        if (whole, layer) in checkpoint.tensors
    }
    return checkpoint[role, layer] if role in fused else None


def constant_reader(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Any:
    """Reads a tensor of one number."""

    def read() -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    return read


target = ExportTarget(
    name="granite_swa",
    loads="GraniteSWAForCausalLM of transformers",
    find_misfits=find_misfits,
    convert=convert,
    build_config=build_config,
    remix={"mixer": "sink_window", "window": 256, "sinks": 0},
)
