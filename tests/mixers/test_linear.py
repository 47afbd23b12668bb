"""Each linear mixer against its paper's equation, written out from the weights alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.mixers import LIGER, RADLADS, made, relative, rotary
from helpers.tiny import tiny, tokens
from torch import Tensor, nn

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.linearize.merge import Merge
from regraft.mixers.attention import Attention
from regraft.mixers.base import Mixer, MixerContext
from regraft.mixers.remix import Remix
from regraft.modeling import flops

ATTENTION = Attention(
    hidden=24, kv=4, group=2, dim=6, scale=6**-0.5, qkv_bias=True, o_bias=True, qk_norm=1e-6
)
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
    q, k, v = (heads(layer, x) for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q, k = normed(q) * mixer.q_norm.weight, normed(k) * mixer.k_norm.weight
    return (turned(q), turned(k), v) if turn else (q, k, v)


def case(spec: dict) -> tuple[Mixer, Tensor, Tensor]:
    """A mixer, its input, and its output."""
    mixer = made(spec, ATTENTION)
    x = torch.randn(2, TIME, ATTENTION.hidden)
    return (
        mixer,
        x,
        mixer(x, MixerContext(rotary(torch.arange(TIME).expand(2, TIME), ATTENTION)))[0],
    )


def out(mixer: Mixer, per_head: Tensor) -> Tensor:
    """(batch, heads, time, dim) through the output projection."""
    return applied(mixer.o_proj, per_head.transpose(1, 2).flatten(-2))


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
        relative(
            y,
            out(mixer, gated * retained / (retained.square().mean(-1, keepdim=True) + 1e-5).sqrt()),
        )
        < TOLERANCE
    )


@torch.no_grad()
def test_lightning_is_a_loop_with_fixed_decays() -> None:
    mixer, x, y = case({"name": "lightning", "norm": "none"})
    q, k, v = attended(mixer, x)
    decay = torch.exp(-(0.5 ** torch.arange(1.0, 9.0)))
    state, outputs = torch.zeros(2, 8, 6, 6), []
    for t in range(TIME):
        state = decay[:, None, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((state * q[:, :, t, :, None] / math.sqrt(6)).sum(-2))
    assert relative(y, out(mixer, torch.stack(outputs, 2))) < TOLERANCE


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention over features with its denominator, by the causal matrix; zero for a zero
    row.
    """
    weight = (q @ k.mT).tril()
    return (weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)) @ v


@torch.no_grad()
def test_gla_decays_each_key_dimension() -> None:
    mixer, x, y = case({"name": "gla", "rank": 3})
    q, k, v = attended(mixer, x, turn=False)
    gate = heads(mixer.decay_out, applied(mixer.decay_in, x)).sigmoid() ** (1 / 16)
    state, outputs = torch.zeros(2, 8, 6, 6), []
    for t in range(TIME):
        state = gate[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((state * q[:, :, t, :, None] / math.sqrt(6)).sum(-2))
    found = torch.stack(outputs, 2)
    found = found / (found.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm
    swish = heads(mixer.gate, x) * heads(mixer.gate, x).sigmoid()
    assert relative(y, out(mixer, swish * found)) < TOLERANCE


@torch.no_grad()
def test_liger_takes_decays_from_keys() -> None:
    mixer, x, y = case({"name": "gla"} | LIGER)
    q, k, v = attended(mixer, x, turn=False)
    kept = (k.sigmoid() ** (1 / 16)).log().cumsum(2)
    rows = []
    for n in range(TIME):
        weight = (
            q[:, :, n, None].softmax(-1) * k.softmax(-1) * (kept[:, :, n, None] - kept).exp()
        ).sum(-1)
        rows.append((weight[:, :, : n + 1, None] * v[:, :, : n + 1]).sum(2))
    assert relative(y, out(mixer, torch.stack(rows, 2))) < TOLERANCE


@torch.no_grad()
def test_rwkv6_is_the_papers_time_mixing() -> None:
    mixer, x, y = case({"name": "rwkv6", "rank": 5, "shift_rank": 3})
    earlier = torch.cat((torch.zeros(2, 1, 24), x[:, :-1]), 1)
    mixed = x + (earlier - x) * mixer.shift_base
    read = {}
    for i, letter in enumerate("rkvwg"):
        inner = (mixed @ mixer.shift_in.weight[3 * i : 3 * i + 3].T).tanh()
        read[letter] = x + (earlier - x) * (mixer.shift_bias[i] + inner @ mixer.shift_out[i])
    r, k = (
        normed(heads(layer, read[letter])) * norm.weight
        for layer, letter, norm in (
            (mixer.q_proj, "r", mixer.q_norm),
            (mixer.k_proj, "k", mixer.k_norm),
        )
    )
    v = heads(mixer.v_proj, read["v"])
    w = torch.exp(-heads(mixer.decay_out, applied(mixer.decay_in, read["w"]).tanh()).exp())
    state, outputs = torch.zeros(2, 8, 6, 6), []
    for t in range(TIME):
        write = k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(
            ((state + mixer.bonus[..., None] * write) * r[:, :, t, :, None] / math.sqrt(6)).sum(-2)
        )
        state = w[:, :, t, :, None] * state + write
    found = torch.stack(outputs, 2)
    found = (found - found.mean(-1, keepdim=True)) / (
        found.var(-1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    found = found * mixer.norm.view(8, 1, 6) + mixer.norm_bias.view(8, 1, 6)
    gate = heads(mixer.gate, read["g"])
    assert relative(y, out(mixer, gate * gate.sigmoid() * found)) < TOLERANCE


@torch.no_grad()
def test_radlads_form_of_rwkv6() -> None:
    mixer, x, y = case({"name": "rwkv6", "gate": "sigmoid"} | RADLADS)
    q, k, v = attended(mixer, x)
    w = torch.exp(-heads(mixer.decay_out, applied(mixer.decay_in, x).tanh()).exp())
    state, outputs = torch.zeros(2, 8, 6, 6), []
    for t in range(TIME):
        state = w[:, :, t, :, None] * state + ((1 - w) * k)[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((state * q[:, :, t, :, None] / math.sqrt(6)).sum(-2))
    assert (
        relative(y, out(mixer, heads(mixer.gate, x).sigmoid() * torch.stack(outputs, 2)))
        < TOLERANCE
    )


@pytest.mark.parametrize(
    "spec", [{"name": "gla"}, {"name": "rwkv6"}, {"name": "rwkv6", "decay": "static"}], ids=str
)
@torch.no_grad()
def test_gates_start_at_the_half_life_that_was_measured(spec: dict) -> None:
    attention = Attention(hidden=24, kv=4, group=2, dim=6, scale=6**-0.5)
    mixer = made(spec | {"norm": "none", "gate": "none"}, attention)
    for name, parameter in mixer.named_parameters():
        if name.startswith(("decay_out.weight", "shift")):
            parameter.zero_()
    distance = 2.0 ** torch.arange(1, 9)
    mixer.start_gates(distance, torch.zeros(8))
    x = torch.zeros(1, 300, 24)
    x[:, 0] = 1.0  # writes once, then only decays
    for layer in (mixer.k_proj, mixer.v_proj):
        layer.weight.abs_()
    sizes = torch.stack(
        [
            mixer.mix(x[:, : 1 + n], MixerContext(), None)[1]["matrix"].sum((0, 2, 3))
            for n in (1, 3, 257)
        ]
    )
    halved = 0.5 ** (torch.tensor([1, 3, 257])[:, None] / distance)
    whole = mixer.mix(x[:, :1], MixerContext(), None)[1]["matrix"].sum((0, 2, 3))
    torch.testing.assert_close(sizes / whole, halved, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "spec", [{"name": "lolcats", "window": 5}, {"name": "rwkv6"}, {"name": "gla"}], ids=str
)
@torch.no_grad()
def test_padding_between_pieces_changes_nothing(spec: dict) -> None:
    mixer, x = made(spec, ATTENTION), torch.randn(1, 20, 24)
    _, whole = mixer(x, MixerContext(rotary(torch.arange(20)[None], ATTENTION)))
    _, state = mixer(x[:, :9], MixerContext(rotary(torch.arange(9)[None], ATTENTION)))
    position = torch.cat((torch.zeros(7), torch.arange(9, 20)))[None]
    padded, valid = torch.cat((torch.randn(1, 7, 24), x[:, 9:]), 1), torch.arange(18)[None] >= 7
    _, state = mixer(padded, MixerContext(rotary(position, ATTENTION), valid), state)
    assert all(relative(state[name].float(), whole[name].float()) < TOLERANCE for name in whole)


@torch.no_grad()
def test_t2r_divides_by_the_sum_of_similarities() -> None:
    mixer, x, y = case({"name": "t2r", "feature": 4})
    q, k, v = attended(mixer, x, turn=False)
    q, k = (
        torch.stack(
            [
                (t[:, h] @ mixer.map[h].T + mixer.map_bias.view(8, 4)[h]).clamp(min=0)
                for h in range(8)
            ],
            1,
        )
        for t in (q, k)
    )
    assert relative(y, out(mixer, divided(q, k, v))) < TOLERANCE


@torch.no_grad()
def test_t2r_gives_zero_where_no_feature_is_left() -> None:
    mixer = made({"name": "t2r"}, ATTENTION)
    mixer.map_bias.fill_(-1e3)
    mixer.map.requires_grad_()
    with torch.enable_grad():
        heads, _ = mixer.mix(torch.randn(1, 70, 24), MixerContext(), None)
        (gradient,) = torch.autograd.grad(heads.sum(), mixer.map)
    assert not heads.any() and torch.isfinite(gradient).all()


@torch.no_grad()
def test_hedgehog_divides_by_the_sum_of_similarities() -> None:
    mixer, x, y = case({"name": "hedgehog", "feature": 5})
    q, k, v = attended(mixer, x)
    q, k = (
        torch.stack([t[:, h] @ maps[h].T for h in range(8)], 1)
        for t, maps in ((q, mixer.q_map), (k, mixer.k_map))
    )
    q, k = (
        torch.cat((t.exp() / t.exp().sum(-1, True), (-t).exp() / (-t).exp().sum(-1, True)), -1)
        for t in (q, k)
    )
    assert relative(y, out(mixer, divided(q, k, v))) < TOLERANCE


@pytest.mark.parametrize("affine", [False, True])
@torch.no_grad()
def test_lolcats_sums_window_and_past_under_one_denominator(affine: bool) -> None:
    mixer, x, y = case({"name": "lolcats", "window": 5, "affine": affine})
    q, k, v = attended(mixer, x)
    fq, fk = (
        torch.stack(
            [
                torch.cat(
                    ((t[:, h] @ maps[h].T).softmax(-1), (-t[:, h] @ maps[h].T).softmax(-1)), -1
                )
                for h in range(8)
            ],
            1,
        )
        for t, maps in ((q, mixer.q_map), (k, mixer.k_map))
    )
    gamma = mixer.factor.sigmoid()
    rows = []
    for n in range(TIME):
        inside, outside = slice(max(0, n - 4), n + 1), slice(0, max(0, n - 4))
        exponent = torch.einsum("bhd,bhid->bhi", q[:, :, n], k[:, :, inside]) / math.sqrt(6)
        soft = gamma[:, None] * (exponent - exponent.amax(-1, keepdim=True)).exp()
        linear = torch.einsum("bhf,bhif->bhi", fq[:, :, n], fk[:, :, outside]) * (
            (1 - gamma[:, None]) if affine else 1
        )
        weight = torch.cat((linear, soft), -1)
        rows.append(
            torch.einsum("bhi,bhid->bhd", weight / weight.sum(-1, keepdim=True), v[:, :, : n + 1])
        )
    assert relative(y, out(mixer, torch.stack(rows, 2))) < TOLERANCE


@torch.no_grad()
def test_a_lolcats_window_over_everything_is_softmax_attention() -> None:
    mixer, x, y = case({"name": "lolcats", "window": TIME})
    softmax = torch.nn.functional.scaled_dot_product_attention(*attended(mixer, x), is_causal=True)
    assert relative(y, out(mixer, softmax)) < TOLERANCE


MERGED = [
    ("gpt2", Remix("t2r", "0", window=0)),
    ("qwen2", Remix("t2r", "none", window=0, options={"feature": 3, "grouped": True})),
    ("llama", Remix("t2r", "none", window=8, options={"grouped": False})),
]


@pytest.mark.parametrize(("family", "remix"), MERGED, ids=[family for family, _ in MERGED])
@torch.no_grad()
def test_merged_maps_give_the_same_logits(family: str, remix: Remix, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path / "source")
    model = modeling.materialize(remix(Checkpoint.open(tmp_path / "source")))
    for name, parameter in model.named_parameters():
        if ".map" in name or "gate" in name:
            parameter.add_(
                0.2
                * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            )
    model.save_pretrained(tmp_path / "trained")
    merged = Merge()(Checkpoint.open(tmp_path / "trained"))
    merged.save(tmp_path / "out")
    again = modeling.load(tmp_path / "out")
    assert not [name for name in again.state_dict() if ".map" in name]
    assert relative(again(tokens(2, 70)).logits, model(tokens(2, 70)).logits) < TOLERANCE
    assert flops.forward_flops(merged, 70) < flops.forward_flops(
        Checkpoint.open(tmp_path / "trained"), 70
    )
    with pytest.raises(RegraftError, match="no t2r layer"):
        Merge()(merged)


def test_what_cannot_merge(tmp_path: Path) -> None:
    tiny("qwen3")[1].save_pretrained(tmp_path / "qwen3")
    with pytest.raises(RegraftError, match="layer 1 norms queries and keys"):
        Merge()(Remix("t2r", "0", window=0)(Checkpoint.open(tmp_path / "qwen3")))
    tiny("llama")[1].save_pretrained(tmp_path / "llama")
    source = Checkpoint.open(tmp_path / "llama")
    with pytest.raises(RegraftError, match="before rotary"):
        Merge()(Remix("t2r", "0", window=0, options={"rotary": True})(source))
    with pytest.raises(RegraftError, match="no t2r layer"):
        Merge()(source)
    with pytest.raises(RegraftError, match="window is 0, give 1 or more"):
        Remix("lolcats", options={"window": 0})(source)
    with pytest.raises(RegraftError, match="feature is 0, give 1 or more"):
        Remix("hedgehog", options={"feature": 0})(source)
