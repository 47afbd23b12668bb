"""Remix: what moves moves bit for bit, grouped heads are broadcast per head, fresh weights are as
stated.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import FAMILIES, tiny, tokens

from regraft import modeling
from regraft.checks.check import check, compare_tensors
from regraft.core import lineage
from regraft.core.checkpoint import Checkpoint
from regraft.core.step import Step, step_entry
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix

REMIXES = {
    "default": Remix(keep="every:2"),
    "none": Remix(keep="none"),
    "supra": Remix(mixer="supra", keep="1", window=0),
    "window": Remix(mixer="window", keep="none", window=7, sinks=2),
}
OPTIONS = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
}


@pytest.fixture(params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    _, model = tiny(request.param, **OPTIONS.get(request.param, {}))
    model.save_pretrained(tmp_path / "source")
    return Checkpoint.open(tmp_path / "source")


def test_keeping_all_layers_keeps_the_logits(source: Checkpoint, tmp_path: Path) -> None:
    Remix(keep="all")(source).save(tmp_path / "out")
    x = tokens(2, 20)
    assert torch.equal(
        modeling.load(tmp_path / "out")(x).logits, modeling.materialize(source)(x).logits
    )


@pytest.mark.parametrize("name", REMIXES)
def test_every_source_tensor_is_accounted_for(
    source: Checkpoint, name: str, tmp_path: Path
) -> None:
    made = REMIXES[name](source)
    assert compare_tensors(source, made) == ([], [])
    made.save(tmp_path / "out")
    opened = Checkpoint.open(tmp_path / "out")
    assert compare_tensors(source, opened) == ([], [])
    assert {key: lazy.shape for key, lazy in opened.tensors.items()} == {
        k: lazy.shape for k, lazy in made.tensors.items()
    }
    assert lineage.count_by_kind(opened) == lineage.count_by_kind(made)
    assert all(
        torch.equal(lazy.read(), made.tensors[key].read()) for key, lazy in opened.tensors.items()
    )


def test_a_window_over_everything_is_the_source(source: Checkpoint) -> None:
    x = tokens(2, 24)
    made = modeling.materialize(Remix(mixer="window", keep="none", window=64)(source))
    torch.testing.assert_close(
        made(x).logits, modeling.materialize(source)(x).logits, rtol=1e-5, atol=1e-5
    )


def test_keys_are_broadcast_per_head(tmp_path: Path) -> None:
    _, model = tiny("llama")
    model.save_pretrained(tmp_path / "source")
    made = Remix(keep="none", window=0, options={"grouped": False})(
        Checkpoint.open(tmp_path / "source")
    )
    wide = made.tensors["mixer.k_proj.weight", 0]
    heads = model.model.layers[0].self_attn.k_proj.weight.view(3, 8, 36)
    assert wide.provenance.kind == "broadcast" and wide.provenance.sources == (
        "model.layers.0.self_attn.k_proj.weight",
    )
    assert torch.equal(wide.read(), heads.repeat_interleave(3, 0).reshape(72, 36))


def test_fresh_weights_are_stated_and_seeded(source: Checkpoint) -> None:
    made = Remix(mixer="supra", window=0, keep="0")(source)
    feature = made.tensors["mixer.feature", 1]
    assert feature.provenance.kind == "fresh" and torch.equal(
        feature.read(), torch.eye(8).expand(9, 8, 8)
    )
    gated = Remix(keep="none")(source)
    assert gated.tensors["mixer.gate.bias", 2].read().unique().item() == -4.0
    assert gated.tensors["mixer.gate.weight", 2].provenance.kind == "zero"


@pytest.mark.parametrize(("inherit", "kept"), [("o", "o"), ("none", ""), ("k,v", "kv")])
def test_projections_that_are_not_inherited_begin_anew(
    source: Checkpoint, inherit: str, kept: str, tmp_path: Path
) -> None:
    whole, made = (
        Remix("gated_deltanet", "0", window=0, inherit=words)(source) for words in ("all", inherit)
    )
    std = (0.4 / source.sizes["hidden"]) ** 0.5
    for (role, layer), lazy in made.tensors.items():
        before = whole.tensors[role, layer]
        letter = role.split(".")[-2].split("_")[0]
        if not role.startswith("mixer.") or before.provenance.kind != "copied" or letter in kept:
            assert lazy.provenance == before.provenance and torch.equal(lazy.read(), before.read())
        elif lazy.read().ndim == 2:
            assert lazy.provenance.kind == "fresh" and lazy.provenance.note.startswith("normal")
            assert lazy.read().std().item() == pytest.approx(std, rel=0.1)
        else:
            assert lazy.read().unique().tolist() == [1.0 if "norm" in role else 0.0]
    assert compare_tensors(source, made) == ([], [])
    made.save(tmp_path / "out")
    assert modeling.load(tmp_path / "out")(tokens(1, 9)).logits.isfinite().all()
    found = check(source.path, tmp_path / "out")
    assert found["holds"] and found["unaccounted"] == []
    dropped = Checkpoint.open(tmp_path / "out").dropped
    assert dropped == made.dropped and all(
        f"with inherit '{inherit}'" in reason for reason in dropped.values()
    )


def test_another_seed_gives_other_fresh_weights(source: Checkpoint) -> None:
    drawn = [
        Remix("supra", "0", window=0, inherit="none", seed=seed)(source)
        .tensors["mixer.q_proj.weight", 1]
        .read()
        for seed in (0, 1, 0)
    ]
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


def test_the_window_branch_stays_the_sources(source: Checkpoint) -> None:
    made = Remix("gated_deltanet", "none", inherit="o")(source)
    assert made.tensors["mixer.window.k_proj.weight", 1].provenance.kind == "copied"
    assert made.tensors["mixer.linear.k_proj.weight", 1].provenance.kind == "fresh"


def test_config_says_what_is_where(source: Checkpoint) -> None:
    remixed = Remix(keep="0,2", window=9, sinks=1)(source)
    config = remixed.config
    assert (
        [spec is None for spec in config["mixers"]]
        == [True, False, True]
        == [a is None for a in config["attention"]]
    )
    assert config["mixers"][1]["window"] == {"name": "window", "window": 9, "sinks": 1}
    host = remixed.anatomy.host_config(config)
    kept = {key: value for key, value in source.config.items() if key != "architectures"}
    assert {key: host[key] for key in kept} == kept and config["model_type"] == "regraft"


def test_it_is_a_step_and_names_itself() -> None:
    step = Remix(mixer="supra")
    assert isinstance(step, Step)
    assert Remix(**step_entry(step)["arguments"]) == step
    assert "Preserves:" in (Remix.__doc__ or "") and "Refuses:" in (Remix.__doc__ or "")


@pytest.mark.parametrize(
    ("keep", "layers", "kept"),
    [
        ("every:4", 10, {0, 4, 8}),
        ("0,7", 8, {0, 7}),
        ("all", 3, {0, 1, 2}),
        ("none", 3, set()),
        ("every:1", 2, {0, 1}),
    ],
)
def test_layers_to_keep(keep: str, layers: int, kept: set[int]) -> None:
    assert Remix(keep=keep).kept_layers(layers) == kept


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Remix(keep="0,3"), "names layer 3: the last layer is 2"),
        (Remix(keep="-1"), "names layer -1: the last layer is 2"),
        (Remix(keep="every:0"), "is not every:N"),
        (Remix(keep="every:-2"), "is not every:N"),
        (Remix(keep="some"), "'some' is not every:N, a list such as 0,7,14, all, none, or a rule"),
        (Remix(mixer="mamba9"), "unknown mixer 'mamba9'"),
        (Remix(mixer="gated"), "'gated'"),
        (Remix(window=-1), "window -1"),
        (Remix(mixer="window", window=0), "window 0 with 4 sinks"),
        (
            Remix(window=0, inherit="o,w"),
            "--inherit 'o,w' names 'w': give all, none or a list of q, k, v, o",
        ),
        (Remix(window=0, inherit=""), "names ''"),
        (Remix(inherit="q,k,v"), "leaves out o, which the window branch of 256 tokens shares"),
    ],
)
def test_wrong_use_is_refused(step: Remix, message: str, tmp_path: Path) -> None:
    _, model = tiny("llama")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(RegraftError, match=message):
        step(Checkpoint.open(tmp_path / "source"))


def test_linearizing_twice_is_refused(source: Checkpoint) -> None:
    with pytest.raises(RegraftError, match="is linearized already"):
        Remix()(Remix(keep="all")(source))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("bert", "both directions"),
        ("vit", "both directions"),
    ],
)
def test_what_mixers_do_not_carry_over_is_refused(
    family: str, message: str, tmp_path: Path
) -> None:
    tiny(family)[1].save_pretrained(tmp_path / "source")
    with pytest.raises(RegraftError, match=message):
        Remix()(Checkpoint.open(tmp_path / "source"))


def test_a_windows_options_and_flags_are_both_read() -> None:
    given = Remix("window", "none", window=9, options={"sinks": 1}).build_spec()
    assert given == {"name": "window", "window": 9, "sinks": 1}
    assert Remix("sink_window", "none", window=9).build_spec() == {
        "name": "sink_window",
        "window": 9,
    }
    assert Remix("sink_window", "none", window=9).build_spec(5)["window"] == 5
    with pytest.raises(RegraftError, match="has no option 'sinks'"):
        Remix("sink_window", "none", options={"sinks": 1}).build_spec()
    with pytest.raises(RegraftError, match="sees nothing"):
        Remix("sink_window", "none", window=0).build_spec()
