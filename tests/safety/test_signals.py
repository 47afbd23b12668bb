"""Signals, lost readers and unforeseen errors: what is kept is kept, what is temporary goes, and the
exit code and one line say what happened.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.cli import as_json, run_main
from helpers.tiny import save_model, write_text
from safetensors import SafetensorError

from regraft.cli import main as cli
from regraft.data import corpus
from regraft.errors import RegraftError
from regraft.evaluation import evaluate
from regraft.io import failures, signals
from regraft.io.files import replace_file
from regraft.io.safetensors import save_tensors
from regraft.train import loop
from regraft.train.layerwise import align
from regraft.train.output import RUN

NUMBERS = [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM]
STEPS = ["--tokens", 512, "--length", 64]  # 8 steps


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "model", layers=2)
    write_text(folder / "text.txt")
    words = ["linearize", folder / "model", folder / "linear", "--keep", "none", "--window", 8]
    assert cli.main([str(word) for word in words]) == 0
    return folder


def send_after(act: Callable[..., object], calls: int, send: Callable[[], object]) -> Callable:
    """The function, which also sends at one of its calls."""
    count = 0

    def call(*given: object, **named: object) -> object:
        nonlocal count
        count += 1
        if count == calls:
            send()
        return act(*given, **named)

    return call


def exit_code(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code and standard error, also of a run that ends by SystemExit."""
    try:
        code, _, err = run_main(capsys, *words)
    except SystemExit as stop:
        assert isinstance(stop.code, int)
        code, err = stop.code, capsys.readouterr().err
    return code, err.strip().splitlines()[-1]


def losses(out: Path) -> list[str]:
    rows = (out / "metrics.jsonl").read_text().splitlines()
    return [row.split('"loss"')[1].split(",")[0] for row in rows]


def test_training_keeps_a_checkpoint_whatever_stops_it(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--data", files / "text.txt", "--stage", "next", *STEPS]
    as_json(capsys, "train", files / "model", tmp_path / "whole", *words)
    for number in NUMBERS:
        out = tmp_path / number.name
        stopped = ("train", files / "model", out, *words, "--save-seconds", 1000)
        step = send_after(loop.train_step, 3, lambda n=number: signal.raise_signal(n))
        with monkeypatch.context() as patch:
            patch.setattr(loop, "train_step", step)
            code, line = exit_code(capsys, *stopped)
        kept = out / RUN / "stage-0-step-3"
        assert code == 128 + number
        assert f"stopped by {number.name}; '{kept}' is kept; run the same" in line
        assert kept.is_dir() and not (out / "config.json").exists()

    as_json(capsys, *stopped)
    assert losses(out) == losses(tmp_path / "whole")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("lost", "code"), [(errno.EPIPE, 141), (errno.EIO, 129)])
def test_a_lost_reader_is_a_signal_while_training(
    lost: int,
    code: int,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose() -> None:
        sys.stderr.terminal.lost = OSError(lost, "lost")  # type: ignore[attr-defined]

    monkeypatch.setattr(loop, "train_step", send_after(loop.train_step, 2, lose))
    with pytest.raises(SystemExit) as stop:
        run_main(
            capsys, "train", files / "model", tmp_path / "out", "--data", files / "text.txt",
            "--stage", "next", *STEPS,
        )  # fmt: skip
    assert stop.value.code == code
    assert (tmp_path / "out" / RUN / "stage-0-step-2").is_dir()


def test_layer_by_layer_whole_layers_are_kept(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [files / "linear", tmp_path / "out", "--data", files / "text.txt", "--stream"]
    words += ["--stage", "align", "--teacher", files / "model", *STEPS]
    for steps, kept in ((3, "no checkpoint yet"), (11, "layers [0] in ")):
        send = send_after(align.set_learning_rates, steps, lambda: os.kill(os.getpid(), 15))
        with monkeypatch.context() as patch:
            patch.setattr(align, "set_learning_rates", send)
            code, line = exit_code(capsys, "train", *words)
        assert code == 143 and kept in line, line
    as_json(capsys, "train", *words)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_outside_training_leaves_no_temporary_file_and_no_promise(
    number: signal.Signals,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def send(*given: object) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(corpus.TokenCache, "fill", send)
    words = ["--keep", "restore:1", "--data", files / "text.txt"]
    code, line = exit_code(capsys, "linearize", files / "model", tmp_path / "out", *words)
    assert code == 128 + number and not list(tmp_path.iterdir())
    assert line == f"regraft: stopped by {number.name}; nothing was finished; run the command again"

    # The same while a run reads its text: there is no checkpoint that could be promised.
    words = ["train", files / "model", tmp_path / "out", "--data", files / "text.txt", *STEPS]
    code, line = exit_code(capsys, *words, "--stage", "next")
    assert code == 128 + number and "resume" not in line and "goes on" not in line
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.StopAtOnce() as handler:
            signal.raise_signal(signal.SIGHUP)  # as under nohup
            assert handler.number is None
            with pytest.raises(signals.Terminated) as stop:
                signal.raise_signal(signal.SIGTERM)
            assert stop.value.code == 143
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_a_process_with_a_lost_reader_ends_with_a_checkpoint(files: Path, tmp_path: Path) -> None:
    words = ["train", files / "model", tmp_path / "out", "--data", files / "text.txt"]
    words += ["--stage", "next", "--tokens", 10**7, "--length", 64, "--save-seconds", 1000]
    command = [sys.executable, "-m", "regraft", *map(str, words)]
    read, write = os.pipe()
    process = subprocess.Popen(command, cwd=ROOT, stdout=write, stderr=write)
    os.close(write)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.05)
    os.close(read)
    assert process.wait(120) == 141
    assert list((tmp_path / "out" / RUN).glob("stage-0-step-*"))


FAILURES = [
    (MemoryError(), 2, "not enough memory"),
    (MemoryError("unable to mmap 400000000 bytes from 'x'"), 2, "400.0 MB more are needed"),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5000000 "),
        2,
        "not enough memory",
    ),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "2 GiB"),
    (RuntimeError("std::bad_alloc"), 2, "not enough memory"),
    (RuntimeError("can't start new thread"), 2, "not enough memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "No space left on device (/x)"),
    (OSError("Can't load tokenizer for\n'x'"), 2, "Can't load tokenizer for 'x'"),
    (SafetensorError("Error while serializing: No space left on device"), 2, "free some space"),
    (SafetensorError("Error while deserializing header"), 2, "that file again"),
    (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates not allowed"), 2, "a\\udcff"),
    (RegraftError("a [/b] is \x1b wrong: c"), 2, "a [/b] is \\x1b wrong: c"),
    (ValueError("something \x1b[31m odd"), 70, "this is a bug in regraft"),
    (KeyError("x"), 70, "KeyError: 'x' at test_signals.py:"),
    (AssertionError(), 70, "this is a bug in regraft"),
]


@pytest.mark.parametrize(("error", "code", "says"), FAILURES, ids=lambda value: str(value)[:30])
def test_any_exception_is_one_line(
    error: Exception,
    code: int,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cli, "run_verb", fail)
    found, out, err = run_main(capsys, "eval", "x")
    assert found == code and out == "" and says in err and "\x1b" not in err
    assert len(err.splitlines()) == 1 and err.startswith("regraft: ")

    written = list(tmp_path.iterdir())
    assert len(written) == (code == 70)
    for file in written:
        assert str(file) in err and stat.S_IMODE(file.stat().st_mode) == 0o600
        text = file.read_text()
        assert "Traceback" in text and "command: " in text and "regraft 0." in text


def test_a_bug_without_a_folder_for_its_traceback_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **named: object) -> None:
        raise IndexError(7)

    monkeypatch.setattr(failures.tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(evaluate, "evaluate", fail)
    save_model(tmp_path / "model", layers=1)
    code, _, err = run_main(capsys, "eval", tmp_path / "model")
    assert code == 70 and len(err.splitlines()) == 1 and "no file for its traceback" in err


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        with replace_file(tmp_path / "b") as part:
            part.write_text("x")
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_a_disk_that_fills_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("regraft.io.safetensors.save_file", fail)
    with pytest.raises(RegraftError, match=r"cannot write .*a.safetensors.*free some space"):
        save_tensors(tmp_path / "a.safetensors", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_too_little_memory_is_one_line(tmp_path: Path) -> None:
    """A model of 400 MB (a sparse file) in an address space that has 200 MB left for it."""
    save_model(tmp_path / "model", layers=1)
    program = (
        "import sys, resource, torch, regraft.modeling.generate, regraft.cli.main as cli\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)\n"
        "from regraft.evaluation import evaluate\n"
        "evaluate.evaluate = lambda *given: torch.empty(10**8)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "eval", str(tmp_path / "model")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 2, done.stderr
    assert "400.0 MB more are needed at once" in done.stderr and "MB were left" in done.stderr
    assert len(done.stderr.splitlines()) == 1
