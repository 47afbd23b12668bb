"""Models for llama.cpp's rwkv6qwen2, and what it computes of a file's tensors, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.gguf import save_for_gguf
from regraft.core.checkpoint import Checkpoint
from regraft.export import find_target
from regraft.mixers.remix import Remix

SQUARE = {"hidden": 72}  # 9 heads of 8


def make_student(path: Path, family: str = "llama", **options: Any) -> Checkpoint:
    """A model in the target's form, every new weight of which does something."""
    source = Checkpoint.open(save_for_gguf(path, family, **SQUARE))
    return stir(remix(**options)(source))


def remix(**options: Any) -> Remix:
    """What the target asks for, with other options of the mixer."""
    chosen = find_target("rwkv6qwen2").remix
    return Remix(**chosen | {"options": chosen["options"] | options})


def stir(checkpoint: Checkpoint, size: float = 0.3) -> Checkpoint:
    """The model with random numbers in all that the mixer begins with itself."""
    generator = torch.Generator().manual_seed(3)
    values = {}
    for key, name in checkpoint.names.items():
        local = key[0].removeprefix("mixer.")
        if local != key[0] and not local.endswith("proj.weight"):
            value = size * torch.randn(checkpoint.tensors[key].shape, generator=generator)
            values[name] = value - 3 * (local in ("decay", "decay_out.bias"))
    reads = {name: (lambda value=value: value) for name, value in values.items()}
    return checkpoint.with_readers(reads, {"step": "Train"})


def run_file(tensors: dict[str, Tensor], facts: dict[str, Any], row: list[int]) -> Tensor:
    """Logits (time, vocab), as llama.cpp's src/models/rwkv6qwen2.cpp says, token by token.

    Args:
        tensors: of the file.
        facts: its metadata, without the architecture's prefix.
        row: of tokens.
    """
    weights = {name: value.double() for name, value in tensors.items()}
    eps = facts["attention.layer_norm_rms_epsilon"]
    x = weights["token_embd.weight"][row]
    for layer in range(facts["block_count"]):
        own = {
            name.removeprefix(f"blk.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"blk.{layer}.")
        }
        x = x + mix_tokens(rms(x, own["attn_norm.weight"], eps), own, facts)
        h = rms(x, own["ffn_norm.weight"], eps)
        inner = torch.nn.functional.silu(h @ own["ffn_gate.weight"].T) * (
            h @ own["ffn_up.weight"].T
        )
        x = x + inner @ own["ffn_down.weight"].T
    return rms(x, weights["output_norm.weight"], eps) @ weights["output.weight"].T


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def mix_tokens(x: Tensor, own: dict[str, Tensor], facts: dict[str, Any]) -> Tensor:
    """`build_rwkv6_time_mix` where a layer has no `time_mix_first`."""
    dim, kv, hidden = facts["wkv.head_size"], facts["attention.head_count_kv"], x.shape[-1]
    part = {name.removeprefix("time_mix_"): value for name, value in own.items()}
    change = torch.cat((torch.zeros_like(x[:1]), x[:-1])) - x
    low = torch.tanh((x + change * part["lerp_x.weight"].flatten()) @ part["w1.weight"].T)
    mixes = torch.einsum("tsr,shr->sth", low.unflatten(-1, (5, -1)), part["w2.weight"])
    mixes = mixes + part["lerp_fused.weight"].view(5, 1, hidden)
    w, k, v, r, g = x + mixes * change

    def project(name: str, value: Tensor) -> Tensor:
        out = value @ part[f"{name}.weight"].T + part.get(f"{name}.bias", 0)
        heads = out.unflatten(-1, (-1, dim))
        return (
            heads.repeat_interleave(hidden // dim // kv, 1) if name in ("key", "value") else heads
        )

    r, k, v = project("receptance", r), project("key", k), project("value", v)
    w = torch.tanh(w @ part["decay_w1.weight"].T) @ part["decay_w2.weight"].T
    w = (-(w + part["decay.weight"]).exp()).exp().unflatten(-1, (-1, dim))
    k = k * (1 - w)
    state, out = torch.zeros(hidden // dim, dim, dim, dtype=x.dtype), []
    for token in range(len(x)):
        state = state * w[token][..., None] + k[token][..., None] * v[token][:, None]
        out.append((r[token] * dim**-0.5)[:, None] @ state)
    read = torch.stack(out).flatten(1)
    return (read * torch.sigmoid(g @ part["gate.weight"].T)) @ part["output.weight"].T
