"""The command line's contract: exit codes, one line on wrong use, JSON alone on standard output,
resuming.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers import ROOT
from helpers.cli import as_json, refused, run_main
from helpers.tiny import read_files, save_model, write_text

from regraft.cli import main as cli
from regraft.cli import parser as cli_parser
from regraft.errors import RegraftError
from regraft.io.output import WORK
from regraft.recipes import schema


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source model, text, a linearized model."""
    place = tmp_path_factory.mktemp("cli")
    save_model(place / "model")
    write_text(place / "text.txt")
    (place / "copa.jsonl").write_text(
        '{"query": "it rained, so", "choices": ["he ran", "it sat"], "gold": 0}\n' * 3
    )
    arguments = ["--keep", "0", "--window", "16", "--sinks", "2"]
    assert cli.main(["linearize", str(place / "model"), str(place / "linear"), *arguments]) == 0
    return place


@pytest.fixture
def recipe(folder, tmp_path):
    """A recipe for a run of some seconds."""
    fields = {
        "source": str(folder / "model"),
        "train": [{"path": str(folder / "text.txt")}],
        "heldout": str(folder / "text.txt"),
        "remix": {"keep": "0", "window": 16, "sinks": 2},
        "calibration": 128,
        "stages": [
            {"kind": "align", "tokens": 256, "length": 64},
            {"kind": "distil", "tokens": 512, "length": 64},
        ],
        "measure": {
            "windows": 2,
            "length": 64,
            "tasks": ["copa", "passkey"],
            "task_data": str(folder),
            "limit": 2,
            "recall": [250],
            "bench": [64],
            "bench_steps": 2,
            "prompts": ["the"],
            "sample_tokens": 4,
        },
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fields))
    return file


def start(*words: object) -> subprocess.Popen:
    """The command as a process of its own, which hears Ctrl-C even where this one was started to
    ignore it.
    """
    command = [sys.executable, "-m", "regraft", *map(str, words)]
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a child inherits what is ignored
    try:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_imports_nothing_heavy():
    script = (
        "import sys, regraft.cli.main\n"
        "try: regraft.cli.main.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in cli.VERBS)


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no verb given"),
        (["plann", "x"], "did you mean plan?"),
        (["plan"], "required: source"),
        (["plan", "x", "--kep", "3"], "unknown flag --kep"),
        (["generate", "x", "--prompt", "a"], "given by its place, regraft generate MODEL PROMPT"),
        (
            ["generate", "x", "a", "--max-new-tokens", "5"],
            "in '--max-new-tokens 5'): did you mean --tokens?",
        ),
        (["plan", "x", "--window", "wide"], "wide"),
        (["plan", "/no/such/model"], "no model at '/no/such/model'"),
        (["linearize", "/no/such/model", "/tmp/out"], "no model at"),
        (["bench", "/no/such/model", "--lengths", "1q"], "'1q'"),
        (["train", "a", "b"], "--data PATH"),
        (["train", "a", "b", "--stage", "sleep"], "sleep"),
        (
            ["eval", "x", "--limit", "3"],
            "--limit 3 would change nothing: it is for benchmarks and recall",
        ),
        (["eval", "x", "--lengths", "1k"], "--lengths 1k would change nothing"),
        (
            ["plan", "x", "--keep", "every:2"],
            "--keep every:2 would change nothing: give --mixer, --method or --for",
        ),
        (
            ["plan", "x", "--gpus", "64", "--tokens", "1B"],
            "--gpus 64, --tokens 1B would change nothing: give --train",
        ),
        (
            [
                "train",
                "a",
                "b",
                "--data",
                "d",
                "--tokens",
                "9000",
                "--teacher-cache-kind",
                "topk:4",
            ],
            "give --teacher-cache",
        ),
        (["eval", "x", "--plot"], "add --positions"),
        (["run", "/no/such/recipe.yaml", "/tmp/out"], "no recipe at"),
        (["run", "/no/such/recipe.py:f", "/tmp/out"], "no recipe file"),
        (["run", "/no/such/recipe.yaml", "/tmp/out", "--seed"], "has no value"),
        (["generate", "/no/such/model", "hello"], "no model at"),
        (["eval", "/no/such/model"], "no model at"),
    ],
)
def test_wrong_use_is_one_line(words, says, capsys):
    assert says in refused(capsys, *words)


def test_contexts_beyond_learned_positions_are_refused(tmp_path, capsys):
    gpt2 = save_model(tmp_path / "gpt2", "gpt2")
    for words in (
        ["bench", gpt2, "--lengths", "100k"],
        ["eval", gpt2, "--tasks", "mqar", "--lengths", "100k"],
    ):
        assert "positions: 102" in refused(capsys, *words)


def test_plan_prints_one_object(folder, capsys):
    table = as_json(capsys, "plan", folder / "model", "--mixer", "gated_deltanet", "--keep", "0")
    assert {"source", "target", "parameters", "tensors", "bytes", "peak_bytes"} <= set(table)
    assert table["tensors"]["unclaimed"]["count"] == 0


def test_plan_is_readable(folder, capsys):
    code, out, err = run_main(capsys, "plan", folder / "linear")
    assert code == 0 and "Weight map" in out and err == ""


def test_check_holds_for_what_linearize_made_and_not_for_a_changed_copy(folder, tmp_path, capsys):
    table = as_json(capsys, "check", folder / "model", folder / "linear")
    assert table["holds"] and table["unaccounted"] == [] and table["parallel_vs_recurrent"] < 1e-4
    save_model(tmp_path / "other", layers=4, seed=7)
    code, out, err = run_main(capsys, "check", tmp_path / "other", folder / "linear")
    assert code == 1 and "does NOT hold" in out and "Traceback" not in err


def test_keep_beyond_the_last_layer(folder, tmp_path, capsys):
    line = refused(capsys, "linearize", folder / "model", tmp_path / "out", "--keep", "0,9")
    assert "last layer is 3" in line and not (tmp_path / "out").exists()


def test_existing_output_is_refused(folder, capsys):
    assert "linear" in refused(capsys, "linearize", folder / "model", folder / "linear")


def test_eval_with_baselines(folder, capsys):
    words = [
        "--data",
        folder / "text.txt",
        "--baseline",
        folder / "model",
        "--windows",
        2,
        "--length",
        64,
    ]
    table = as_json(capsys, "eval", folder / "linear", *words)
    assert table["perplexity"] > 1 and len(table["baselines"]) == 5


@pytest.mark.parametrize(
    ("name", "content"), [("empty.txt", b""), ("latin.txt", b"caf\xe9"), ("odd.pdf", b"text")]
)
def test_wrong_text(folder, tmp_path, capsys, name, content):
    (tmp_path / name).write_bytes(content)
    assert name in refused(capsys, "eval", folder / "model", "--data", tmp_path / name)


def test_generate_streams_and_tells_the_state(folder, capsys):
    code, out, err = run_main(capsys, "generate", folder / "linear", "the quick", "--tokens", 8)
    assert code == 0 and out and "state after" in err and "constant" in err
    table = as_json(capsys, "generate", folder / "linear", "the quick", "--tokens", 8)
    assert table["text"].strip() == out.strip() and table["converted_bytes"] > 0
    chat = as_json(
        capsys, "generate", folder / "linear", "hi", "--tokens", 4, "--chat", "--temperature", 0.9
    )
    assert chat["prompt_tokens"] > 9


def test_empty_prompt(folder, capsys):
    assert "prompt is ''" in refused(capsys, "generate", folder / "linear", "")


def test_train_writes_a_model_and_will_not_write_it_twice(folder, tmp_path, capsys):
    words = ["train", folder / "linear", tmp_path / "trained", "--data", folder / "text.txt"]
    words += ["--teacher", folder / "model", "--tokens", 256, "--length", 64]
    table = as_json(capsys, *words)
    assert table["tokens"] == 256 and table["flops"] > 0
    assert as_json(capsys, "plan", tmp_path / "trained")["steps"][-1]["step"] == "Train"

    # The same command again finds its work done; another one does not touch it.
    before = read_files(tmp_path / "trained")
    assert as_json(capsys, *words) == table
    words[words.index("--tokens") + 1] = 512
    assert "finished training with another stage" in refused(capsys, *words)
    assert read_files(tmp_path / "trained") == before


def test_train_needs_its_teacher_and_mixers(folder, tmp_path, capsys):
    words = ["--data", folder / "text.txt", "--tokens", 256, "--length", 64]
    assert "teacher" in refused(capsys, "train", folder / "linear", tmp_path / "a", *words)
    words += ["--stage", "align"]
    assert "linearize it first" in refused(
        capsys, "train", folder / "model", tmp_path / "b", *words
    )


def test_recipe_overrides(recipe):
    made = schema.load(
        str(recipe), {"stages.1.tokens": "640", "remix.mixer": "supra", "minutes": "2.5"}
    )
    assert (made.stages[1].tokens, made.remix.mixer, made.minutes) == (640, "supra", 2.5)
    assert schema.build(yaml.safe_load(schema.dump(made))) == made


def test_a_number_where_a_recipe_wants_text_is_text(recipe):
    assert schema.load(str(recipe), {"remix.keep": "0"}).remix.keep == "0"
    fields = yaml.safe_load(recipe.read_text()) | {"source": 7, "measure": {"prompts": [1984]}}
    made = schema.build(fields)
    assert made.source == "7" and made.measure.prompts == ["1984"]
    with pytest.raises(RegraftError, match="seed"):
        schema.load(str(recipe), {"seed": "many"})


def test_recipe_from_python(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from regraft.recipes.schema import Recipe, Text\ndef small():\n    return Recipe('m',"
        " [Text('t')], seed=3)\n"
    )
    assert schema.load(f"{file}:small", {"seed": "4"}).seed == 4
    with pytest.raises(RegraftError, match="must be a function that returns a Recipe"):
        schema.load(f"{file}:large", {})


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("remix.windw", "window"),
        ("sed", "seed"),
        ("stages.0.toknes", "tokens"),
        ("stages.7.tokens", "no position in a list of 2"),
        ("source.x", "has no parts"),
    ],
)
def test_unknown_recipe_keys_are_named(recipe, capsys, key, says):
    line = refused(capsys, "run", recipe, "/tmp/never", f"--{key}", "1")
    assert key.split(".")[-1] in line and says in line


def test_wrong_recipe_value(recipe, capsys):
    assert "'abc'" in refused(capsys, "run", recipe, "/tmp/never", "--minutes=abc").replace(
        '"', "'"
    ).replace("value: abc", "value: 'abc'")


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_run_ends_with_the_report_and_repeats_for_free(recipe, tmp_path, capsys):
    out = tmp_path / "out"
    numbers = as_json(capsys, "run", recipe, out)
    stages = [row["stage"] for row in numbers["ledger"]]
    assert stages == ["closed form", "1 align", "2 distil", "total"]
    assert numbers["eval"]["baselines"] and numbers["ledger"][-1]["tokens"] == 128 + 768
    for row in (numbers["eval"], *numbers["eval"]["baselines"].values()):
        assert (
            row["tasks"]["copa"]["n"] == 2
            and row["recall"]["passkey"]["250"]["n"] == 2
            and row["perplexity"] > 1
        )
    page = (out / "report.html").read_text()
    assert "copa" in page and "passkey 250" in page
    names = {file.name for file in out.iterdir()}
    assert {
        "report.html",
        "report.json",
        "metrics.jsonl",
        "lineage.json",
        "config.json",
        "recipe.yaml",
    } <= names
    assert WORK not in names
    again = as_json(capsys, "run", recipe, out)
    assert again["eval"] == numbers["eval"]
    code, shown, _ = run_main(capsys, "run", recipe, out)
    assert code == 0 and "closed form" in shown and "Report: " in shown
    assert "'seed: 0' there, 'seed: 5' here" in refused(capsys, "run", recipe, out, "--seed", 5)


STEPS = 100  # of the interrupted runs


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
@pytest.mark.parametrize(("blow", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_interrupted_runs_go_on(recipe, tmp_path, capsys, blow, code):
    """Enough steps that a fast machine is not through before the signal comes."""
    out = tmp_path / "out"
    words = ("run", recipe, out, "--stages.1.tokens", 64 * STEPS)
    process = start(*words)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        metrics = out / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count("\n") > 5:
            break
        time.sleep(0.05)
    os.kill(process.pid, blow)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert not (out / "config.json").exists(), "nothing that looks finished"
    if blow == signal.SIGINT:
        assert (
            "run the same command again to resume" in err.splitlines()[-1]
            and "Traceback" not in err
        )
    spent = json.loads((out / "time.json").read_text())["seconds"]
    numbers = as_json(capsys, "run", recipe, out, "--stages.1.tokens", 64 * STEPS)
    assert numbers["time"]["seconds"] > spent
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == 1] == list(range(1, STEPS + 1))


def test_help_lists_every_mixer_and_method():
    from regraft.linearize.method import list_methods
    from regraft.mixers.registry import mixers

    words = " ".join(cli_parser.VERBS["linearize"].function.__doc__.split())
    by_argument = {name: words.partition(f" {name}: ")[2] for name in ("mixer", "method")}
    for name, known in {"mixer": set(mixers()) - {"gated"}, "method": set(list_methods())}.items():
        listed = set(
            re.findall(r"\w+", by_argument[name].partition(f"{sorted(known)[0]}")[2][:150])
        )
        assert known - {sorted(known)[0]} <= listed, name


@pytest.mark.parametrize("verb", list(cli_parser.VERBS))
def test_help_has_sections_examples_and_no_file_of_the_repository(verb, capsys):
    one = cli_parser.VERBS[verb]
    with pytest.raises(SystemExit):
        cli_parser.parse([verb, "--help"])
    text = capsys.readouterr().out
    assert all(f"\n{title}:\n" in text for title in one.sections)
    assert all(example in text for example in one.examples) and len(one.examples) == 2
    assert not re.search(r"README|docs/|\.md\b", text)
    for example in one.examples:
        cli_parser.parse(shlex.split(example)[1:])
    listed = [name for names in one.sections.values() for name in names]
    assert not one.sections or set(one.optional) - {"overrides"} == set(listed)
    assert len(listed) == len(set(listed))


def test_names_of_flags_are_names_of_parameters():
    """`--kv-heads` is kv_heads: the parser is made from the signature, so a flag cannot differ from
    its parameter.
    """
    for verb in cli_parser.VERBS.values():
        known = {action.dest for action in cli_parser.build_verb_parser(verb)._actions}
        wanted = set(verb.positional) | set(verb.optional) - {"overrides"}
        assert wanted <= known
