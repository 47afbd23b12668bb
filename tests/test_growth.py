"""The law of growth: a grown model, written and read back by its stock class, gives the source's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import FAMILIES, tiny, tokens

from regraft.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.steps.deepen import Deepen
from regraft.steps.widen import Widen

BOUND = 2e-5
COUPLED = ("gpt2", "gpt_neox")
LAW = settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))


def difference(family: str, folder: Path, *steps: Any, **keys: Any) -> float:
    """max |logit difference| / max |logit| of the grown model, read by its stock class."""
    _, model = tiny(family, **keys)
    model.save_pretrained(folder / "source")
    grown = Checkpoint.open(folder / "source")
    for step in steps:
        grown = step(grown)
    grown.save(folder / "out", overwrite=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32).eval()
    ids = tokens(2, 24)
    with torch.no_grad():
        before, after = model(ids).logits, stock(ids).logits
    return float((before - after).abs().max() / before.abs().max())


@LAW
@given(more=st.integers(1, 40), how=st.sampled_from(["pad", "zero_in", "pair", "split", "duplicate", "aki"]))
@pytest.mark.parametrize("family", FAMILIES)
def test_more_neurons(family: str, tmp_path: Path, more: int, how: str) -> None:
    found = difference(family, tmp_path, Widen(ffn=52 + more, how=how))
    assert found < BOUND or how == "aki"


@LAW
@given(data=st.data(), fold=st.sampled_from(["auto", "stream"]), how=st.sampled_from(["pad", "lemon"]))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_wider_stream(family: str, tied: bool, tmp_path: Path, data: st.DataObject, fold: str, how: str) -> None:
    if family in COUPLED:
        hidden = 8 * data.draw(st.integers(10, 24))
    else:
        hidden = 9 * data.draw(st.integers(4, 12)) if family == "llama" else data.draw(st.integers(37, 120))
    step = Widen(hidden=hidden, how=how, fold=fold)  # type: ignore[arg-type]
    assert difference(family, tmp_path, step, tie_word_embeddings=tied) < BOUND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", ["tile", "duplicate"])
def test_a_copied_stream(family: str, tied: bool, how: str, tmp_path: Path) -> None:
    hidden = 3 * (72 if family in COUPLED else 36)
    assert difference(family, tmp_path, Widen(hidden=hidden, how=how), tie_word_embeddings=tied) < BOUND


@LAW
@given(kv=st.integers(3, 9), group=st.integers(1, 5), how=st.sampled_from(["pad", "zero_in", "pair", "split"]))
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_more_heads(family: str, tmp_path: Path, kv: int, group: int, how: str) -> None:
    step = Widen(heads=max(kv * group, 9), kv_heads=kv, how=how)
    try:
        found = difference(family, tmp_path, step, hidden=36)
    except RegraftError as error:
        assert any(word in str(error) for word in ("use --", "reach --", "--bridge"))
    else:
        assert found < BOUND


@LAW
@given(dim=st.integers(5, 20).map(lambda half: 2 * half))
@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_wider_heads(family: str, rope: str, tmp_path: Path, dim: int) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 5000.0}
    if rope != "default":
        parameters["factor"] = 2.0
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    if rope == "yarn":
        parameters |= {"original_max_position_embeddings": 16}
    assert difference(family, tmp_path, Widen(head_dim=dim), rope_parameters=parameters) < BOUND


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["identity", "llama_pro"])
@pytest.mark.parametrize("layers", [4, 5, 8])
def test_more_layers_bit_for_bit(family: str, how: str, layers: int, tmp_path: Path) -> None:
    assert difference(family, tmp_path, Deepen(layers, how)) == 0.0


def test_keys_follow_a_softmax_scale_that_depends_on_the_layer(tmp_path: Path) -> None:
    assert difference("gpt2", tmp_path, Deepen(5, "llama_pro"), scale_attn_by_inverse_layer_idx=True) < BOUND


@LAW
@given(order=st.permutations([0, 1, 2, 3]), epsilon=st.sampled_from([1e-6, 1e-2]))
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_compose_in_any_order(family: str, tmp_path: Path, order: list[int], epsilon: float) -> None:
    wide = 96 if family in COUPLED else 45
    steps = [Widen(ffn=60), Widen(hidden=wide), Deepen(5), Widen(ffn=130, how="split")]
    steps[0] = Widen(ffn=60) if order.index(0) < order.index(3) else Widen(ffn=140)
    key = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}.get(family, "rms_norm_eps")
    assert difference(family, tmp_path, *[steps[i] for i in order], **{key: epsilon}) < BOUND


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("llama", Widen(hidden=30), "smaller than the source's 36"),
        ("llama", Widen(hidden=40), "36 or 45, or --bridge to write it as mistral"),
        ("llama", Widen(head_dim=11), "even --head-dim, got 11: use 10 or 12"),
        ("llama", Widen(heads=10, kv_heads=4), "use --heads 9 or 12"),
        ("llama", Widen(hidden=40, how="tile"), "use --hidden 36 or 72"),
        ("llama", Widen(ffn=60, how="stretch"), "unknown operator 'stretch'"),
        ("llama", Widen(ffn=60, how="width=tile"), "names no axis 'width'"),
        ("gpt2", Widen(heads=12), "add --hidden 96"),
        ("gpt2", Widen(hidden=75), "use --hidden 72 or 80"),
        ("gpt_neox", Widen(head_dim=10), "add --hidden 90, or --bridge to write it as phi"),
        ("qwen3", Widen(hidden=45, fold="eps"), "use --fold stream"),
        ("llama", Deepen(2), "less than the source's 3"),
        ("llama", Deepen(7, "upscale"), "at most 6 layers"),
        ("llama", Deepen(7, "gstack"), "use 6 or 9"),
        ("llama", Deepen(4, "sandwich"), "unknown --depth-how 'sandwich'"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_what_can(family: str, step: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RegraftError) as caught:
        difference(family, tmp_path, step)
    assert message in str(caught.value), str(caught.value)


def test_dynamic_rotary_positions_forbid_wider_heads(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(RegraftError, match="'dynamic' sets frequencies by the length"):
        difference("llama", tmp_path, Widen(head_dim=12), rope_parameters=rope)


def test_bfloat16_is_stored_as_it_came(tmp_path: Path) -> None:
    _, model = tiny("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    grown = Widen(hidden=45, ffn=60)(Checkpoint.open(tmp_path / "source"))
    assert {lazy.read().dtype for lazy in grown.tensors.values()} == {torch.bfloat16}


def test_noise_separates_copies_and_changes_nothing(tmp_path: Path) -> None:
    assert difference("mistral", tmp_path, Widen(hidden=72, how="tile")) < BOUND
    down = Widen(hidden=72, how="tile")(Checkpoint.open(tmp_path / "source"))["mlp.up.weight", 0].read()
    assert not torch.allclose(down[:, :36], down[:, 36:])
    even = Widen(hidden=72, how="tile", noise=0.0)(Checkpoint.open(tmp_path / "source"))["mlp.up.weight", 0].read()
    assert torch.equal(even[:, :36], even[:, 36:])
