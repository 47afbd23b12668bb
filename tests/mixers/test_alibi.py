"""ALiBi of a source: exact in windows, the decay of linear mixers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import max_relative_difference, tokens
from helpers.zoo import build
from torch import Tensor

import regraft
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.attention import Attention, alibi_slopes
from regraft.mixers.base import MixerContext
from regraft.mixers.registry import mixer_class
from regraft.mixers.remix import Remix
from regraft.train.gradient_checkpointing import set_gradient_checkpointing

HEADS, DIM, TIME = 6, 4, 9


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    """A tiny BLOOM."""
    build("bloom")[1].save_pretrained(tmp_path / "source")
    return Checkpoint.open(tmp_path / "source")


@pytest.mark.parametrize("name", ["t2r", "hedgehog"])
def test_linear_mixers_decay_by_the_slopes(name: str) -> None:
    """What they give is the same mix as without ALiBi, times e^(-slope distance)."""
    matrices: list[Tensor] = []
    for alibi in (None, 8.0):
        torch.manual_seed(0)
        attention = Attention(HEADS * DIM, HEADS, 1, DIM, DIM**-0.5, rotary=False, alibi=alibi)
        mixer = mixer_class(name)(attention, {"name": name})
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.copy_(torch.randn_like(parameter))
            matrices.append(mixer.matrix(torch.randn(2, TIME, HEADS * DIM), MixerContext()))
    plain, found = matrices
    place = torch.arange(TIME)
    distance = (place[:, None] - place).clamp(min=0)
    weight = plain * torch.exp(-torch.tensor(alibi_slopes(HEADS)).view(-1, 1, 1) * distance)
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
    assert torch.allclose(weight, found, atol=1e-5)


def test_lolcats_over_the_whole_row_is_the_source(source: Checkpoint) -> None:
    ids = tokens(2, 13)
    step = Remix(mixer="lolcats", window=0, options={"window": 16}, keep="none")
    with torch.no_grad():
        before, after = (
            regraft.modeling.materialize(one)(ids).logits for one in (source, step(source))
        )
    assert max_relative_difference(before, after) < 2e-5


def test_gates_begin_at_the_slopes_and_other_decays_are_said(source: Checkpoint) -> None:
    for name in ("gated_deltanet", "gla", "rwkv6"):
        made = Remix(mixer=name, window=0, keep="none")(source)
        mixer = regraft.modeling.materialize(made).slots()[0].mixer
        if name == "gated_deltanet":
            found = torch.nn.functional.softplus(mixer.decay.bias)
        else:
            bias = mixer.decay_out.bias.unflatten(0, (4, -1)).mean(1)
            found = bias.exp() if name == "rwkv6" else -torch.nn.functional.logsigmoid(bias) / 16
        assert torch.allclose(found, torch.tensor(alibi_slopes(4)), rtol=1e-4), name
        assert "notes" not in made.history[-1]
    for name in ("retnet", "mamba"):
        notes = Remix(mixer=name, window=0)(source).history[-1]["notes"]
        assert "drops the source's ALiBi" in notes[0]


def test_layers_that_are_computed_again_know_padding(source: Checkpoint) -> None:
    """BLOOM's layers pass nothing on: regraft's checkpointing tells them, others are refused."""
    model = regraft.modeling.materialize(Remix(mixer="window", keep="none")(source))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[:, :3] = 0

    def gradient() -> Tensor:
        model.zero_grad()
        model(input_ids=ids, attention_mask=mask, use_cache=False).logits.sum().backward()
        found = model.get_input_embeddings().weight.grad
        assert found is not None
        return found.clone()

    plain = gradient()
    set_gradient_checkpointing(model, True)
    assert torch.allclose(plain, gradient(), atol=1e-5)
    set_gradient_checkpointing(model, False)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(RegraftError, match="was not told of padding and documents"):
        gradient()
