"""Laws of every mixer: parallel == chunked == recurrent, forward and gradient, under any split,
padding and packing.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.mixers import LIGER, QWEN35, RADLADS, SHAPES, made, projections, relative, rotary
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.errors import RegraftError
from regraft.mixers import registry
from regraft.mixers.base import Mixer, MixerContext
from regraft.mixers.initialize import create_initial_tensor
from regraft.mixers.naive_window import naive_window
from regraft.mixers.recurrence import chunked_recurrence, naive_recurrence
from regraft.mixers.sink_window import naive_sink_window
from regraft.mixers.vector import chunked_vector, naive_vector

SMALL_WINDOW = {"name": "window", "window": 8, "sinks": 2}
SINK_WINDOW = {"name": "sink_window", "window": 8}
SPECS = [
    SMALL_WINDOW,
    {"name": "window", "window": 5, "sinks": 0},
    SINK_WINDOW,
    {"name": "supra"},
    {"name": "supra", "feature": "dense", "decays": "retnet", "norm": False},
    {"name": "gated_deltanet"},
    {"name": "gated_deltanet", "grouped": False},
    {"name": "retnet"},
    {"name": "retnet", "grouped": True, "norm": "layer", "gate": "none", "rotary": False},
    {"name": "lightning", "gate": "sigmoid", "activation": "silu"},
    {"name": "lightning", "norm": "none", "grouped": True, "decays": "none"},
    {"name": "lightning", "grouped": True, "decays": "learned"},
    {"name": "supra", "decays": "learned", "gate": "sigmoid"},
    {"name": "t2r", "feature": 7},
    {"name": "t2r", "grouped": True, "rotary": True},
    {"name": "t2r", "grouped": True, "merged": True, "feature": 4},
    {"name": "hedgehog"},
    {"name": "hedgehog", "grouped": True, "feature": 3, "norm": "rms"},
    {"name": "gla"},
    {"name": "gla", "rotary": True, "rank": 3} | LIGER,
    {"name": "rwkv6", "rank": 5, "shift_rank": 3},
    {"name": "rwkv6"} | RADLADS,
    {"name": "rwkv6", "decay": "static", "grouped": True, "gate": "none", "norm": "rms"},
    {"name": "gated", "linear": {"name": "rwkv6"}, "window": SMALL_WINDOW},
    {"name": "lolcats", "window": 8},
    {"name": "lolcats", "window": 100, "affine": True, "grouped": True, "feature": 4},
    {"name": "gated", "linear": {"name": "lolcats", "window": 3}, "window": SMALL_WINDOW},
    {"name": "gated_deltanet", "norm": True, "gate": True, "activation": "silu", "rotary": False},
    {"name": "gated_deltanet"} | QWEN35,
    {"name": "gated_deltanet", "grouped": True, "conv": 2, "activation": "silu"},
    {"name": "gated", "linear": {"name": "gated_deltanet"}, "window": SMALL_WINDOW, "start": 0.3},
    {"name": "gated", "linear": {"name": "supra"}, "window": SMALL_WINDOW},
    {"name": "mamba", "state": 5},
    {"name": "mamba", "layout": "attention", "conv": 2},
    {"name": "mamba2", "state": 12, "head_dim": 8},
    {"name": "mamba2", "layout": "attention"},
    {"name": "gated", "linear": {"name": "mamba2", "layout": "attention"}, "window": SMALL_WINDOW},
]
IDS = [f"{spec['name']}-{i}" for i, spec in enumerate(SPECS)]
TOLERANCE = 1e-5
SHAPE = SHAPES["9-heads-3-kv"]


def bound(spec: dict) -> float:
    """Relative error that counts as rounding; a norm behind a sum that may cancel magnifies it (by
    1 / sqrt(eps)).
    """
    linear = spec.get("linear", spec)
    normed = vars(registry.mixer_class(linear["name"]).parse(linear)).get("norm") in (
        "rms",
        "layer",
    )
    return 10 * TOLERANCE if normed else TOLERANCE


def run(mixer: Mixer, x: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Outputs of a prompt fed in pieces."""
    state, outputs, begin = None, [], 0
    for cut in cuts:
        position = torch.arange(begin, begin + cut).expand(x.shape[0], cut)
        y, state = mixer(
            x[:, begin : begin + cut], MixerContext(rotary(position, mixer.attention)), state
        )
        outputs.append(y)
        begin += cut
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=3, deadline=None)
@given(cuts=st.lists(st.integers(1, 70), min_size=1, max_size=4))
@torch.no_grad()
def test_any_split_equals_the_whole(spec: dict, shape: str, cuts: list[int]) -> None:
    mixer = made(spec, SHAPES[shape])
    x = torch.randn(2, sum(cuts), mixer.attention.hidden)
    whole = run(mixer, x, [x.shape[1]])
    assert relative(run(mixer, x, cuts), whole) < bound(spec)
    first = x[:, :33]
    assert relative(run(mixer, first, [1] * first.shape[1]), whole[:, :33]) < bound(spec)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_what_the_source_has_too_is_called_as_there(spec: dict) -> None:
    """In modules that adapters know, `q_proj` and the others."""
    attention = SHAPES["9-heads-3-kv"]
    mixer, found = registry.build(spec, attention), registry.weights(spec, attention)
    assert set(found) == {name for name, _ in mixer.named_parameters()}
    for name, weight in found.items():
        if weight.source is not None:
            part, kind = weight.source.split(".")[1:]
            usual = part if part.endswith("_norm") else f"{part}_proj"
            assert name.split(".")[-2:] == [usual, kind]
            if usual != part:
                assert type(mixer.get_submodule(name.rpartition(".")[0])) is torch.nn.Linear


def test_the_guide_names_every_weight() -> None:
    guide = Path(__file__).parents[2] / "docs" / "guides" / "linearizing.md"
    section = guide.read_text(encoding="utf-8").partition("### Names of weights")[2]
    rows = [
        row.split("|")[1] for row in section.partition("\n\nMaps")[0].splitlines() if "|" in row
    ]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    found = [registry.weights(spec, SHAPES["9-heads-3-kv"]) for spec in SPECS]
    names = {part for table in found for name in table for part in name.split(".")}
    assert told == names - {"weight", "bias"}


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@torch.no_grad()
def test_state_does_not_grow(spec: dict) -> None:
    attention = SHAPES["9-heads-3-kv"]
    mixer, sizes = made(spec, attention), set()
    for time in (1, 3, 40, 200):
        position = torch.arange(time).expand(2, time)
        _, state = mixer(
            torch.randn(2, time, attention.hidden), MixerContext(rotary(position, attention))
        )
        sizes.add(sum(tensor[0].numel() for tensor in state.values()))
    assert sizes == {registry.mixer_class(spec["name"]).state_size(attention, spec)}


def decode(mixer: Mixer, x: torch.Tensor, begin: int, overwrite: bool) -> torch.Tensor:
    """Outputs of the tokens from `begin`, one at a time but for two calls of three."""
    position = torch.arange(x.shape[1]).expand(len(x), -1)
    _, state = mixer(x[:, :begin], MixerContext(rotary(position[:, :begin], SHAPE)), None)
    outputs, cuts = [], [*range(begin, x.shape[1])]
    cuts = [cut for i, cut in enumerate(cuts) if i % 14 not in (11, 12)]
    for start, end in zip(cuts, [*cuts[1:], x.shape[1]], strict=True):
        mixing = MixerContext(rotary(position[:, start:end], SHAPE), overwrite=overwrite)
        y, state = mixer(x[:, start:end], mixing, state)
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@torch.no_grad()
def test_packed_weights_and_states_in_place_change_no_number(spec: dict) -> None:
    mixer, x = made(spec, SHAPE), torch.randn(2, 40, SHAPE.hidden)
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    objects = dict(mixer.named_parameters())
    expected = decode(mixer, x, 4, overwrite=False)
    assert relative(decode(mixer, x, 4, overwrite=True), expected) < bound(spec)

    mixer.pack()
    assert (mixer.packed is not None) == (len(mixer.input_layers()) > 1)
    for name, parameter in mixer.named_parameters():
        assert parameter is objects[name] and torch.equal(parameter, before[name])
    assert relative(decode(mixer, x, 4, overwrite=True), expected) < bound(spec)

    # What is written into a parameter, and what takes its place, is what is computed with.
    for layer in mixer.input_layers():
        layer.weight.mul_(1.5)
    written = decode(mixer, x, 4, overwrite=True)
    packed, mixer.packed = mixer.packed, None
    assert relative(written, decode(mixer, x, 4, overwrite=False)) < bound(spec)
    mixer.packed = packed
    mixer.load_state_dict(before, assign=True)
    assert relative(decode(mixer, x, 4, overwrite=True), expected) < bound(spec)
    assert mixer.packed is None


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(spec: dict, left: bool) -> None:
    mixer, time, pad = made(spec, SHAPES["9-heads-3-kv"]), 70, 13
    x = torch.randn(1, time, 36)
    alone = run(mixer, x, [time])
    padded, valid = torch.randn(1, time + pad, 36), torch.zeros(1, time + pad, dtype=torch.bool)
    real = slice(pad, None) if left else slice(0, time)
    padded[:, real], valid[:, real] = x, True
    position = (valid.long().cumsum(1) - 1).clamp(min=0)
    y, state = mixer(padded, MixerContext(rotary(position, mixer.attention), valid))
    assert relative(y[:, real], alone) < bound(spec)
    assert torch.isfinite(y).all()
    token = torch.randn(1, 1, 36)
    context = MixerContext(rotary(torch.full((1, 1), time), mixer.attention))
    assert relative(
        mixer(token, context, state)[0], run(mixer, torch.cat((x, token), 1), [time + 1])[:, -1:]
    ) < bound(spec)


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@torch.no_grad()
def test_bfloat16_stays_close_and_keeps_states_wide(spec: dict, autocast: bool) -> None:
    mixer, x = made(spec, SHAPES["9-heads-3-kv"]), torch.randn(2, 70, 36)
    turn = rotary(torch.arange(70).expand(2, -1), mixer.attention)
    exact, _ = mixer(x, MixerContext(turn))
    low = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, state = mixer.to(low)(x.to(low), MixerContext(tuple(t.to(low) for t in turn)))
        again, _ = mixer(
            x[:, :1].to(low), MixerContext(tuple(t[:, :1].to(low) for t in turn)), state
        )
    assert torch.isfinite(again).all() and float((y - exact).norm() / exact.norm()) < 0.2
    assert all(
        tensor.dtype == torch.float32 for name, tensor in state.items() if name.endswith("matrix")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@torch.no_grad()
def test_large_activations_stay_finite(spec: dict, dtype: torch.dtype) -> None:
    """Thirty times as large as usual, as a window, the source's own attention, takes them."""
    mixer = made(spec, SHAPES["9-heads-3-kv"]).to(dtype)
    x = (30 * torch.randn(2, 41, 36)).to(dtype)
    turn = tuple(t.to(dtype) for t in rotary(torch.arange(41).expand(2, -1), mixer.attention))
    y, state = mixer(x[:, :40], MixerContext(tuple(t[:, :40] for t in turn)))
    last, _ = mixer(x[:, 40:], MixerContext(tuple(t[:, 40:] for t in turn)), state)
    # Added to a stream that is as large, too.
    assert torch.isfinite(y + x[:, :40]).all() and torch.isfinite(last + x[:, 40:]).all()


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
@torch.no_grad()
def test_packed_documents_do_not_see_each_other(spec: dict) -> None:
    mixer, lengths = made(spec, SHAPES["9-heads-3-kv"]), [1, 30, 64, 5, 90]
    documents = [torch.randn(1, length, 36) for length in lengths]
    position = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    segments = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)]).unsqueeze(
        0
    )
    packed, _ = mixer(
        torch.cat(documents, 1), MixerContext(rotary(position, mixer.attention), None, segments)
    )
    alone = torch.cat([run(mixer, document, [document.shape[1]]) for document in documents], 1)
    assert relative(packed, alone) < bound(spec)


@pytest.mark.parametrize("kind", ["plain", "delta", "vector", "bonus"])
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("time", [1, 15, 63, 64, 150])
def test_chunked_equals_naive_with_gradients(kind: str, packed: bool, time: int) -> None:
    torch.manual_seed(time)
    q, k = (
        F.normalize(torch.randn(2, heads, time, 8), dim=-1).requires_grad_() for heads in (6, 3)
    )
    v = torch.randn(2, 3, time, 5).requires_grad_()
    vector = kind in ("vector", "bonus")
    g = -torch.randn(2, 3, time, 8).exp() if vector else -0.3 * torch.rand(2, 3, time)
    extra = {"delta": torch.rand(2, 3, time), "bonus": torch.randn(3, 8)}.get(
        kind
    )  # write strength, or bonus
    state = None if packed else torch.randn(2, 3, 8, 5)
    segments = torch.randint(0, 5, (2, time)).sort(1).values if packed else None
    inputs = [t.requires_grad_() for t in (q, k, v, g, extra, state) if t is not None]
    weight, results = torch.randn(2, 6, time, 5), []
    for form in (
        (naive_vector, chunked_vector) if vector else (naive_recurrence, chunked_recurrence)
    ):
        out, last = form(q, k, v, g, extra, segments, state)
        results.append(
            (out, last, torch.autograd.grad((out * weight).sum() + last.square().sum(), inputs))
        )
    (out, last, grads), (out2, last2, grads2) = results
    assert relative(out2, out) < TOLERANCE and relative(last2, last) < TOLERANCE
    for a, b in zip(grads2, grads, strict=True):
        assert float((a - b).norm() / b.norm().clamp(min=1e-12)) < 1e-4 or float(b.norm()) < 1e-6


@pytest.mark.parametrize("bonus", [False, True], ids=["plain", "bonus"])
@settings(max_examples=20, deadline=None)
@given(strengths=st.lists(st.floats(-9, 9), min_size=2, max_size=40))
def test_vector_decays_of_any_strength_are_safe(bonus: bool, strengths: list[float]) -> None:
    """From e^-e^-9, nearly one, to e^-e^9, nothing: neither overflow nor loss of what weak decays
    keep.
    """
    torch.manual_seed(len(strengths))
    time = len(strengths)
    q, k, v = (torch.randn(1, 2, time, 4).requires_grad_() for _ in range(3))
    g = -(torch.tensor(strengths).view(1, 1, -1, 1) + torch.randn(1, 2, time, 4)).exp()
    extra = torch.ones(2, 4) if bonus else None
    (out, last), (expected, end) = (
        form(q, k, v, g, extra) for form in (chunked_vector, naive_vector)
    )
    assert relative(out, expected) < TOLERANCE and relative(last, end) < TOLERANCE
    assert all(torch.isfinite(t).all() for t in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("spec", [SMALL_WINDOW, SINK_WINDOW], ids=["tokens", "learned"])
def test_window_blocks_equal_masked_softmax_with_gradients(spec: dict, segmented: bool) -> None:
    mixer, time = made(spec, SHAPES["9-heads-3-kv"]), 45
    x = torch.randn(2, time, 36)
    segments = (
        torch.randint(0, 4, (2, time)).sort(1).values
        if segmented
        else torch.zeros(2, time, dtype=torch.long)
    )
    position = torch.stack(
        [
            torch.cat([torch.arange(n) for n in row.unique_consecutive(return_counts=True)[1]])
            for row in segments
        ]
    )
    context = MixerContext(rotary(position, mixer.attention), None, segments if segmented else None)
    heads, _ = mixer.mix(x, context, None)
    q, k, v = mixer.qkv(x)
    from regraft.mixers.base import apply_rotary

    q, k = apply_rotary(q, context.rotary), apply_rotary(k, context.rotary)
    parameters = projections(mixer)
    if spec is SINK_WINDOW:
        sinks = mixer.sinks
        expected = naive_sink_window(q, k, v, mixer.attention, 8, sinks, position, segments)
        parameters.append(sinks)
    else:
        expected = naive_window(q, k, v, mixer.attention, 8, 2, position, segments)
    expected = expected.transpose(1, 2)
    assert relative(heads, expected) < TOLERANCE
    with torch.no_grad():
        assert relative(mixer.mix(x, context, None)[0], expected) < TOLERANCE
    weight = torch.randn_like(heads)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), parameters) for y in (heads, expected)),
        strict=True,
    ):
        assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


@torch.no_grad()
def test_gate_pinned_to_a_branch_is_that_branch() -> None:
    spec = {"name": "gated", "linear": {"name": "gated_deltanet"}, "window": SMALL_WINDOW}
    mixer, x = made(spec, SHAPES["9-heads-3-kv"]), torch.randn(1, 40, 36)
    free = run(mixer, x, [40])
    mixer.force = "window"
    pinned = run(mixer, x, [40])
    mixer.force = None
    mixer.gate.weight.zero_()
    mixer.gate.bias.fill_(-torch.inf)
    assert relative(run(mixer, x, [40]), pinned) < 1e-6
    assert relative(free, pinned) > 1e-2


@torch.no_grad()
def test_window_as_wide_as_the_text_is_softmax_attention() -> None:
    attention = SHAPES["9-heads-3-kv"]
    wide, x = made({"name": "window", "window": 64, "sinks": 0}, attention), torch.randn(2, 40, 36)
    context = MixerContext(rotary(torch.arange(40).expand(2, 40), attention))
    q, k, v = wide.qkv(x)
    from regraft.mixers.base import apply_rotary

    q, k = apply_rotary(q, context.rotary), apply_rotary(k, context.rotary)
    softmax = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=attention.scale, enable_gqa=True
    )
    assert relative(wide.mix(x, context, None)[0], softmax.transpose(1, 2)) < TOLERANCE


@pytest.mark.parametrize("spec", SPECS, ids=IDS)
def test_weight_table_names_every_parameter(spec: dict) -> None:
    for attention in SHAPES.values():
        mixer = registry.build(spec, attention)
        table = registry.weights(spec, attention)
        assert set(table) == set(dict(mixer.named_parameters()))
        assert all((weight.source is None) != (weight.fresh is None) for weight in table.values())


@torch.no_grad()
@pytest.mark.parametrize(
    "spec",
    [
        {"name": "supra"},
        {"name": "supra", "norm": False},
        {"name": "gated_deltanet", "grouped": False},
        {"name": "gated_deltanet", "grouped": False, "gate": True},
        {"name": "retnet"},
        {"name": "lightning"},
        {"name": "lightning", "norm": "none"},
        {"name": "t2r"},
        {"name": "hedgehog"},
        {"name": "lolcats"},
        {"name": "gla"} | LIGER | {"grouped": False},
        {"name": "rwkv6"} | RADLADS | {"gate": "none", "grouped": False},
    ],
    ids=str,
)
def test_folded_head_maps_act_on_head_outputs(spec: dict) -> None:
    mixer, x, maps = (
        made(spec, SHAPES["9-heads-3-kv"]),
        torch.randn(1, 20, 36),
        torch.randn(9, 10, 10),
    )
    context = MixerContext(rotary(torch.arange(20).expand(1, 20), mixer.attention))
    heads, _ = mixer.mix(x, context, None)
    expected = mixer.o_proj(torch.einsum("bthd,hde->bthe", heads, maps).flatten(-2))
    assert mixer.fold_heads(maps)
    assert relative(mixer(x, context)[0], expected) < 1e-4


def test_bad_specs_are_refused() -> None:
    with pytest.raises(RegraftError, match="unknown mixer 'mambo'.*supra"):
        registry.validate({"name": "mambo"})
    with pytest.raises(RegraftError, match="no option 'windw'.*window"):
        registry.validate({"name": "gated", "window": {"name": "window", "windw": 3}})
    with pytest.raises(RegraftError, match="feature.*'heads'.*head, dense"):
        registry.validate({"name": "supra", "feature": "heads"})
    with pytest.raises(RegraftError, match="gated_deltanet.*gate is 'none', give bool"):
        registry.validate({"name": "gated_deltanet", "gate": "none"})
    with pytest.raises(RegraftError, match="rank is 'True', give int"):
        registry.validate({"name": "gla", "rank": True})
    with pytest.raises(RegraftError, match="feature is '2.5', give int | None"):
        registry.validate({"name": "t2r", "feature": 2.5})
    registry.validate({"name": "lolcats", "start": 0, "feature": None})
    with pytest.raises(RegraftError, match="unknown initial value 'zero'"):
        create_initial_tensor("zero", (2,), torch.Generator())
