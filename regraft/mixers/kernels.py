"""flash-linear-attention's kernels (MIT licence) for tensors on a GPU, where that package is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"
MAX_KEY_DIM = 256  # keys that the delta rule's kernel takes


@cache
def find_kernel(operation: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`fla.ops.<operation>.chunk_<operation>`, None where the package is not installed."""
    try:
        found: Any = getattr(importlib.import_module(f"fla.ops.{operation}"), f"chunk_{operation}")
    except ImportError:
        return None
    return found


def try_fused_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    segments: Tensor | None,
    state: Tensor | None,
    bonus: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """Outputs and last state as `dispatch.recur` gives them, q, k and v in `dtype`; None where no kernel does it.

    That is without the package, on another device, for wider keys than the delta rule's kernel takes, and for packed
    rows that go on from a state. The kernels have time before heads, one query head per state, and documents of all
    rows in one, told apart by `cu_seqlens`.
    """
    operation = "gated_delta_rule" if beta is not None else "simple_gla" if g.ndim == 3 else "gla"
    operation = "rwkv6" if bonus is not None else operation
    impossible = q.device.type != DEVICE or (segments is not None and state is not None)
    if (
        impossible
        or (beta is not None and q.shape[-1] > MAX_KEY_DIM)
        or (kernel := find_kernel(operation)) is None
    ):
        return None
    group = q.shape[1] // k.shape[1]

    def per_query(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, 1) if group > 1 else x

    k, v, g = (per_query(x) for x in (k, v, g))
    low = [x.to(dtype) for x in (q, k, v)]
    given = [
        x.transpose(1, 2).contiguous()
        for x in (*low, g, *([] if beta is None else [per_query(beta)]))
    ]
    if bonus is not None:
        given.append(bonus.float().repeat_interleave(group, 0))
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if segments is not None:
        given = [x.flatten(0, 1).unsqueeze(0) if x.ndim > 2 else x for x in given]
        first = torch.ones_like(segments, dtype=torch.bool)
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = first.flatten().nonzero().squeeze(1)
        options["cu_seqlens"] = torch.cat((starts, starts.new_tensor([first.numel()])))
    elif state is not None:
        options["initial_state"] = per_query(state)
    out, last = kernel(*given, **options)
    if segments is not None:
        out = out.squeeze(0).unflatten(0, segments.shape)
        last = last[first.sum(1).cumsum(0) - 1]  # each row's last document
    return out.transpose(1, 2).float(), last.float()[:, ::group]
