"""Kernels of flash-linear-attention (MIT licence) for tensors on a GPU, where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..core.shapes import Bool, Float, Int

DEVICE = "cuda"
MAX_KEY_DIM = 256  # width of keys up to which the delta rule's kernel runs


@cache
def find_kernel(operation: str) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """`fla.ops.<operation>.chunk_<operation>`, None where the package is not installed."""
    try:
        module = importlib.import_module(f"fla.ops.{operation}")
    except ImportError:
        return None
    kernel: Callable[..., tuple[Tensor, Tensor]] = getattr(module, f"chunk_{operation}")
    return kernel


def try_fused_kernel(
    q: Float[Tensor, "batch queries time dim"],
    k: Float[Tensor, "batch heads time dim"],
    v: Float[Tensor, "batch heads time values"],
    g: Float[Tensor, "batch heads time"] | Float[Tensor, "batch heads time dim"],
    beta: Float[Tensor, "batch heads time"] | None,
    segments: Int[Tensor, "batch time"] | None,
    state: Float[Tensor, "batch heads dim values"] | None,
    bonus: Float[Tensor, "heads dim"] | None,
    dtype: torch.dtype,
) -> (
    tuple[Float[Tensor, "batch queries time values"], Float[Tensor, "batch heads dim values"]]
    | None
):
    """(outputs, last state) as `dispatch.recur` gives them, or None where no kernel does it.

    None is the answer without the package, on another device, for wider keys than the delta rule's
    kernel takes, and for packed rows that go on from a state. Arguments as in `dispatch.recur`.
    """
    if not _is_supported(q, beta, segments, state):
        return None
    kernel = find_kernel(_operation(g, beta, bonus))
    if kernel is None:
        return None

    # The kernels have one query head per state, and time before heads.
    group = q.shape[1] // k.shape[1]

    def per_query(x: Float[Tensor, "batch heads ..."]) -> Float[Tensor, "batch queries ..."]:
        return x.repeat_interleave(group, 1) if group > 1 else x

    k, v, g = (per_query(x) for x in (k, v, g))
    inputs = [*(x.to(dtype) for x in (q, k, v)), g]
    if beta is not None:
        inputs.append(per_query(beta))
    inputs = [x.transpose(1, 2).contiguous() for x in inputs]
    if bonus is not None:
        inputs.append(bonus.float().repeat_interleave(group, 0))

    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if segments is not None:
        # Documents of all rows stand in one row of the kernel's, told apart by `cu_seqlens`. Only
        # the bonus, (heads, dim), has no rows to join.
        inputs = [x.flatten(0, 1).unsqueeze(0) if x.ndim > 2 else x for x in inputs]
        first = _first_tokens(segments)
        starts = first.flatten().nonzero().squeeze(1)
        options["cu_seqlens"] = torch.cat((starts, starts.new_tensor([first.numel()])))
    elif state is not None:
        options["initial_state"] = per_query(state)

    out, last = kernel(*inputs, **options)
    if segments is not None:
        out = out.squeeze(0).unflatten(0, segments.shape)
        last = last[first.sum(1).cumsum(0) - 1]  # each row's last document
    return out.transpose(1, 2).float(), last.float()[:, ::group]


def _is_supported(
    q: Tensor, beta: Tensor | None, segments: Tensor | None, state: Tensor | None
) -> bool:
    """Whether the package's kernels can do a call with these arguments."""
    too_wide = beta is not None and q.shape[-1] > MAX_KEY_DIM
    goes_on_packed = segments is not None and state is not None
    return q.device.type == DEVICE and not too_wide and not goes_on_packed


def _first_tokens(segments: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """Which tokens are the first ones of their documents."""
    first = torch.ones_like(segments, dtype=torch.bool)
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return first


def _operation(g: Tensor, beta: Tensor | None, bonus: Tensor | None) -> str:
    """The package's name of the recurrence with these arguments."""
    if bonus is not None:
        return "rwkv6"
    if beta is not None:
        return "gated_delta_rule"
    return "simple_gla" if g.ndim == 3 else "gla"
