"""Mixers with random weights, shapes that differ, rotary tables."""

from __future__ import annotations

import torch

from regraft.mixers import registry
from regraft.mixers.attention import Attention
from regraft.mixers.base import Mixer

LIGER = {
    "gate_from": "keys",
    "activation": "softmax",
    "norm": "none",
    "gate": "none",
    "grouped": True,
}


RADLADS = {
    "shift": False,
    "bonus": False,
    "balance": True,
    "norm": "none",
    "grouped": True,
    "rotary": True,
}


# The layer of Qwen3.5.
QWEN35 = {
    "grouped": False,
    "rotary": False,
    "activation": "silu",
    "norm": True,
    "gate": True,
    "conv": 4,
    "scale": True,
    "biases": False,
    "qk_norm": False,
    "beta_bias": False,
    "length_eps": 1e-6,
}


SHAPES = {
    "9-heads-3-kv": Attention(
        hidden=36, kv=3, group=3, dim=10, scale=0.3, qkv_bias=True, o_bias=True, qk_norm=1e-6
    ),
    "5-heads-no-rotary": Attention(hidden=20, kv=5, group=1, dim=6, scale=6**-0.5, rotary=False),
}

# As DeepSeek has it.
LATENT = Attention(
    hidden=20, kv=3, group=1, dim=10, scale=0.3, latent=8, query_latent=6, rope=4, value=6
)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def made(spec: dict, attention: Attention, seed: int = 0) -> Mixer:
    torch.manual_seed(seed)
    mixer = registry.build(spec, attention)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def projections(mixer: Mixer) -> list[torch.nn.Parameter]:
    """What queries, keys and values are made with."""
    names = [f"{letter}_proj" for letter in "qkv"] + ["q_norm", "k_norm"]
    return [p for name, p in mixer.named_parameters() if name.split(".")[0] in names]


def rotary(
    position: torch.Tensor, attention: Attention
) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not attention.rotary:
        return None
    frequency = 10.0 ** -torch.linspace(0, 2, (attention.rope or attention.dim) // 2)
    angle = (position.unsqueeze(-1) * frequency).repeat(1, 1, 2)
    return angle.cos(), angle.sin()
