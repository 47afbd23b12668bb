"""Mixers matched to their teacher's layers: the matrices are what mixes values, the loss is the
paper's.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.mixers import SHAPES, made, rotary
from helpers.tiny import tiny, tokens

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data.rows import Packed
from regraft.errors import RegraftError
from regraft.mixers.base import MixerContext
from regraft.mixers.remix import Remix
from regraft.train import align

PLAIN = [
    {"name": "gated_deltanet"},
    {"name": "gated_deltanet", "grouped": False},
    {"name": "lightning", "norm": "none"},
    {"name": "supra", "norm": False},
    {"name": "t2r"},
    {"name": "hedgehog"},
]


@pytest.mark.parametrize("spec", PLAIN, ids=lambda spec: "-".join(map(str, spec.values())))
@torch.no_grad()
def test_a_mixers_matrix_times_its_values_is_its_output(spec: dict) -> None:
    mixer, x = made(spec, SHAPES["9-heads-3-kv"]), torch.randn(2, 70, 36)
    context = MixerContext(rotary(torch.arange(70).expand(2, 70), mixer.attention))
    heads, _ = mixer.mix(x, context, None)
    values = mixer.qkv(x)[2]
    matrix = mixer.matrix(x, context)
    assert matrix.shape == (2, 9, 70, 70) and not matrix.triu(1).any()
    found = matrix @ values.repeat_interleave(9 // values.shape[1], 1)
    torch.testing.assert_close(found.transpose(1, 2), heads, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mamba2s_matrix_holds_what_its_recurrence_does() -> None:
    mixer, x = (
        made({"name": "mamba2", "layout": "attention"}, SHAPES["9-heads-3-kv"]),
        torch.randn(2, 70, 36),
    )
    values = mixer.inputs(x, MixerContext(), {})[0]["values"]
    y = mixer.apply_gate((mixer.matrix(x, MixerContext()) @ values).transpose(1, 2), x).flatten(2)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) * mixer.norm
    torch.testing.assert_close(
        y.unflatten(-1, (9, -1)), mixer.mix(x, MixerContext(), None)[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "spec", [{"name": "lolcats", "window": 8}, {"name": "mamba"}, {"name": "window"}]
)
def test_mixers_without_one_matrix_say_so(spec: dict) -> None:
    mixer = made(spec, SHAPES["5-heads-no-rotary"])
    with pytest.raises(
        RegraftError, match=f"'{spec['name']}' has no single matrix.*leave out the stage"
    ):
        mixer.matrix(torch.randn(1, 9, 20), MixerContext())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_the_matrix_loss_is_the_distance_to_the_teachers_attention(
    family: str, tmp_path: Path
) -> None:
    tiny(family)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    teacher = modeling.materialize(source)
    slots = modeling.slots(teacher, source)
    model = modeling.materialize(Remix(mixer="lightning", keep="1", window=0)(source))
    rows = Packed(tokens(2, 40), torch.arange(40).expand(2, 40), torch.zeros(2))
    kind = teacher.config._attn_implementation
    value = align.matrix_step(model, teacher, slots, rows, False)
    assert teacher.config._attn_implementation == kind
    teacher.set_attn_implementation("eager")
    seen = teacher(rows.input_ids, output_attentions=True, output_hidden_states=True)
    norms = [seen.attentions[layer] for layer in (0, 2)]
    records: dict[int, torch.Tensor] = {}
    with align.record_layers(slots, [0, 2], lambda layer, record: records.update({layer: record})):
        align.run_decoder(teacher, rows.input_ids, rows.position_ids)
    expected = [
        (made - wanted).norm() ** 2 / wanted.norm() ** 2
        for layer, target in zip((0, 2), norms, strict=True)
        for made, wanted in zip(
            model.slots()[layer].mixer.matrix(
                records[layer].inputs, records[layer].mixer_context(None)
            ),
            target,
            strict=True,
        )
    ]
    assert value == pytest.approx(float(sum(expected).detach()) / len(expected), rel=1e-4)
    assert all(
        p.grad is not None and p.grad.any() for p in model.slots()[0].mixer.q_proj.parameters()
    )
