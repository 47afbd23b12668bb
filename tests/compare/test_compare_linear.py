"""`regraft compare` of linearizations: arms in the words of Remix and of stages, each beside its
own scratch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.comparison import LLAMA, RECIPES, recipe
from helpers.html import Balanced

from regraft import modeling
from regraft.cli import main as cli
from regraft.compare import recipe as schema
from regraft.compare import report, scheduler, start
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.train.lit import Lit

RETNET = {"mixer": "retnet", "keep": "0", "window": 0}
SCRATCH = {"name": "scratch", "scratch": True, "linear": RETNET}
LIT = {"learn": "lit", "lit": {"window": 2, "tau": 9.0, "warmup": 2}}
DISTIL = {"name": "distil", "against": "scratch", "linear": {
    "keep": "0", "window": 8, "sinks": 1, "calibration": 40,
    "stages": [{"kind": "align", "tokens": 384, "batch": 4}, {"kind": "distil", "lr_new": 0.5}],
}}  # fmt: skip
ARMS = [
    SCRATCH,
    {"name": "copy", "against": "scratch", "linear": RETNET | {"inherit": "o"}},
    {"name": "lit", "against": "scratch", "linear": RETNET | {"inherit": "o", "stages": [LIT]}},
    {"name": "plain", "scratch": True},
    DISTIL | {"against": "plain"},
    {
        "name": "taylor",
        "against": "plain",
        "linear": {"method": "taylor", "keep": "restore:1", "calibration": 48},
    },
]
CHANGES = {"source": LLAMA | {"num_hidden_layers": 2}, "target": {}, "arms": ARMS}


def test_stages_take_the_budgets_words(tmp_path: Path) -> None:
    made = schema.load(recipe(tmp_path, **CHANGES), {})
    (scratch,) = made.stages(made.arm("scratch"))
    (lit,) = made.stages(made.arm("lit"))
    assert lit.lit == Lit(window=2, tau=9.0, warmup=2) and (lit.learn, scratch.learn) == (
        "lit",
        "all",
    )
    assert (
        lit.steps == scratch.steps == made.stage(made.train).steps and lit.lr_new == made.train.lr
    )
    align, distil = made.stages(made.arm("distil"))
    assert (align.kind, align.tokens, align.batch) == ("align", 384, 4)
    taylor = made.arm("taylor").linear
    assert (taylor.mixer, taylor.window, taylor.keep, taylor.calibration) == (
        "gated_deltanet",
        0,
        "restore:1",
        48,
    )
    assert [(stage.kind, stage.batch, stage.lr_body) for stage in made.stages(made.arm("taylor"))] == [
        ("align", 8, made.train.lr), ("distil", 8, 1e-5)
    ]  # fmt: skip
    assert (distil.kind, distil.tokens, distil.batch, distil.lr_new) == (
        "distil",
        1280 - 384,
        8,
        0.5,
    )


BAD = [
    ([SCRATCH, ARMS[3], {"name": "x", "linear": RETNET}], "'x' is against 'None'.*scratch, plain"),
    ([SCRATCH, {"name": "x", "against": "y", "linear": RETNET}], "against 'y'"),
    ([SCRATCH | {"against": "scratch"}], "'scratch' is against 'scratch'"),
    ([SCRATCH, {"name": "x", "linear": RETNET, "random": True}], "'random', 'linear'"),
    ([SCRATCH, {"name": "x", "linear": {"mixre": "retnet"}}], "mixre"),
    (
        [SCRATCH, {"name": "x", "linear": RETNET, "legs": [{"layers": "bottom:1", "share": 0.5}]}],
        "stages instead",
    ),
]


@pytest.mark.parametrize(("wrong", "words"), BAD, ids=[words for _, words in BAD])
def test_arms_that_make_no_sense_are_refused(tmp_path: Path, wrong: list[dict], words: str) -> None:
    with pytest.raises(RegraftError, match=words):
        schema.load(recipe(tmp_path, **CHANGES | {"arms": wrong}), {})


NOT = [
    (RETNET | {"keep": "7"}, "names layer 7"),
    (RETNET | {"mixer": "retnot"}, "unknown mixer 'retnot'"),
    (RETNET | {"stages": [{"lerning": 1}]}, "stage 0 of arm 'x'.*lerning"),
    (RETNET | {"stages": [{"tokens": 5}]}, "less than one step"),
]


@pytest.mark.parametrize(("linear", "words"), NOT, ids=[words for _, words in NOT])
def test_what_cannot_be_made_is_said_before_training(
    tmp_path: Path, text: Path, linear: dict, words: str
) -> None:  # noqa: F811
    changes = CHANGES | {"arms": [SCRATCH, {"name": "x", "linear": linear}], "data": str(text)}
    with pytest.raises(RegraftError, match=words):
        scheduler.run(schema.load(recipe(tmp_path, **changes), {}), tmp_path / "out")
    assert not (tmp_path / "out" / "sources").exists()


def test_a_scratch_arm_has_the_architecture_and_nothing_of_the_source(tmp_path: Path) -> None:
    made = schema.load(recipe(tmp_path, **CHANGES), {})
    config = LLAMA | {
        "num_hidden_layers": 2,
        "vocab_size": 270,
        "architectures": ["LlamaForCausalLM"],
    }
    model = start.init_from_scratch(config, made.arm("scratch"), seed=1)
    modeling.build_random_model(config, 2).save_pretrained(tmp_path / "source")
    moved = modeling.materialize(Remix(**RETNET, inherit="o")(Checkpoint.open(tmp_path / "source")))
    mine, theirs = dict(model.named_parameters()), dict(moved.named_parameters())
    assert {name: p.shape for name, p in mine.items()} == {
        name: p.shape for name, p in theirs.items()
    }
    assert all((mine[name] != theirs[name]).any() for name in mine if mine[name].std() > 0)
    again = dict(start.init_from_scratch(config, made.arm("scratch"), seed=1).named_parameters())
    assert all((mine[name] == again[name]).all() for name in mine)


@pytest.mark.parametrize("name", ["xatl", "linear"])
def test_shipped_comparisons_are_valid(name: str) -> None:
    made = schema.load(str(RECIPES / f"compare_{name}.yaml"), {"seeds": "[7]"})
    for arm in made.arms:
        assert arm.linear is not None and made.arm(made.scratch_name(arm)).scratch
        assert sum(stage.tokens for stage in made.stages(arm)) == made.train.tokens
        assert Remix.from_options(arm.linear).build_spec()


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_a_comparison_of_linearizations_end_to_end(tmp_path: Path, text: Path, capsys) -> None:  # noqa: F811
    place, out = recipe(tmp_path, **CHANGES | {"data": str(text), "seeds": [0]}), tmp_path / "out"
    assert cli.main(["compare", place, str(out), "--jobs", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["arms"]
    assert {name: arm["against"] for name, arm in found.items()} == {
        "scratch": None, "copy": "scratch", "lit": "scratch", "plain": None, "distil": "plain", "taylor": "plain"
    }  # fmt: skip
    assert found["taylor"]["seeds"]["0"]["fitting"]["keep"] in ("0", "1")
    assert (
        found["lit"]["unfrozen"] == {"mean": 4, "std": 0.0, "count": 1}
        and found["copy"]["unfrozen"]["count"] == 0
    )
    assert found["scratch"]["kl"]["count"] == 0 < found["distil"]["kl"]["count"]
    assert (
        len(found["copy"]["curve"]["kl"]) == len(found["copy"]["curve"]["loss"])
        and found["copy"]["kl"]["mean"] > 0
    )
    assert (
        found["distil"]["seeds"]["0"]["fitting"]["tokens"] == 48
        and found["distil"]["curve"]["tokens"][0] == 48
    )
    assert found["copy"]["start_loss"]["mean"] < found["scratch"]["start_loss"]["mean"]
    assert {
        arm["tokens"]["mean"] for name, arm in found.items() if name not in ("distil", "taylor")
    } == {1280}
    table = (out / "table.md").read_text().splitlines()
    assert (
        table[0].split(" | ")[1:3] == ["against", "loss at start"]
        and len({row.count(" | ") for row in table[:8]}) == 1
    )
    page = (out / "compare.html").read_text()
    Balanced().feed(page)
    assert page.count("data:image/svg+xml") == 6 and "beside plain" in page
    json.loads((out / "compare.json").read_text())


def test_a_loss_that_was_there_from_the_start_is_said() -> None:
    arm = {
        "savings": {"times_tokens": None, "tokens_to_reach": 0.0},
        "seeds": {},
        "savings_over_seeds": {"times_tokens": {}},
    }
    assert report.format_saving(arm, "times_tokens", 1, " x") == "from the start"
