"""granitehybrid: Granite's hybrid class without experts, full layers and Mamba-2 layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ....families.granitemoehybrid import LINEAR
from ..architecture import GGUFArchitecture
from ..states import count_taps, store_decay, store_taps


def find_keys(stock: Any) -> dict[str, Any]:
    """Factors, which layers are full, the sizes of the others, and whether full layers rotate."""
    kv = stock.num_key_value_heads
    return {
        "attention.scale": float(stock.attention_multiplier),
        "embedding_scale": float(stock.embedding_multiplier),
        "residual_scale": float(stock.residual_multiplier),
        "logit_scale": float(stock.logits_scaling),
        # A layer without keys is a Mamba-2 layer.
        "attention.head_count_kv": [0 if kind in LINEAR else kv for kind in stock.layer_types],
        # This key, which says something else in general, switches rotary positions.
        "rope.scaling.finetuned": stock.position_embedding_type == "rope",
        "ssm.conv_kernel": count_taps(stock.mamba_d_conv),
        "ssm.state_size": stock.mamba_d_state,
        "ssm.group_count": stock.mamba_n_groups,
        "ssm.time_step_rank": stock.mamba_n_heads,
        "ssm.inner_size": stock.mamba_n_heads * stock.mamba_d_head,
    }


def store(role: str, value: Tensor, sizes: Mapping[str, int]) -> Tensor:
    """A tensor in llama.cpp's form."""
    if role == "mamba.conv.weight":
        return store_taps(value)
    if role == "mamba.norm.weight":
        return value.unflatten(0, (sizes["ssm_group"], -1))
    if role == "mamba.A_log":
        return store_decay(value)[:, None]
    return value[:, None] if role == "mamba.D" else value


def find_misfits(stock: Any) -> list[str]:
    """Experts, layers of one kind alone, other widths than twice the hidden size, limits."""
    found = []
    if stock.num_local_experts:
        found.append(f"it has {stock.num_local_experts} experts, which regraft does not write")
    if len({kind in LINEAR for kind in stock.layer_types}) < 2:
        found.append(
            "its layers are all of one kind, llama.cpp's granitehybrid runs only with both"
        )
    inner = stock.mamba_n_heads * stock.mamba_d_head
    if inner != 2 * stock.hidden_size:
        found.append(
            f"its Mamba-2 layers are {inner} wide, in llama.cpp's granitehybrid they are twice"
            f" hidden_size ({2 * stock.hidden_size})"
        )
    low, high = (float(limit) for limit in stock.time_step_limit or (0, math.inf))
    if low > 0 or high < math.inf:
        found.append(f"time_step_limit is {low:g} to {high:g}, llama.cpp limits no steps")
    return found


architecture = GGUFArchitecture(
    name="granitehybrid",
    families=("granitemoehybrid",),
    names="GRANITE_HYBRID",
    biases="attn.q attn.k attn.v attn.o mamba.conv",
    needed="mamba.conv",
    split="mlp.gate_up",
    reads=(
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "attention_multiplier",
        "position_embedding_type",
        "num_local_experts",
        "num_experts_per_tok",
        "intermediate_size",
        "mamba_expand",
        "mamba_chunk_size",
        "time_step_limit",
    ),
    ropes=("default", "linear", "yarn", "llama3"),
    interleaved=True,
    hybrid=True,
    renamed={
        "mamba.dt_bias": "blk.{}.ssm_dt.bias",
        "mlp.gate.weight": "blk.{}.ffn_gate.weight",
        "mlp.up.weight": "blk.{}.ffn_up.weight",
        "mlp.down.weight": "blk.{}.ffn_down.weight",
    },
    scale=lambda stock: float(stock.attention_multiplier),
    store=store,
    keys=find_keys,
    find_misfits=find_misfits,
)
