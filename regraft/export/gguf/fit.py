"""What of a stock model an architecture of llama.cpp does not hold, found in its config."""

from __future__ import annotations

import re
from typing import Any

from ...core.anatomy import Config, find_anatomy
from ...core.stock_config import config_class, find_activation, read_stock_config
from ...mixers.source_windows import source_windows
from .architecture import GGUFArchitecture, find_architecture
from .rotary import find_rope_keys, find_rope_misfits

LAYER_NORM = "attention.layer_norm_epsilon"
# Keys that change nothing in the logits, or that the tensors and windows say already.
ACCOUNTED = re.compile(
    r".*(drop|pdrop|dropout).*|initializer_range|use_cache|.*_token_id|layer_types|.*sliding_window.*"
    r"|max_window_layers|rope_.*|.*partial_rotary.*|pretraining_tp|.*dtype|summary_.*|router_.*"
    r"|output_router_logits|original_max_position_embeddings|reorder_and_upcast_attn|head_dim"
    r"|max_position_embeddings|n_ctx|embedding_dropout|use_bidirectional_attention|cache_implementation"
)


def find_misfits(config: Config) -> list[str]:
    """What llama.cpp cannot hold of a stock model, a line each; nothing when it holds it.

    Args:
        config: of a stock decoder, the mapping in its config.json.
    """
    anatomy = find_anatomy(config)
    architecture = find_architecture(anatomy.family)
    if not anatomy.continues_text(config):
        return [f"{anatomy.family} does not continue text"]
    if architecture is None:
        return [f"llama.cpp has no architecture for {anatomy.family}"]
    stock = read_stock_config(config, anatomy)
    return [
        *find_window_misfits(config, architecture),
        *find_rope_misfits(stock, architecture),
        *find_part_misfits(config, architecture),
        *find_unread_keys(config, architecture),
        *architecture.find_misfits(stock),
    ]


def find_window_misfits(config: Config, architecture: GGUFArchitecture) -> list[str]:
    """Layers that slide where the architecture has none, or by several widths."""
    widths = source_windows(config, architecture.hybrid)
    for layer, width in enumerate(widths):
        if width is not None and not architecture.windows:
            return [
                f"layer {layer} sees the last {width} tokens, in llama.cpp's {architecture.name}"
                " every layer sees all"
            ]
    found = sorted({width for width in widths if width is not None})
    if len(found) > 1:
        return [f"layers have windows of {', '.join(map(str, found))} tokens, llama.cpp has one"]
    return []


def find_part_misfits(config: Config, architecture: GGUFArchitecture) -> list[str]:
    """Biases, activations and widths of heads that the architecture does not have."""
    anatomy = find_anatomy(config)
    name, found = architecture.name, []
    for role, part in anatomy.parts.items():
        base, _, kind = role.rpartition(".")
        present = kind == "bias" and part.is_present(anatomy.fill_defaults(config))
        if present and not part.norm and base not in architecture.biases.split():
            found.append(f"it has '{part.name}', llama.cpp's {name} has no such bias")
            break

    activation = find_host_activation(config)
    if activation not in architecture.activations:
        found.append(
            f"{anatomy.activation.lstrip('_')} is {activation}, llama.cpp's {name} has another"
        )

    if architecture.tied and not anatomy.fill_defaults(config)["tie_word_embeddings"]:
        found.append(f"its head is not the embedding, in llama.cpp's {name} it is")
    sizes = anatomy.solve(config)
    inner = sizes["kv"] * sizes["group"] * sizes["dim"]
    if architecture.square and inner != sizes["hidden"]:
        found.append(
            f"its heads are {inner} wide together and hidden_size is {sizes['hidden']}, in"
            f" llama.cpp's {name} they are equal"
        )
    return found


def find_unread_keys(config: Config, architecture: GGUFArchitecture) -> list[str]:
    """The first setting away from its default that nothing in the file says."""
    anatomy = find_anatomy(config)
    known = {key for key, _ in anatomy.sizes} | set(anatomy.defaults) | set(architecture.reads)
    known |= {anatomy.eps, anatomy.activation}
    usual, base = config_class(anatomy.family)(), config_class(None)()
    return [
        f"{key} is {value}, which llama.cpp's {architecture.name} does not read"
        for key, value in config.items()
        if key not in known
        and not ACCOUNTED.fullmatch(key)
        and hasattr(usual, key)
        and not hasattr(base, key)
        and value != getattr(usual, key)
    ][:1]


def find_host_activation(config: Config) -> str | None:
    """The activation of a model's MLP; None where neither its config nor its table says."""
    whole = find_anatomy(config)
    return find_activation(whole.host_config(config), whole.host(config))


def find_notes(config: Config) -> list[str]:
    """What llama.cpp computes a little differently, a line each."""
    anatomy = find_anatomy(config)
    architecture = find_architecture(anatomy.family)
    own = architecture.find_notes(read_stock_config(config, anatomy)) if architecture else []
    activation = find_host_activation(config)
    if "gelu" not in (activation or ""):  # which llama.cpp takes from a table in half precision
        return own
    exact = " by its tanh approximation" if activation == "gelu" else ""
    return [
        f"llama.cpp computes {activation}{exact} in half precision: its logits differ"
        " from those of transformers by up to a thousandth of the largest",
        *own,
    ]


def find_metadata(config: Config, architecture: GGUFArchitecture) -> dict[str, Any]:
    """The metadata of a stock model, without the architecture's prefix."""
    anatomy = find_anatomy(config)
    stock, sizes = read_stock_config(config, anatomy), anatomy.solve(config)
    full = anatomy.fill_defaults(config)
    norm = "attention.layer_norm_rms_epsilon" if "rms" in anatomy.eps else LAYER_NORM
    keys: dict[str, Any] = {
        "vocab_size": sizes["vocab"],
        "context_length": stock.max_position_embeddings,
        "embedding_length": sizes["hidden"],
        "block_count": sizes["depth"],
        "feed_forward_length": sizes["ffn"],
        "attention.head_count": sizes["kv"] * sizes["group"],
        "attention.head_count_kv": sizes["kv"],
        "attention.key_length": sizes["dim"],
        "attention.value_length": sizes["dim"],
        norm: float(full[anatomy.eps]),
    }
    if anatomy.rotary:
        keys |= find_rope_keys(stock, sizes["dim"])
    widths = source_windows(config) if architecture.windows else ()
    if any(width is not None for width in widths):
        keys |= {
            "attention.sliding_window": next(width for width in widths if width is not None),
            "attention.sliding_window_pattern": [width is not None for width in widths],
        }
    return keys | architecture.keys(stock)
