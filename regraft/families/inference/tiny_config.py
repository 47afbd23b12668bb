"""A tiny config of any model type: all sizes shrink, every other key stays.

Keys that several classes share are known by name. Which layers there are is kept: lists with one
entry per layer, stated or derived by the class, are cut to layers of every kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ...core.part import Config
from .layer_keys import move_layer_keys
from .layer_settings import holds_settings, renumber_settings

LAYERS = 4
HIDDEN, HEADS, KV, DIM, FFN, VOCAB, POSITIONS = 64, 4, 2, 16, 96, 97, 128
EXPERTS = 4
OTHER_DIM = 24  # size of a head whose product with the heads is not the hidden size
SMALL = 16  # limit of sizes that no rule names

# Names of keys, as regular expressions, in the order in which they are tried -> what they count.
NAMES = {
    "depth": r"num_hidden_layers|n_layers?|num_layers|num_decoder_layers|decoder_layers",
    "hidden": r"hidden_size|n_embd|d_model|embed_dim|word_embed_proj_dim|lru_width|dim",
    "kv": r"num_key_value_heads|num_kv_heads|n_head_kv|num_key_value_groups",
    "heads": r"num_attention_heads|n_heads?|num_heads|attention_heads|decoder_attention_heads"
    r"|encoder_attention_heads",
    "dim": r"head_dim|kv_channels|d_kv|attention_head_dim|global_head_dim",
    "ffn": r"intermediate_size|n_inner|ffn_dim|ffn_hidden_size|d_ff|hidden_dim|dff|ffn_size"
    r"|decoder_ffn_dim|encoder_ffn_dim|intermediate_size_mlp",
    "expert_ffn": r"moe_intermediate_size|expert_ffn_hidden_size|ffn_hidden_size_moe",
    "shared_ffn": r"\w*shared\w*intermediate_size",
    "vocab": r"vocab_size|vocab_size_per_layer_input|text_vocab_size",
    "pos": r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length"
    r"|max_target_positions|max_source_positions",
    "expert": r"num_experts|num_local_experts|n_routed_experts|moe_num_experts"
    r"|num_routed_experts|moe_num_primary_experts",
    "routed": r"num_experts_per_tok(en)?|moe_k|moe_topk|moe_top_k|num_experts_per_token"
    r"|top_k_experts",
}
# Sizes of parts that few classes have -> tiny ones that go together.
RARE = {
    r"q_lora_rank": 24,
    r"kv_lora_rank|qk_nope_head_dim|v_head_dim": 16,
    r"qk_rope_head_dim|rotary_dim": 8,
    r"qk_head_dim": 24,
    r"\w*(state_size|d_state)": 8,
    r"mamba_(n|num)_heads|mamba_heads": 8,
    r"mamba_(d_head|head_dim|headdim)": 16,
    r"mamba_d_ssm|mamba_intermediate_size": 128,
    r"mamba_dt_rank|time_step_rank": 8,
    r"linear_num_key_heads": 2,
    r"linear_num_value_heads": 4,
    r"linear_(key|value)_head_dim": 16,
    r"n_group|topk_group|num_expert_groups?|mamba_n(um)?_?groups|n_groups": 1,
    r"(n|num|moe_num)_shared_experts?": 1,
    r"\w*chunk_size|\w*window\w*": SMALL,
    r"image_size": 32,
    r"first_k_dense_replace|moe_layer_start_index|num_dense_layers": 1,
    r"num_kv_shared_layers|num_memory_blocks": 1,
    r"index_topk": 64,
    r"index_head_dim": 8,
    r"index_n_heads": 2,
}
# Keys of state-space layers: the inner width over the hidden size, the inner width itself, and
# (number, size) of heads.
EXPAND, INNER = ("mamba_expand", "expand"), ("mamba_d_ssm",)
INNER_HEADS = (("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim"),
               ("num_heads", "head_dim"))  # fmt: skip
# Key of `shrink_config`'s lists for what tensors each layer has; configs have no such key.
TENSORS = "tensors"
# Numbers that are no sizes.
NO_SIZE = re.compile(
    r"\w*(token_id|token_index|_index|_seed|interval|period|offset|pattern|token_ids)|seed"
    r"|num_labels|pretraining_tp|conv_kernel|\w*d_conv|conv_L_cache|\w*step|max_window_layers"
    r"|chunk_size_feed_forward|query_pre_attn_scalar|\w*original_max_position_embeddings"
    r"|\w*temperature\w*|\w*floor_scale|\w*_every_n\w*|top_k|top_p"
)


def find_kind(key: str, aliases: Mapping[str, str]) -> str | None:
    """What a config key counts, one of NAMES; None when its name does not say.

    Args:
        key: of the config.
        aliases: another name of the key -> the key, as the class has them.
    """
    names = [other for other, real in aliases.items() if real == key] + [key]
    for kind, pattern in NAMES.items():
        if any(re.fullmatch(pattern, name) for name in names):
            return kind
    return None


def find_key(full: Config, aliases: Mapping[str, str], kind: str) -> str | None:
    """The key of a config that counts something, one of NAMES; None when there is none."""
    found = [key for key in full if find_kind(key, aliases) == kind]
    # The names that most classes have come first.
    order = NAMES[kind].split("|")
    stated = [key for key in found if full[key] is not None] or found
    rank = {key: order.index(key) if key in order else len(order) for key in stated}
    aliased = {real for other, real in aliases.items() if other in order}

    # A decoder that is taken out of a model with an encoder has the sizes of both in its config.
    def sort(key: str) -> tuple[bool, bool, int]:
        return "decoder_" not in key, key not in aliased, rank[key]

    return min(stated, key=sort, default=None)


def shrink_config(
    full: Config, aliases: Mapping[str, str], lists: Mapping[str, list[Any]]
) -> dict[str, Any]:
    """The keys of a tiny config, those of the whole config with small sizes in them.

    Args:
        full: the config as its class reads it, all keys filled in.
        aliases: another name of a key -> the key.
        lists: those with one entry per layer.
    """
    depth = find_key(full, aliases, "depth")
    lists = {key: values for key, values in lists.items() if len(values) == full.get(depth or "")}
    tiny = dict(full)
    for key, value in full.items():
        if isinstance(value, bool) or not isinstance(value, int | type(None)):
            continue
        size = _choose_size(key, value, full, aliases)
        if size is not None:
            tiny[key] = size

    if depth is not None:
        layers = choose_layers(lists, full[depth])
        tiny[depth] = len(layers)
        for key, values in lists.items():
            if key == TENSORS:
                continue
            size = FFN if find_kind(key, aliases) == "ffn" else None
            tiny[key] = [values[layer] if size is None else size for layer in layers]
        own = {key: value for key, value in full.items() if holds_settings(value)}
        tiny |= {key: renumber_settings(value, layers) for key, value in own.items()}
        tiny |= move_layer_keys({**full, "_order": layers, "_before": {"depth": full[depth]}})
        tiny |= shorten_periods(tiny)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if full.get(key) is not None:
            tiny[key] = ["pad_token_id", "bos_token_id", "eos_token_id"].index(
                key if key != "decoder_start_token_id" else "bos_token_id"
            )
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(full.get(key), dict):
            tiny[key] = shrink_rope(full[key], int(tiny.get("head_dim") or DIM))
    return tiny


def fill_sizes(full: Config, aliases: Mapping[str, str]) -> dict[str, int]:
    """Tiny sizes for keys that are null, which some classes cannot do without."""
    sizes = {"expert_ffn": 32, "shared_ffn": 40, "expert": EXPERTS, "routed": 2, "dim": DIM}
    filled: dict[str, int] = {}
    for key in (key for key, value in full.items() if value is None):
        kind = find_kind(key, aliases)
        rare = next((size for name, size in RARE.items() if re.fullmatch(name, key)), None)
        size = sizes.get(kind or "", rare)
        if size is not None:
            filled[key] = size
    return filled


def _choose_size(
    key: str, value: int | None, full: Config, aliases: Mapping[str, str]
) -> int | None:
    """The tiny value of a key; None when it stays."""
    kind = find_kind(key, aliases)
    if value is None:
        return FFN if kind == "ffn" else None
    if value <= 0:
        return None
    rare = next((size for name, size in RARE.items() if re.fullmatch(name, key)), None)
    if kind is None and rare is not None:
        return min(rare, value)
    if kind is None:
        return None if NO_SIZE.fullmatch(key) or value <= SMALL else _halve(value)

    heads = full.get(find_key(full, aliases, "heads") or "")
    sizes = {
        "hidden": HIDDEN,
        "heads": HEADS,
        "kv": HEADS if value == heads else 1 if value == 1 else KV,
        "dim": DIM if _is_coupled(value, heads, full, aliases) else OTHER_DIM,
        "ffn": FFN,
        "expert_ffn": 32,
        "shared_ffn": 40,
        "vocab": VOCAB,
        "pos": POSITIONS,
        "expert": EXPERTS,
        "routed": min(2, value),
    }
    return sizes.get(kind)


def _is_coupled(dim: int, heads: object, full: Config, aliases: Mapping[str, str]) -> bool:
    """Whether heads times the size of a head is the hidden size."""
    hidden = full.get(find_key(full, aliases, "hidden") or "")
    return not isinstance(heads, int) or heads * dim == hidden


def shorten_periods(config: Config) -> dict[str, int]:
    """Every second layer is of the other kind, where one in several is."""
    changed: dict[str, int] = {}
    for key, period in config.items():
        offset = key.replace("period", "offset")
        if key.endswith("layer_period") and type(config.get(offset)) is int and period > 1:
            changed |= {key: 2, offset: 1}
    return changed


def find_inner_heads(config: Config) -> Iterator[dict[str, int]]:
    """Heads of state-space layers that together are as wide as the class wants: `expand` times the
    hidden size, or a width of their own.

    Args:
        config: a tiny one.
    """
    expand = next((config[key] for key in EXPAND if config.get(key)), None)
    for number, size in INNER_HEADS:
        if expand and config.get(number) is not None and size in config:
            inner = next((config[key] for key in INNER if config.get(key)), expand * HIDDEN)
            yield {number: 8, size: inner // 8}


def _halve(value: int) -> int:
    """A number divided by two until it is at most SMALL."""
    while value > SMALL:
        value = -(-value // 2)
    return value


def choose_layers(lists: Mapping[str, list[Any]], depth: int) -> list[int]:
    """Layers of a deep model that stand for all: the first of every kind, then the last, whose
    kind some classes fix, then others in order.

    Args:
        lists: what is said of each layer, by key.
        depth: the number of layers.
    """
    kinds = [repr([values[layer] for values in lists.values()]) for layer in range(depth)]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)][: 2 * LAYERS]
    others = [layer for layer in (depth - 1, *range(depth - 1)) if layer not in firsts]
    return sorted([*firsts, *others[: max(0, LAYERS - len(firsts))]])


def shrink_rope(rope: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Rotary parameters of heads of another size: lists with a number per pair are cut."""
    return dict(_iter_rope(rope, dim))


def _iter_rope(rope: Mapping[str, Any], dim: int) -> Iterator[tuple[str, Any]]:
    for key, value in rope.items():
        if isinstance(value, Mapping):
            yield key, shrink_rope(value, dim)
        elif key in ("short_factor", "long_factor"):
            share = rope.get("partial_rotary_factor") or 1.0
            yield key, list(value)[: int(dim * share) // 2]
        elif key == "mrope_section":
            yield key, [dim // 2 - 2 * (dim // 6), dim // 6, dim // 6]
        else:
            yield key, value
