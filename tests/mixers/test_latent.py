"""Mixers in the place of latent attention: heads whose values are narrower than their keys, made of
one latent.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.mixers import LATENT, QWEN35, RADLADS, made, relative, rotary

from regraft.core.axes import parse_signature
from regraft.errors import RegraftError
from regraft.mixers import registry
from regraft.mixers.base import Mixer, MixerContext

WINDOW = {"name": "window", "window": 8, "sinks": 2}
SPECS: list[dict[str, Any]] = [
    WINDOW,
    {"name": "supra", "gate": "sigmoid"},
    {"name": "gated_deltanet"},
    {"name": "gated_deltanet"} | QWEN35,
    {"name": "retnet"},
    {"name": "lightning"},
    {"name": "t2r", "feature": 7},
    {"name": "hedgehog"},
    {"name": "gla"},
    {"name": "rwkv6"} | RADLADS | {"norm": "layer"},
    {"name": "lolcats", "window": 8},
    {"name": "mamba", "layout": "attention", "conv": 2},
    {"name": "mamba2", "layout": "attention"},
    {"name": "mamba2", "state": 12, "head_dim": 8},
    {"name": "gated", "linear": {"name": "supra"}, "window": WINDOW},
]
IDS = [f"{spec['name']}-{i}" for i, spec in enumerate(SPECS)]
SIZES = {
    "hidden": LATENT.hidden,
    "kv": LATENT.kv,
    "group": 1,
    "dim": LATENT.dim,
    "value": LATENT.value,
    "latent": LATENT.latent,
    "query_latent": LATENT.query_latent,
}


def context(begin: int, end: int, **fields: Any) -> MixerContext:
    return MixerContext(rotary(torch.arange(begin, end).expand(2, -1), LATENT), **fields)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@torch.no_grad()
def test_any_split_equals_the_whole_and_padding_is_skipped(spec: dict[str, Any]) -> None:
    """Chunked, token by token, and behind padding on the left."""
    mixer, x = made(spec, LATENT), torch.randn(2, 70, LATENT.hidden)
    whole, last = mixer(x, context(0, 70))
    first, state = mixer(x[:, :41], context(0, 41))
    outputs = [first]
    for place in range(41, 45):
        y, state = mixer(x[:, place : place + 1], context(place, place + 1), state)
        outputs.append(y)
    assert relative(torch.cat(outputs, 1), whole[:, :45]) < 1e-4

    # As `MixerSlot` hands rows over: tokens that count first, padding behind them.
    valid = torch.ones(2, 90, dtype=torch.bool)
    valid[:, 70:] = False
    padded = torch.cat((x, torch.randn(2, 20, LATENT.hidden)), 1)
    y, behind = mixer(padded, context(0, 90, valid=valid))
    assert relative(y[:, :70], whole) < 1e-4
    assert {name: one.shape for name, one in behind.items()} == {
        name: one.shape for name, one in last.items()
    }
    numbers = sum(one[0].numel() for one in last.values())
    assert numbers == registry.mixer_class(spec["name"]).state_size(LATENT, spec)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_the_table_of_weights_says_every_shape(spec: dict[str, Any]) -> None:
    mixer, table = registry.build(spec, LATENT), registry.weights(spec, LATENT)
    shapes = {name: parse_signature(one.signature).shape(SIZES) for name, one in table.items()}
    assert shapes == {name: tuple(value.shape) for name, value in mixer.named_parameters()}
    assert all((one.source is None) != (one.fresh is None) for one in table.values())


@pytest.mark.parametrize("name", ["hedgehog", "retnet", "gated_deltanet"])
@torch.no_grad()
def test_maps_of_heads_fold_into_the_latents_values(name: str) -> None:
    mixer, x = made({"name": name}, LATENT), torch.randn(2, 20, LATENT.hidden)
    maps = torch.randn(LATENT.heads, LATENT.value, LATENT.value)
    heads, _ = mixer.mix(x, context(0, 20), None)
    expected = mixer.o_proj(torch.einsum("bthd,hde->bthe", heads, maps).flatten(-2))
    assert mixer.fold_heads(maps)
    assert relative(mixer(x, context(0, 20))[0], expected) < 1e-4


@torch.no_grad()
def test_queries_may_have_no_latent_and_latents_a_bias() -> None:
    plain = replace(LATENT, query_latent=0, qkv_bias=True)
    mixer: Mixer = made(WINDOW, plain)
    names = {name for name, _ in mixer.named_parameters() if name.startswith("latent.")}
    assert names == {
        "latent.q_proj.weight",
        "latent.kv_a_proj.weight",
        "latent.kv_a_proj.bias",
        "latent.kv_a_norm.weight",
        "latent.kv_b_proj.weight",
    }
    assert names <= set(registry.weights(WINDOW, plain))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "rwkv6"}, "'rwkv6' with shift cannot replace latent attention.*\"shift\": false"),
        ({"name": "t2r", "merged": True}, "'t2r' with merged maps.*leave it unmerged"),
        ({"name": "sink_window"}, "'sink_window' cannot replace.*use --mixer window"),
        ({"name": "supra", "inherit": "q,v,o"}, "parts keys from values.*name both or neither"),
    ],
)
def test_what_a_latent_cannot_give_is_refused(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(RegraftError, match=words):
        registry.weights(spec, LATENT)
