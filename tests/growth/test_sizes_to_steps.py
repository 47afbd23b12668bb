"""`regraft grow`, its plan and its receipts, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import GROWABLE, tiny
from safetensors.torch import load_file, save_file

from regraft.checks import growth
from regraft.checks.check import check
from regraft.checks.outputs import GREEDY_TOKENS
from regraft.cli import main as cli
from regraft.core.checkpoint import Checkpoint
from regraft.growth.operators import AUTO, AUTO_POST_NORM
from regraft.growth.sizes_to_steps import Growth


def source(folder: Path, family: str = "llama", **keys: Any) -> str:
    tiny(family, **keys)[1].save_pretrained(folder / "source")
    return str(folder / "source")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_grow_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = source(tmp_path), str(tmp_path / "out")
    code, said, _ = run(
        capsys, "grow", given, out, "--hidden", "45", "--ffn", "60", "--layers", "5", "--json"
    )
    made = json.loads(said)
    assert code == 0 and made["target"] | {"hidden": 45, "ffn": 60, "depth": 5} == made["target"]
    assert made["step0"] is None and made["tensors"]["unclaimed"]["count"] == 0
    code, said, _ = run(capsys, "check", given, out, "--json")
    receipts = json.loads(said)
    assert (
        code == 0 and receipts["holds"] and receipts["exact"] and receipts["rel_logit_diff"] < 2e-5
    )
    assert receipts["greedy"] == GREEDY_TOKENS and not receipts["unaccounted"]
    code, said, _ = run(capsys, "check", given, out)
    assert code == 0 and "greedy tokens that agree" in said


@pytest.mark.parametrize("family", ["bert", "dinov2"])
def test_an_encoder_grows_in_drawn_copies(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = source(tmp_path, family), str(tmp_path / "out")
    hidden = 2 * Checkpoint.open(given).sizes["hidden"]
    code, said, _ = run(
        capsys, "grow", given, out, "--hidden", str(hidden), "--width-init", "hidden=duplicate"
    )
    assert code == 0 and "state" not in said
    assert check(given, out)["rel_logit_diff"] < 2e-5


def test_the_card_names_the_papers_of_its_operators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = source(tmp_path), tmp_path / "out"
    run(
        capsys,
        "grow",
        given,
        str(out),
        "--hidden",
        "45",
        "--width-init",
        "lemon",
        "--layers",
        "5",
        "--depth-init",
        "llama_pro",
    )
    card = (out / "README.md").read_text()
    assert "arXiv 2310.07999" in card and "arXiv 2401.02415" in card and "\n\n\n" not in card


@pytest.mark.parametrize(("family", "stands"), [("llama", AUTO), ("bert", AUTO_POST_NORM)])
def test_auto_is_the_operators_that_it_stands_for(
    family: str, stands: tuple[str, str], tmp_path: Path
) -> None:
    before = Checkpoint.open(source(tmp_path, family))
    sizes = {"hidden": 2 * before.sizes["hidden"], "ffn": 60, "layers": 5}
    width, deep = stands
    ours, theirs = (
        Growth(**sizes, width_init="auto")(before),
        Growth(**sizes, width_init=width, depth_init=deep)(before),
    )
    assert all(
        torch.equal(lazy.read(), theirs.tensors[key].read()) for key, lazy in ours.tensors.items()
    )
    assert growth.is_exact(list(ours.history)) == (width != "copy")
    stacked = Growth(**sizes, width_init="auto", depth_init="stack")
    assert not growth.is_exact(list(stacked(before).history))
    assert stacked.resolve_auto(before).width_init == "pad"


def test_a_direct_copy_is_grown_and_said_to_be_inexact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = source(tmp_path), tmp_path / "out"
    sizes = ["--hidden", "45", "--ffn", "60", "--layers", "5", "--width-init", "copy"]
    code, said, _ = run(capsys, "grow", given, str(out), *sizes)
    assert code == 0 and "Not exact: outputs move" in said
    before, after = Checkpoint.open(given), Checkpoint.open(out)
    assert (after["mlp.up.weight", 0].read()[:52, :36] == before["mlp.up.weight", 0].read()).all()
    assert run(capsys, "check", given, str(out))[0] == 0
    code, _, said = run(
        capsys, "grow", given, str(tmp_path / "deep"), *sizes, "--depth-init", "stack"
    )
    assert code == 2 and "leave out --depth-init stack" in said


def test_a_refused_tile_names_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = source(tmp_path, "bert"), str(tmp_path / "out")
    code, _, said = run(capsys, "grow", given, out, "--hidden", "104", "--width-init", "tile")
    assert code == 2 and "hidden 104" in said and "--hidden 72 or 144" in said
    code, _, said = run(capsys, "grow", given, out, "--ffn", "60", "--width-init", "tile")
    assert code == 2 and "ffn 60 is no multiple of 52" in said


def test_a_plan_of_growth_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path)
    code, said, _ = run(capsys, "plan", given, "--head-dim", "16", "--json")
    assert code == 0 and json.loads(said)["target"]["dim"] == 16
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_target_config_gives_all_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path)
    config, _ = tiny("llama", hidden=48, heads=12, kv=4, ffn=61, layers=4)
    config.save_pretrained(tmp_path / "target")
    code, _, said = run(
        capsys, "grow", given, str(tmp_path / "out"), "--to", str(tmp_path / "target")
    )
    assert code == 0, said
    assert Checkpoint.open(tmp_path / "out").sizes == Checkpoint.open(given).anatomy.solve(
        config.to_dict()
    )
    assert check(given, tmp_path / "out")["holds"]


def test_inexact_growth_says_how_far_it_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = source(tmp_path), str(tmp_path / "out")
    code, said, _ = run(
        capsys, "grow", given, out, "--layers", "6", "--depth-init", "stack", "--json"
    )
    step0 = json.loads(said)["step0"]
    assert (
        code == 0 and step0["rel_logit_diff"] > 1e-3 and step0["loss_source"] != step0["loss_grown"]
    )
    receipts = check(given, out)
    assert receipts["holds"] and not receipts["exact"]


def test_a_grown_model_that_was_damaged_does_not_hold(tmp_path: Path) -> None:
    given, out = source(tmp_path), tmp_path / "out"
    Growth(ffn=60)(Checkpoint.open(given)).save(out)
    values = load_file(out / "model.safetensors")
    values["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(values, out / "model.safetensors", metadata={"format": "pt"})
    (out / "lineage.json").write_text(
        json.dumps({**json.loads((out / "lineage.json").read_text()), "files": {}})
    )
    receipts = check(given, out)
    assert not receipts["holds"] and receipts["rel_logit_diff"] > receipts["bound"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_another_storage_dtype(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = source(tmp_path), tmp_path / "out"
    assert run(capsys, "grow", given, str(out), "--ffn", "60", "--dtype", dtype)[0] == 0
    assert {lazy.dtype for lazy in Checkpoint.open(out).tensors.values()} == {getattr(torch, dtype)}
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    assert check(given, out)["holds"]


def test_a_wider_dtype_rounds_nothing_to_the_source_s(tmp_path: Path) -> None:
    """Grown in float32, a model in bfloat16 has logits as near as one in float32."""
    model = tiny("llama", dtype="bfloat16")[1].to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    before = Checkpoint.open(tmp_path / "source")
    Growth(hidden=72, dtype="float32")(before).save(tmp_path / "wide")
    found = check(tmp_path / "source", tmp_path / "wide")
    assert found["holds"] and found["bound"] == 2e-5 and found["rel_logit_diff"] < 2e-5

    # What was rounded on the way is allowed for, whatever it is stored as in the end.
    Growth(hidden=72)(before).save(tmp_path / "grown")
    Growth(layers=5, dtype="float32")(Checkpoint.open(tmp_path / "grown")).save(tmp_path / "out")
    assert check(tmp_path / "source", tmp_path / "out")["bound"] == 3e-2


def test_moments_come_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = source(tmp_path), tmp_path / "out"
    names = Checkpoint.open(given).names.values()
    values = load_file(Path(given) / "model.safetensors")
    state = {
        f"{kind}/{name}": values[name].abs() for kind in ("exp_avg", "exp_avg_sq") for name in names
    }
    save_file(
        state | {f"step/{name}": torch.tensor(7.0) for name in names}, tmp_path / "adam.safetensors"
    )
    code, _, said = run(
        capsys,
        "grow",
        given,
        str(out),
        "--hidden",
        "45",
        "--optimizer-state",
        str(tmp_path / "adam.safetensors"),
    )
    assert code == 0, said
    grown = load_file(out / "optimizer.safetensors")
    assert grown["exp_avg/model.embed_tokens.weight"].shape == (97, 45)
    assert {float(value) for key, value in grown.items() if key.startswith("step/")} == {7.0}


@pytest.mark.parametrize("family", GROWABLE)
def test_growth_of_every_family_holds(family: str, tmp_path: Path) -> None:
    given = source(tmp_path, family)
    ffn = {"mixtral": 64, "dinov2": 108}.get(family, 60)
    Growth(ffn=ffn, layers=4)(Checkpoint.open(given)).save(tmp_path / "out")
    receipts = check(given, tmp_path / "out")
    assert receipts["holds"], receipts
    assert (receipts["greedy"] is None) == (not Checkpoint.open(given).anatomy.causal)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hidden", "abc"], "--hidden takes a whole number, got 'abc'"),
        (["--kv-heads", "1.5"], "--kv-heads takes a whole number, got '1.5'"),
        (["--seed", "x"], "--seed takes a whole number, got 'x'"),
        (["--noise", "x"], "--noise takes a number, got 'x'"),
        (["--ffn", "60", "--noise", "-1"], "--noise -1.0 is no spread"),
        (["--ffn", "60", "--fold", "x"], "--fold takes auto or stream or eps, got 'x'"),
        (["--ffn", "60", "--width-init", "tile"], "use 52 or 104, or --width-init lemon"),
        (["--heads", "10"], "3 key/value heads evenly: use --heads 9 or 12"),
        (["--kv-heads", "4"], "4 key/value heads evenly: use --heads 12"),
        (["--layers", "0"], "0 is less than the source's 3"),
        (["--ffn", "10"], "smaller than the source's 52"),
        (["--width-init", "stretch", "--ffn", "60"], "unknown operator 'stretch'"),
        (["--depth-init", "fold", "--layers", "4"], "unknown --depth-init 'fold'"),
        (["--widht", "60"], "unknown flag --widht"),
        ([], "nothing to grow"),
        (["--to", "nowhere"], "no config.json at 'nowhere'"),
        (["--ffn", "60", "--dtype", "int8"], "unknown --dtype 'int8'"),
        (["--ffn", "60", "--optimizer-state", "none.safetensors"], "no optimiser state at"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_ends_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path)
    code, said, error = run(capsys, "grow", given, str(tmp_path / "out"), *words)
    lines = [
        line
        for line in error.splitlines()
        if line.startswith("regraft: ") and "to write" not in line
    ]
    assert code == 2 and not said and message in lines[-1], error
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_sizes_and_a_target_config_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path)
    code, _, error = run(capsys, "grow", given, str(tmp_path / "out"), "--to", given, "--ffn", "60")
    assert code == 2 and "leave out --ffn" in error


def test_a_target_of_another_family_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path)
    tiny("gpt2")[0].save_pretrained(tmp_path / "target")
    code, _, error = run(
        capsys, "grow", given, str(tmp_path / "out"), "--to", str(tmp_path / "target")
    )
    assert code == 2 and "is a gpt2, the source a llama" in error


def test_the_source_is_not_grown_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path)
    before = {file.name: file.read_bytes() for file in Path(given).iterdir()}
    (tmp_path / "link").symlink_to(given)
    for name in ("source", "link"):
        code, _, error = run(
            capsys, "grow", given, str(tmp_path / name), "--ffn", "60", "--overwrite"
        )
        assert code == 2 and "is the source" in error
    assert {file.name: file.read_bytes() for file in Path(given).iterdir()} == before


@pytest.mark.parametrize(
    "words", [["generate", "MODEL", "hello"], ["eval", "MODEL"], ["bench", "MODEL"]]
)
def test_an_encoder_does_not_continue_text(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path, "bert")
    code, _, error = run(capsys, *[given if word == "MODEL" else word for word in words])
    assert code == 2 and "is a bert, which does not continue text" in error.splitlines()[-1]


def test_suggested_heads_can_be_had(tmp_path: Path) -> None:
    given = Checkpoint.open(source(tmp_path))
    assert Growth(heads=12)(given).sizes["kv"] == 4
    assert Growth(heads=12, kv_heads=4)(given).sizes["group"] == 3
