"""State-space mixers: transformers' own Mamba and Mamba-2 with the same weights, the scan, starts,
both layouts.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.mixers import SHAPES, made, relative
from helpers.tiny import tiny, tokens
from torch import nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.sizes_to_steps import Growth
from regraft.mixers.attention import Attention
from regraft.mixers.base import MixerContext
from regraft.mixers.initialize import create_initial_tensor
from regraft.mixers.remix import Remix
from regraft.mixers.ssm import naive_scan, scan
from regraft.train.calibrate import calibrate
from regraft.train.optimizer import parameter_origins

HIDDEN = 24
ATTENTION = Attention(hidden=HIDDEN, kv=2, group=1, dim=12, scale=1.0)


def split(theirs: nn.Module, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    return theirs.in_proj.weight.split(sizes)


@pytest.mark.parametrize("time", [1, 7, 70])
def test_mamba_is_transformers_mamba(time: int) -> None:
    config = MambaConfig(hidden_size=HIDDEN, state_size=5, num_hidden_layers=1, use_mambapy=False)
    theirs, ours = MambaMixer(config, 0).eval(), made({"name": "mamba", "state": 5}, ATTENTION)
    inner = 2 * HIDDEN
    low, b, c = theirs.x_proj.weight.split([2, 5, 5])
    x, gate = split(theirs, [inner, inner])
    values = {
        "x.weight": x, "gate.weight": gate, "low.weight": low, "b.weight": b, "c.weight": c,
        "conv.weight": theirs.conv1d.weight.squeeze(1), "conv.bias": theirs.conv1d.bias,
        "dt.weight": theirs.dt_proj.weight, "dt.bias": theirs.dt_proj.bias,
        "A_log": theirs.A_log, "D": theirs.D, "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    ours.load_state_dict({name: value.detach() for name, value in values.items()})
    given = torch.randn(2, time, HIDDEN)
    assert relative(ours(given, MixerContext())[0], theirs(given)) < 1e-5


@pytest.mark.parametrize("time", [1, 7, 150])
def test_mamba2_is_transformers_mamba2(time: int) -> None:
    config = Mamba2Config(
        hidden_size=HIDDEN,
        state_size=6,
        num_heads=6,
        head_dim=8,
        n_groups=1,
        num_hidden_layers=1,
        chunk_size=16,
    )
    theirs, ours = (
        Mamba2Mixer(config, 0).eval(),
        made({"name": "mamba2", "state": 6, "head_dim": 8}, ATTENTION),
    )
    inner = 2 * HIDDEN
    gate, x, b, c, dt = split(theirs, [inner, inner, 6, 6, 6])
    values = {
        "gate.weight": gate, "x.weight": x, "b.weight": b, "c.weight": c, "dt.weight": dt, "dt.bias": theirs.dt_bias,
        "A_log": theirs.A_log, "D": theirs.D, "norm": theirs.norm.weight, "o_proj.weight": theirs.out_proj.weight,
    }  # fmt: skip
    weights, biases = (
        getattr(theirs.conv1d, name).squeeze().split([inner, 6, 6]) for name in ("weight", "bias")
    )
    for name, weight, bias in zip("xbc", weights, biases, strict=True):
        values |= {f"conv_{name}.weight": weight, f"conv_{name}.bias": bias}
    ours.load_state_dict({name: value.detach() for name, value in values.items()})
    given = torch.randn(2, time, HIDDEN)
    assert relative(ours(given, MixerContext())[0], theirs(given)) < 1e-5


@pytest.mark.parametrize("time", [1, 2, 9, 50])
def test_the_scan_is_the_recurrence_with_gradients(time: int) -> None:
    torch.manual_seed(time)
    a = torch.rand(2, time, 3, 4)
    a[0, time // 2] = 0.0  # a document begins
    inputs = [t.requires_grad_() for t in (a, torch.randn(2, time, 3, 4), torch.randn(2, 3, 4))]
    weight, found = torch.randn(2, time, 3, 4), []
    for form in (naive_scan, scan):
        h = form(*inputs)
        found.append((h, *torch.autograd.grad((h * weight).sum(), inputs)))
    for ours, expected in zip(found[1], found[0], strict=True):
        assert relative(ours, expected) < 1e-5


def test_the_scan_stays_finite_where_decay_is_strongest() -> None:
    a, u = torch.full((1, 400, 1), 1e-30).requires_grad_(), torch.randn(1, 400, 1)
    h = scan(a, u, torch.zeros(1, 1))
    assert torch.equal(h, u) and torch.autograd.grad(h.sum(), a)[0].isfinite().all()


def test_starts_are_the_papers() -> None:
    draw = torch.Generator().manual_seed(0)
    dt = nn.functional.softplus(create_initial_tensor("timesteps 0.001 0.1", (4000,), draw))
    assert 0.001 <= float(dt.min()) < 0.0011 and 0.09 < float(dt.max()) <= 0.1001
    assert float(dt.log().mean()) == pytest.approx(math.log(0.01), abs=0.1)
    rate = create_initial_tensor("log_uniform 1 16", (4000,), draw).exp()
    assert (
        1 <= float(rate.min())
        and float(rate.max()) <= 16.001
        and float(rate.mean()) == pytest.approx(8.5, abs=0.2)
    )
    assert torch.allclose(
        create_initial_tensor("log_counts", (2, 3), draw).exp(),
        torch.tensor([[1.0, 2, 3], [1, 2, 3]]),
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source")
    tiny("llama", layers=2)[1].save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_layouts_take_what_they_say(source: Checkpoint, mixer: str) -> None:
    attention = Remix(mixer, "0", window=0, options={"layout": "attention"})(source)
    kinds = {
        role[6:]: lazy.provenance.kind
        for (role, layer), lazy in attention.tensors.items()
        if role.startswith("mixer")
    }
    assert {name for name, kind in kinds.items() if kind in ("copied", "broadcast")} == {
        "q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"
    }  # fmt: skip
    options = {"head_dim": 9} if mixer == "mamba2" else {}
    own = Remix(mixer, "0", window=0, options=options)(source)
    assert own.tensors["mixer.o_proj.weight", 1].shape == (36, 72) and own.tensors[
        "mixer.x.weight", 1
    ].shape == (72, 36)
    assert all(
        lazy.provenance.kind in ("fresh", "zero")
        for (role, _), lazy in own.tensors.items()
        if role[:5] == "mixer"
    )
    assert {name for name in own.dropped if "layers.1" in name} == {
        f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qkvo"
    }
    model = modeling.materialize(own)
    decays = {
        name: parameter_origins(model)[id(p)][1]
        for name, p in model.slots()[1].mixer.named_parameters()
    }
    assert not any(
        yes
        for name, yes in decays.items()
        if name in ("A_log", "D", "dt.bias", "norm", "conv.bias")
    )
    assert list(calibrate(model.slots(), model, model.slots(), [])) == [
        {"layer": 1, "tokens": 0, "heads_folded": 0.0}
    ]
    assert model(tokens(1, 9)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("remix", "message"),
    [
        (
            Remix("mamba"),
            (
                r"'mamba' with layout 'own' has an output projection of its"
                r" own.*\"attention\".*--window 0"
            ),
        ),
        (Remix("mamba2", options={"head_dim": 9}), "'mamba2' with layout 'own'"),
        (
            Remix("mamba", window=0, options={"layout": "attention", "state": 8}),
            "state is 8, but layout 'attention'",
        ),
        (Remix("mamba2", window=0, options={"head_dim": 7}), "head_dim 7 does not divide 72"),
        (Remix("mamba", window=0, options={"expand": 0}), "expand is 0"),
        (
            Remix("mamba", window=0, options={"layout": "mine"}),
            "layout is 'mine', use one of own, attention",
        ),
    ],
)
def test_what_does_not_fit_is_refused(source: Checkpoint, remix: Remix, message: str) -> None:
    with pytest.raises(RegraftError, match=message):
        remix(source)


def test_widths_of_their_own_do_not_grow(source: Checkpoint) -> None:
    with pytest.raises(RegraftError, match="'mamba' has widths of its own: grow first"):
        Growth(hidden=72)(Remix("mamba", "0", window=0)(source))


def test_calibration_needs_the_teachers_attention(source: Checkpoint, tmp_path: Path) -> None:
    model = modeling.materialize(
        Remix("mamba2", "0", window=0, options={"layout": "attention"}, inherit="v,o")(source)
    )
    teacher = modeling.materialize(source)
    ids = tokens(1, 9)
    with pytest.raises(RegraftError, match="mixers inherit 'v,o': leave calibration out"):
        list(
            calibrate(
                model.slots(),
                teacher,
                modeling.slots(teacher, source),
                [(ids, torch.arange(9)[None], None)],
            )
        )


def test_attention_layout_reads_grouped_keys_per_head() -> None:
    attention = SHAPES["9-heads-3-kv"]
    for name in ("mamba", "mamba2"):
        heads, _ = made({"name": name, "layout": "attention"}, attention).mix(
            torch.randn(1, 5, 36), MixerContext(), None
        )
        assert heads.shape == (1, 5, 9, 10)
