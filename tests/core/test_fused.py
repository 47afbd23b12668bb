"""Fused tensors are split into their maps and joined again."""

from __future__ import annotations

import pytest
import torch

from regraft.core import fused
from regraft.core.axes import product
from regraft.core.part import Part

SIZES = {"hidden": 6, "kv": 2, "group": 3, "dim": 4, "ffn": 5}
QKV = ("attn.q", "attn.k", "attn.v")
PARTS = {
    "stacked": Part("x", "hidden -> kv group dim + kv dim + kv dim", fused=QKV),
    "turned": Part("x", "hidden -> kv dim + kv dim + kv dim", "in out", QKV),
    "interleaved": Part("x", "hidden -> kv three dim", fused=QKV),
    "stacked bias": Part("x", "-> kv group dim + kv dim + kv dim", fused=QKV),
    "interleaved bias": Part("x", "-> kv three dim", fused=QKV),
    "alone": Part("x", "hidden -> ffn"),
    "alone, turned": Part("x", "hidden -> ffn", "in out"),
    "plain": Part("x", "kv group dim dim"),
    "gain": Part("x", "gain hidden"),
}


@pytest.mark.parametrize("name", PARTS)
def test_joining_undoes_splitting(name: str) -> None:
    part = PARTS[name]
    stored = torch.randn(part.axes.shape(SIZES, part.stored))
    values = fused.split_fused(stored, part, SIZES)
    maps = fused.fused_maps(part, "attn.qkv.weight")
    assert len(values) == len(maps)

    by_axis = [
        value.reshape([product((axis,), SIZES) for axis in (*each.output, *each.signature.inputs)])
        for value, each in zip(values, maps, strict=True)
    ]
    assert torch.equal(fused.join_fused(by_axis, part), stored)


@pytest.mark.parametrize("name", [name for name in PARTS if PARTS[name].fused])
def test_each_map_has_its_own_shape_and_role(name: str) -> None:
    part = PARTS[name]
    stored = torch.randn(part.axes.shape(SIZES, part.stored))
    values = fused.split_fused(stored, part, SIZES)
    for index, each in enumerate(fused.fused_maps(part, "attn.qkv.weight")):
        assert each.role == f"{QKV[index]}.weight"
        assert values[index].shape == each.signature.shape(SIZES)
        assert torch.equal(values[index], fused.read_fused(stored, part, index, SIZES))


def test_interleaved_maps_alternate_head_by_head() -> None:
    stored = torch.arange(2 * 3 * 4.0)  # 2 heads of 3 times 4
    keys = fused.read_fused(stored, PARTS["interleaved bias"], 1, SIZES)
    assert keys.tolist() == [4, 5, 6, 7, 16, 17, 18, 19]


def test_roles_are_found_inside_a_fused_part() -> None:
    part = PARTS["stacked"]
    assert fused.fused_index("attn.k.weight", part, "attn.qkv.weight") == 1
    assert fused.fused_index("attn.k.bias", part, "attn.qkv.weight") is None
    assert fused.fused_index("attn.o.weight", part, "attn.qkv.weight") is None
