"""What targets for Llama-shaped models share: keys, mixers and tensors of the model they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..core.anatomy import Anatomy, Config, Key, PlacedPart, find_anatomy
from ..core.checkpoint import Checkpoint, LazyTensor, Provenance
from ..core.stock_config import config_class, read_stock_config
from ..mixers.source_windows import source_windows
from ..mixers.window import WindowOptions

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


def name_mixer(spec: Mapping[str, Any]) -> str:
    """A mixer's name; for one beside a window both."""
    inner = f" ({spec['linear']['name']} beside a window)" if spec["name"] == "gated" else ""
    return f"{spec['name']}{inner}"


def has_mlp_biases(config: Config) -> bool:
    """Whether the MLPs of a model have biases."""
    anatomy = find_anatomy(config)
    placed = anatomy.host(config).place(anatomy.host_config(config))
    return any(role.startswith("mlp.") and role.endswith(".bias") for role, _ in placed)


def windows_of(config: Config) -> list[int | None]:
    """How many tokens each layer sees; None: all."""
    host = find_anatomy(config).host_config(config)
    return [
        spec.get("window", WindowOptions.window) if spec else width
        for spec, width in zip(mixers_of(config), source_windows(host), strict=True)
    ]


def carry_keys(config: Config, anatomy: Anatomy, architecture: str) -> dict[str, Any]:
    """config.json of a stock class, as far as it is Llama's.

    Args:
        config: of the model.
        anatomy: of the class.
        architecture: its name.
    """
    whole = find_anatomy(config)
    host, host_config = whole.host(config), whole.host_config(config)
    stock, attention = read_stock_config(host_config, host), host.attention(host_config, 0)
    base, usual = config_class(None)(), type(stock)()
    # Keys that every class takes, and those that none reads, stay as they are.
    shared = {
        key: value
        for key, value in host_config.items()
        if key not in (*TAKEN, *ACCOUNTED) and (hasattr(base, key) or not hasattr(usual, key))
    }
    return {
        **shared,
        "model_type": anatomy.family,
        "architectures": [architecture],
        **{key: getattr(stock, key) for key in TAKEN if hasattr(stock, key)},
        "head_dim": attention["dim"],
        "num_key_value_heads": attention["kv"],
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
    }


def copy_tensor(own: LazyTensor) -> LazyTensor:
    """A tensor of the model as it is."""
    return LazyTensor(own.shape, own.dtype, Provenance("copied", own.provenance.sources), own.read)


def build_checkpoint(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    anatomy: Anatomy,
    build_tensor: Callable[[Key, PlacedPart], LazyTensor],
) -> Checkpoint:
    """A model in another class.

    Args:
        checkpoint: the model.
        config: of the class.
        anatomy: of the class.
        build_tensor: one tensor of the class.
    """
    placed = anatomy.place(config)
    return Checkpoint(
        checkpoint.origin,
        config,
        anatomy,
        anatomy.solve(config),
        {key: build_tensor(key, part) for key, part in placed.items()},
        {key: part.name for key, part in placed.items()},
        checkpoint.folder,
        checkpoint.dropped,
        checkpoint.history,
        in_memory=checkpoint.in_memory,
        allow_nonfinite=checkpoint.allow_nonfinite,
        copy_code=checkpoint.copy_code,
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
