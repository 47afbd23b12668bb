"""Small operations on tensors that mixers share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.shapes import Bool, Float, Int


def is_writable(*tensors: Tensor | None) -> bool:
    """Whether these can be written in place: they are there, and of this mode of PyTorch."""
    inside = torch.is_inference_mode_enabled()
    return all(one is not None and (inside or not one.is_inference()) for one in tensors)


def apply_to_both(
    change: Callable[[Tensor], Tensor],
    q: Float[Tensor, "batch heads time dim"],
    k: Float[Tensor, "batch states time dim"],
) -> tuple[Float[Tensor, "batch heads time dim"], Float[Tensor, "batch states time dim"]]:
    """What is done to each head of queries and keys; at once for one token, which saves calls."""
    if q.shape[2] > 1 or q.dtype != k.dtype:
        return change(q), change(k)
    q, k = change(torch.cat((q, k), 1)).split((q.shape[1], k.shape[1]), 1)
    return q, k


def mask_padding(
    valid: Bool[Tensor, "batch time"] | None, *tensors: Float[Tensor, "batch heads time ..."]
) -> tuple[Float[Tensor, "batch heads time ..."], ...]:
    """Zero the padded tokens of each tensor."""
    if valid is None:
        return tensors
    return tuple(
        t * valid.view(valid.shape[0], 1, -1, *[1] * (t.ndim - 3)).to(t.dtype) for t in tensors
    )


def keep_finite(y: Float[Tensor, ...], dtype: torch.dtype) -> Float[Tensor, ...]:
    """`y` in `dtype`; numbers that float16 does not hold become large ones that it does.

    Half of the largest, so that adding them to the residual stream does not overflow either.
    """
    if dtype != torch.float16:
        return y.to(dtype)
    limit = torch.finfo(dtype).max / 2
    return y.clamp(-limit, limit).to(dtype)


def pad_time(
    x: Float[Tensor, "batch heads time ..."], multiple: int
) -> Float[Tensor, "batch heads padded ..."]:
    """Zero-pad axis 2 (time) at the end to a multiple of `multiple`."""
    short = -x.shape[2] % multiple
    return F.pad(x, [0, 0] * (x.ndim - 3) + [0, short]) if short else x


def take_tokens(
    x: Float[Tensor, "batch heads time dim"], places: Int[Tensor, "batch count"]
) -> Float[Tensor, "batch heads count dim"]:
    """Some tokens of keys or values."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
