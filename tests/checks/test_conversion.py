"""The receipt that a converted layer's window computes what the stock attention in its place does:
for every decoder family and every setting of its attention, and against wrong readings of each.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import CONFIGS, tiny, tokens

from regraft import modeling
from regraft.checks import conversion
from regraft.checks.check import check
from regraft.core.anatomy import find_anatomy, list_families
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.mixers.window import Window
from regraft.modeling.mixer_slot import RowLayout

WINDOW, TIME = 12, 40
REMIX = Remix(mixer="supra", keep="1", window=WINDOW, sinks=2)
LINEAR_ROPE = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "rope_theta": 100.0,
        "original_max_position_embeddings": 16,
    }
}
SLIDES: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
PARTIAL = {"rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.25}}
KINDS = ["full_attention", "full_attention", "sliding_attention"]

# Settings of each family's attention that change what it computes. None of them is lost.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "llama": [{"attention_bias": True}, LINEAR_ROPE, YARN],
    "mistral": [{"sliding_window": 7}, {"sliding_window": None}],
    "ministral": [{"layer_types": KINDS, "sliding_window": 7}],
    "mixtral": [{}, {"sliding_window": 7}],
    "qwen2": [{}, SLIDES],
    "qwen3": [{"attention_bias": True}, SLIDES, {"rms_norm_eps": 1e-2}],
    "gemma": [{"attention_bias": True}],
    "gemma2": [
        {"attn_logit_softcapping": 0.5},
        {"attn_logit_softcapping": None, "query_pre_attn_scalar": 5},
        {"attn_logit_softcapping": 2.0, "layer_types": KINDS, "sliding_window": 7},
    ],
    # The class sizes these norms by hidden // heads.
    "phi": [{}, {"qk_layernorm": True, "hidden_size": 72}, PARTIAL],
    "phi3": [{}, {"sliding_window": 7}, PARTIAL],
    "gpt2": [
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False, "reorder_and_upcast_attn": True},
    ],
    "gpt_neox": [{}, {"attention_bias": False}, PARTIAL],
    "starcoder2": [{"sliding_window": 7}, {"use_bias": False}],
    "gemma3_text": [{"query_pre_attn_scalar": 5}],
    "olmo2": [{"attention_bias": True}],
    "granite_swa": [{"attention_bias": True}],
}
# Settings that no mixer computes: such a source is refused, with the reason.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "gemma2": [({"use_bidirectional_attention": True}, "left to right")],
}
CASES = [(family, keys) for family, settings in SETTINGS.items() for keys in settings]

# Every config key that a stock attention module reads, and what becomes of it.
SIZES = "hidden_size head_dim num_attention_heads num_key_value_heads"
CARRIED = """attention_bias use_bias rms_norm_eps query_pre_attn_scalar attn_logit_softcapping
    scale_attn_weights scale_attn_by_inverse_layer_idx layer_types sliding_window rope_parameters
    partial_rotary_factor attention_multiplier qk_layernorm layer_norm_eps"""
REFUSED_KEYS = "use_bidirectional_attention"
# Dropout acts in training alone; mixers have none. The others choose a kernel, not a result.
WITHOUT_EFFECT = """attention_dropout attn_pdrop resid_pdrop residual_dropout
    reorder_and_upcast_attn _attn_implementation"""
KNOWN = set(f"{SIZES} {CARRIED} {REFUSED_KEYS} {WITHOUT_EFFECT}".split())


def save_tiny(path: Path, family: str, keys: dict[str, Any]) -> Checkpoint:
    tiny(family, **keys)[1].save_pretrained(path)
    return Checkpoint.open(path)


def compare(
    before: Checkpoint, after: Checkpoint, change: Callable[[Any], None] | None = None
) -> conversion.WindowDifference:
    """The receipt, after a change of every converted slot."""
    model = modeling.materialize(after)
    for slot, spec in zip(model.slots(), after.config["mixers"], strict=True):
        if spec and change:
            change(slot)
    return conversion.compare_windows(before, after, model, tokens(1, TIME))


@pytest.mark.parametrize(("family", "keys"), CASES, ids=str)
def test_windows_compute_the_stock_attention(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    before = save_tiny(tmp_path / "source", family, keys)
    remixes = [REMIX]
    if keys is SETTINGS[family][-1]:  # its window is computed by other lines
        remixes.append(Remix(mixer="lolcats", keep="1", window=0, options={"window": WINDOW}))
    for remix in remixes:
        after = remix(before)
        found = compare(before, after)["window_vs_stock"]
        assert found is not None and found < conversion.BOUND, found
        assert set(conversion.comparable_lengths(before, after, TIME)) == {0, 2}


@pytest.mark.parametrize(
    ("family", "keys", "reason"),
    [(family, *case) for family, cases in REFUSED.items() for case in cases],
    ids=str,
)
def test_what_no_mixer_computes_is_refused(
    family: str, keys: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(RegraftError, match=reason):
        REMIX(save_tiny(tmp_path / "source", family, keys))


def test_every_decoder_and_every_key_of_its_attention_is_listed() -> None:
    """A key that a new release of transformers reads, or a new family, has to be listed here."""
    decoders = {
        name
        for name in list_families()
        if name != "regraft" and find_anatomy({"model_type": name}).causal
    }
    assert decoders & set(CONFIGS) == {*SETTINGS, *REFUSED}

    for family in sorted(decoders & set(CONFIGS)):
        config, model = tiny(family)
        slot = find_anatomy(config.to_dict()).slot.format(0)
        source = inspect.getsource(type(model.get_submodule(slot)))
        read = set(re.findall(r"config\.(?!get\b)(\w+)", source))
        read |= set(re.findall(r"getattr\((?:self\.)?config, \"(\w+)\"", source))
        assert read and read <= KNOWN, (family, read - KNOWN)


def test_a_layer_that_slides_keeps_its_window(tmp_path: Path) -> None:
    keys = {"layer_types": KINDS, "sliding_window": 7}
    before = save_tiny(tmp_path / "source", "gemma2", keys)
    after = Remix(mixer="window", keep="none", window=WINDOW, sinks=2)(before)
    seen = [(spec["window"], spec["sinks"]) for spec in after.config["mixers"]]
    assert seen == [(WINDOW, 2), (WINDOW, 2), (7, 0)]
    # There it is the source's attention on rows of any length, elsewhere within the window.
    assert conversion.comparable_lengths(before, after, TIME) == {0: WINDOW, 1: WINDOW, 2: TIME}
    notes = after.history[-1]["notes"]
    assert len(notes) == 1 and "1 replaced layers slide" in notes[0] and "7 tokens" in notes[0]
    gated = replace(REMIX, keep="none")(before)
    gated.save(tmp_path / "out")
    assert check(tmp_path / "source", tmp_path / "out")["window_end"] == 0.0

    linear = Remix(mixer="supra", keep="none", window=4)(before)
    assert [spec["window"]["window"] for spec in linear.config["mixers"]] == [4, 4, 4]
    assert "drops the source's cap on them (50)" in linear.history[-1]["notes"][0]


def without_rotary(slot: Any) -> None:
    slot.rotary = False


def interleave(slot: Any) -> None:
    """As if the weights were for pairs of neighbours, the other layout of rotary positions."""
    window, dim = slot.mixer.window, slot.mixer.attention.dim
    order = torch.arange(dim).view(2, -1).T.flatten()
    for layer in (window.q_proj, window.k_proj):
        heads = layer.weight.data.unflatten(0, (-1, dim))
        layer.weight.data = heads[:, order].flatten(0, 1)


def change_attention(**fields: Any) -> Callable[[Any], None]:
    def change(slot: Any) -> None:
        window = slot.mixer.window
        window.attention = replace(window.attention, **fields)

    return change


def scale_more(slot: Any) -> None:
    change_attention(scale=slot.mixer.window.attention.scale * 1.001)(slot)


def shorten_window(slot: Any) -> None:
    window = slot.mixer.window
    window.options = replace(window.options, window=window.options.window - 1, sinks=0)


def change_epsilon(slot: Any) -> None:
    slot.mixer.window.q_norm.eps = 1e-3


def drop_bias(slot: Any) -> None:
    torch.nn.init.zeros_(slot.mixer.window.v_proj.bias)


class NormAfterRotary(Window):
    """A window whose norms come too late."""

    def attend_blocks(self, q: Any, k: Any, *rest: Any) -> Any:
        return super().attend_blocks(self.norms[0](q), self.norms[1](k), *rest)


def norm_late(slot: Any) -> None:
    window = slot.mixer.window
    window.norms = [window.q_norm, window.k_norm]
    window.q_norm = window.k_norm = None
    window.__class__ = NormAfterRotary


ANY = (scale_more, shorten_window)
ROTARY = (without_rotary, interleave, *ANY)
WRONG = {
    "llama": ROTARY,
    "mixtral": ROTARY,
    "gpt_neox": (*ROTARY, drop_bias),
    "phi": (*ROTARY, drop_bias),
    "qwen3": (*ROTARY, change_epsilon, norm_late),
    "gemma2": (*ROTARY, change_attention(softcap=None), change_attention(softcap=2.1)),
    "gpt2": (*ANY, drop_bias),
}


@pytest.mark.parametrize("family", WRONG)
def test_wrong_readings_are_caught(family: str, tmp_path: Path) -> None:
    keys = {"attn_logit_softcapping": 2.0} if family == "gemma2" else {}
    before = save_tiny(tmp_path / "source", family, keys)
    after = REMIX(before)
    for wrong in WRONG[family]:
        found = compare(before, after, wrong)["window_vs_stock"]
        assert found is not None and found > 2 * conversion.BOUND, (wrong, found)


def test_check_sees_what_windows_alone_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that leaves out positions: both of regraft's own windows agree, and both are wrong."""
    before = save_tiny(tmp_path / "source", "llama", {})
    REMIX(before).save(tmp_path / "right")
    found = check(tmp_path / "source", tmp_path / "right")
    assert found["holds"] and found["window_vs_stock"] < conversion.BOUND

    family = importlib.import_module("regraft.families.llama")
    monkeypatch.setattr(family, "anatomy", replace(family.anatomy, rotary=False))
    REMIX(Checkpoint.open(tmp_path / "source")).save(tmp_path / "wrong")
    found = check(tmp_path / "source", tmp_path / "wrong")
    assert not found["holds"] and found["window_end"] == 0.0
    assert found["window_vs_stock"] > conversion.BOUND
    assert found["window_vs_stock_layer"] in (0, 2)


def test_trained_and_windowless_models_have_no_such_receipt(tmp_path: Path) -> None:
    before = save_tiny(tmp_path / "source", "llama", {})
    made = REMIX(before)
    values = {made.names[key]: lazy.read() * 1.1 for key, lazy in made.tensors.items()}
    made.with_values(values, {"step": "Train", "arguments": {}}).save(tmp_path / "trained")
    found = check(tmp_path / "source", tmp_path / "trained")
    assert found["holds"] and found["window_vs_stock"] is None

    for remix in (
        replace(REMIX, window=0),
        Remix(keep="all"),
        Remix(mixer="window", keep="none", inherit="v,o"),
        Remix(mixer="lolcats", keep="none", window=0, options={"rotary": False}),
    ):
        assert compare(before, remix(before)) == conversion.NO_WINDOW


def test_rotation_is_the_hosts_only_where_the_source_rotates(tmp_path: Path) -> None:
    before = save_tiny(tmp_path / "source", "llama", {})
    model = modeling.materialize(Remix(mixer="window", keep="none")(before))
    slot, x = model.slots()[0], torch.randn(1, 5, 36)
    angle = torch.rand(1, 5, 4).repeat(1, 1, 2)
    tables = (angle.cos(), angle.sin())
    rows = RowLayout()
    turned, plain = slot(x, position_embeddings=tables, rows=rows)[0], slot(x, rows=rows)[0]
    slot.rotary = False
    assert torch.equal(slot(x, position_embeddings=tables, rows=rows)[0], plain)
    assert not torch.equal(turned, plain)
