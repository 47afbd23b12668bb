"""Each linear mixer against its paper's equation, written out from the weights alone."""

from __future__ import annotations

import math

import torch
from test_mixers import made, relative, rotary
from torch import Tensor, nn

from regraft.mixers.base import Attention, Mixer, Mixing

ATTENTION = Attention(hidden=24, kv=4, group=2, dim=6, scale=6**-0.5, qkv_bias=True, o_bias=True, qk_norm=1e-6)
TIME = 37
TOLERANCE = 1e-5


def applied(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def heads(layer: nn.Linear, x: Tensor, count: int = 8) -> Tensor:
    """(batch, time, hidden) -> (batch, count, time, dim); heads repeated until there are `count`."""
    found = applied(layer, x).unflatten(-1, (-1, ATTENTION.dim)).transpose(1, 2)
    return found.repeat_interleave(count // found.shape[1], 1)


def turned(x: Tensor) -> Tensor:
    """Rotary embedding as a complex product, by the frequencies of `test_mixers.rotary`."""
    first, second = x.chunk(2, -1)
    angle = torch.outer(torch.arange(x.shape[2]), 10.0 ** -torch.linspace(0, 2, ATTENTION.dim // 2))
    product = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((product.real, product.imag), -1)


def normed(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def attended(mixer: Mixer, x: Tensor, turn: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, values (batch, 8, time, dim) as the source's attention has them."""
    q, k, v = (heads(layer, x) for layer in (mixer.qkv.q, mixer.qkv.k, mixer.qkv.v))
    q, k = normed(q) * mixer.qkv.q_norm.weight, normed(k) * mixer.qkv.k_norm.weight
    return (turned(q), turned(k), v) if turn else (q, k, v)


def case(spec: dict) -> tuple[Mixer, Tensor, Tensor]:
    """A mixer, its input, and its output."""
    mixer = made(spec, ATTENTION)
    x = torch.randn(2, TIME, ATTENTION.hidden)
    return mixer, x, mixer(x, Mixing(rotary(torch.arange(TIME).expand(2, TIME), ATTENTION)))[0]


def out(mixer: Mixer, per_head: Tensor) -> Tensor:
    """(batch, heads, time, dim) through the output projection."""
    return applied(mixer.o, per_head.transpose(1, 2).flatten(-2))


@torch.no_grad()
def test_retnet_is_retention_in_its_parallel_form() -> None:
    mixer, x, y = case({"name": "retnet"})
    q, k, v = attended(mixer, x)
    distance = torch.arange(TIME)[:, None] - torch.arange(TIME)
    gamma = 1 - 2.0 ** (-5 - torch.arange(8))
    decay = gamma[:, None, None] ** distance * (distance >= 0)
    retained = (q @ k.mT / math.sqrt(ATTENTION.dim) * decay) @ v
    gated = heads(mixer.gate, x) * heads(mixer.gate, x).sigmoid()
    assert (
        relative(y, out(mixer, gated * retained / (retained.square().mean(-1, keepdim=True) + 1e-5).sqrt())) < TOLERANCE
    )


@torch.no_grad()
def test_lightning_is_a_loop_with_fixed_decays() -> None:
    mixer, x, y = case({"name": "lightning"})
    q, k, v = attended(mixer, x)
    decay = torch.exp(-(0.5 ** torch.arange(1.0, 9.0)))
    state, outputs = torch.zeros(2, 8, 6, 6), []
    for t in range(TIME):
        state = decay[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((state * q[:, :, t, :, None] / math.sqrt(6)).sum(-2))
    assert relative(y, out(mixer, torch.stack(outputs, 2))) < TOLERANCE
