"""Kills a training of several processes at random moments, again and again, and compares what comes
of it.

python benchmarks/kill_training.py FOLDER [--kills 30] [--terms 10] [--processes 2] [--seed 0]

A tiny random model is linearized and distilled under torchrun. The run is killed with SIGKILL, one
process of it or all, and stopped with SIGTERM, each time at a random moment from its start on, and
started again with the same command until it is done; when it ends before all signals were sent,
another one begins. Prints how often what happened, and whether each run's weights and losses equal
those of the run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regraft.core.checkpoint import Checkpoint
from regraft.mixers.remix import Remix

STEPS, BATCH, LENGTH = 200, 4, 64


def prepare(folder: Path) -> None:
    """Source, linearized model and text."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
    }
    source = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=3, **sizes))
    source.save_pretrained(folder / "source")
    letters = {chr(code): code for code in range(256)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=chr(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chr(1)).save_pretrained(
        folder / "source"
    )
    Remix(keep="0", window=16, sinks=2)(Checkpoint.open(folder / "source")).save(folder / "linear")
    words = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=200_000)
    (folder / "text.txt").write_text("".join(words))


def command(folder: Path, out: Path, processes: int) -> list[str]:
    """The training, under torchrun."""
    flags = {
        "stage": "distil", "teacher": folder / "source", "data": folder / "text.txt", "tokens": STEPS * BATCH * LENGTH,
        "batch": BATCH, "length": LENGTH, "precision": "float32", "save-seconds": 0.2,
    }  # fmt: skip
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    return [*launcher, "-m", "regraft", "train", str(folder / "linear"), str(out), *words]


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )


def workers(out: Path, launcher: int) -> list[int]:
    """Processes of the run in `out` besides the one that launched them."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if (
                str(out).encode() in place.read_bytes().split(b"\0")
                and int(place.parent.name) != launcher
            ):
                found.append(int(place.parent.name))
    return found


def interrupt(run: subprocess.Popen[bytes], out: Path, number: signal.Signals, every: bool) -> None:
    """Send the signal: to one worker or to all of them, and, when it is for all, to the launcher."""
    mine = workers(out, run.pid)
    for process in (mine if every else mine[:1]) if number == signal.SIGKILL else []:
        with suppress(ProcessLookupError):
            os.kill(process, number)
    if every or number == signal.SIGTERM:
        run.send_signal(number)
    run.wait()
    while left := workers(out, run.pid):
        for process in left if number == signal.SIGKILL else []:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--terms", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.folder.resolve()
    prepare(folder)
    begin = time.monotonic()
    assert start(command(folder, folder / "whole", given.processes)).wait() == 0
    span = whole = time.monotonic() - begin
    draw = random.Random(given.seed)
    plan = [signal.SIGKILL] * given.kills + [signal.SIGTERM] * given.terms
    draw.shuffle(plan)
    counts, runs, tries = {"one killed": 0, "all killed": 0, "SIGTERM": 0}, 0, 0
    while plan:
        out, runs, done = folder / f"run-{runs}", runs + 1, False
        while not done:
            tries += 1
            run = start(command(folder, out, given.processes))
            if plan:
                since = time.monotonic()
                with suppress(subprocess.TimeoutExpired):
                    run.wait(draw.uniform(0.0, span))
                    span = min(
                        span, time.monotonic() - since
                    )  # it ended by itself: the first run was slower
                if run.poll() is None:
                    number, every = plan.pop(), draw.random() < 0.5
                    interrupt(run, out, number, every)
                    kind = (
                        "SIGTERM"
                        if number == signal.SIGTERM
                        else "all killed"
                        if every
                        else "one killed"
                    )
                    counts[kind] += 1
            done = run.wait() == 0 or (out / "config.json").exists()  # killed when all was written
    same = [
        (folder / f"run-{number}" / "model.safetensors").read_bytes()
        == (folder / "whole/model.safetensors").read_bytes()
        and losses(folder / f"run-{number}") == losses(folder / "whole")
        for number in range(runs)
    ]
    told = ", ".join(f"{count} times {kind}" for kind, count in counts.items())
    print(
        f"{given.processes} processes, {STEPS} steps, {whole:.0f} s undisturbed; {told}; {tries}"
        " starts"
    )
    print(
        f"{sum(same)} of {runs} runs that were disturbed have the undisturbed one's weights and"
        " losses bit for bit"
    )
    sys.exit(0 if all(same) else 1)


if __name__ == "__main__":
    main()
