"""Fused tensors: several maps or biases packed into one stored tensor, split and joined again.

Several layouts exist. GPT-2 and Phi-3 stack whole maps ("hidden -> kv dim + kv dim + kv dim").
GPT-NeoX interleaves queries, keys and values head by head ("hidden -> kv three dim"), gpt-oss gates
and ups row by row ("hidden -> expert ffn two"). Falcon stacks the maps of each key/value head
(`Part.by_head`). Experts in one tensor are a third dimension, in front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .axes import INTERLEAVED, Axes, Signature, product
from .part import Part


class FusedMap(NamedTuple):
    """One of the maps or biases that a stored tensor holds."""

    # Its own role, such as "attn.q.weight" inside "attn.qkv.weight".
    role: str
    # Its signature without the others.
    signature: Signature
    # Axes of its output.
    output: Axes


def fused_maps(part: Part, role: str) -> list[FusedMap]:
    """The maps that are packed into a part, in order; the part itself when it is not fused.

    Args:
        part: a row of the family's table.
        role: the part's role, such as "attn.qkv.weight".
    """
    if not part.fused:
        return [FusedMap(role, part.axes, part.axes.outputs[0])]

    ending = role.rpartition(".")[2]  # "weight" or "bias"
    signatures = [part.axes.piece(index) for index in range(len(part.fused))]
    return [
        FusedMap(f"{base}.{ending}", signature, signature.outputs[0])
        for base, signature in zip(part.fused, signatures, strict=True)
    ]


def fused_index(role: str, part: Part, part_role: str) -> int | None:
    """The position of the map `role` inside the fused part `part_role`; None when it is not there.

    "attn.k.weight" is at 1 in "attn.qkv.weight", and "attn.k.bias" is not in it.
    """
    base, _, ending = role.rpartition(".")
    if base not in part.fused or not part_role.endswith(f".{ending}"):
        return None
    return part.fused.index(base)


def output_first(value: Tensor, part: Part) -> Tensor:
    """A stored tensor with outputs before inputs; the same call turns it back."""
    swaps = part.stored.endswith("in out") and part.axes.kind == "map"
    return value.transpose(-2, -1) if swaps else value


def has_experts(part: Part) -> bool:
    """Whether a stored tensor has a dimension for experts, before the others."""
    return part.stored.startswith("expert ")


def read_fused(value: Tensor, part: Part, index: int, sizes: Mapping[str, int]) -> Tensor:
    """One of the maps in a fused tensor.

    Args:
        value: the tensor as stored.
        part: the fused part.
        index: position of the map in `part.fused`.
        sizes: axis sizes of the model that `value` belongs to.

    Returns:
        (outputs, inputs), or (outputs,) for a bias.
    """
    value = output_first(value, part)
    outputs, experts = part.axes.outputs, has_experts(part)
    if part.by_head:
        widths = [product(axes[1:], sizes) for axes in outputs]
        heads = value.unflatten(0, [sizes[outputs[0][0]], -1])
        return heads.split(widths, 1)[index].flatten(0, 1)
    if len(outputs) > 1:
        # Maps of one expert are stacked, so that the experts are apart in front.
        widths = [product(axes[1:] if experts else axes, sizes) for axes in outputs]
        return _join_experts(value.split(widths, int(experts))[index], part)

    # (kv * 3 * dim, ...) -> (kv, 3, dim, ...) -> (kv, dim, ...) -> (kv * dim, ...)
    axes = outputs[0]
    value = _join_experts(value, part).unflatten(0, [product((axis,), sizes) for axis in axes])
    return value.select(_interleaved_at(axes), index).flatten(0, len(axes) - 2)


def _interleaved_at(axes: Axes) -> int:
    """Where the axis is that counts interleaved maps."""
    return next(position for position, axis in enumerate(axes) if axis in INTERLEAVED)


def _join_experts(value: Tensor, part: Part) -> Tensor:
    """(experts, outputs, ...) as (experts * outputs, ...); others as they are."""
    return value.flatten(0, 1) if has_experts(part) else value


def split_fused(value: Tensor, part: Part, sizes: Mapping[str, int]) -> list[Tensor]:
    """All maps in a stored tensor, output first; a part that is not fused gives one.

    Args:
        value: the tensor as stored.
        part: its part.
        sizes: axis sizes of the model that `value` belongs to.
    """
    if part.stored == "out in tap" and part.axes.kind == "map":
        return [value.flatten(1)]
    if not part.fused:
        return [_join_experts(output_first(value, part), part)]
    return [read_fused(value, part, index, sizes) for index in range(len(part.fused))]


def join_fused(values: Sequence[Tensor], part: Part) -> Tensor:
    """The stored tensor of maps that have a dimension per axis; `split_fused` undoes it.

    Args:
        values: the maps in order, each with the axes of its output, then those of its input.
        part: the part that holds them.
    """
    signature = part.axes
    if signature.kind == "plain" or part.stored == "out in tap":
        return _flatten_axes(values[0], [len(stack[0]) for stack in signature.dims(part.stored)])

    # Interleaved maps get the axis back that counts them, which makes them one.
    if len(signature.outputs) == 1 and part.fused:
        values = [torch.stack(list(values), _interleaved_at(signature.outputs[0]))]

    inputs, experts = len(signature.inputs), int(has_experts(part) or part.by_head)
    flat = []
    for value in values:
        counts = (experts, value.ndim - inputs - experts, inputs)
        flat.append(_flatten_axes(value, [count for count in counts if count]))
    if part.by_head:
        return output_first(torch.cat(flat, 1).flatten(0, 1), part)
    return output_first(torch.cat(flat, experts) if len(flat) > 1 else flat[0], part)


def _flatten_axes(value: Tensor, counts: Sequence[int]) -> Tensor:
    """Flatten the first counts[0] dimensions into one, the next counts[1] into one, and so on."""
    sizes, start = [], 0
    for count in counts:
        sizes.append(value.shape[start : start + count].numel())
        start += count
    return value.reshape(sizes)
