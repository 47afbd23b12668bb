"""Saves that are killed with SIGKILL at random moments, again and again; what is left is checked
after every kill.

Run: python tests/killing.py FOLDER [--times 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import torch

from helpers.tiny import tiny
from regraft.core.checkpoint import Checkpoint
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen

PAUSE = 0.001
SHARD = 60_000


def slow_growth(source: Path, log: Path | None = None, pause: float = PAUSE) -> Checkpoint:
    """A growth whose tensors take a while and say in a log that they were computed."""

    def slow(name, read):
        def value() -> torch.Tensor:
            time.sleep(pause)
            if log:
                with open(log, "a") as stream:
                    print(name, file=stream)
            return read()

        return value

    target = Deepen(5)(Widen(hidden=72, ffn=104, how="tile")(Checkpoint.open(source)))
    tensors = {
        key: replace(lazy, read=slow(target.names[key], lazy.read))
        for key, lazy in target.tensors.items()
    }
    return replace(target, tensors=tensors)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def start_save(source: Path, out: Path, overwrite: bool, log: Path) -> int:
    """A process that saves a growth; its id."""
    process = os.fork()
    if process:
        return process
    try:
        slow_growth(source, log).save(out, overwrite=overwrite, shard_bytes=SHARD)
    finally:
        os._exit(0)


def kill_saves(folder: Path, times: int, seed: int) -> dict[str, int]:
    """Kill saves; AssertionError when a kill leaves anything but no output, the output before, or
    the whole output.
    """
    chance = random.Random(seed)
    source, whole, before, log = (
        folder / "source",
        folder / "whole",
        folder / "before",
        folder / "log",
    )
    tiny("llama")[1].save_pretrained(source)
    Checkpoint.open(source).save(before)
    begin = time.monotonic()
    slow_growth(source).save(whole, shard_bytes=SHARD)
    takes = time.monotonic() - begin
    expected, older, tensors = contents(whole), contents(before), len(slow_growth(source).tensors)
    counts = {"kills": 0, "absent": 0, "partial": 0, "older": 0, "complete": 0, "resumed": 0}
    while counts["kills"] < times:
        out, overwrite = folder / f"out{counts['kills']}", chance.random() < 0.3
        if overwrite:
            shutil.copytree(before, out)
        for _ in range(chance.randint(1, 3)):
            log.write_text("")
            process = start_save(source, out, overwrite, log)
            time.sleep(chance.uniform(0, 1.1 * takes))
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            counts["kills"] += 1
            counts["partial"] += (folder / f".{out.name}.partial").exists()
            if not out.exists():
                assert not overwrite, "the output that was to be replaced is gone"
                counts["absent"] += 1
            else:
                found = contents(out)
                assert found == expected or (overwrite and found == older), (
                    f"{out} is neither old nor new"
                )
                counts["complete" if found == expected else "older"] += 1
                if found == expected:
                    break
        if not out.exists() or contents(out) != expected:
            log.write_text("")
            slow_growth(source, log).save(out, overwrite=overwrite, shard_bytes=SHARD)
            counts["resumed"] += len(log.read_text().split()) < tensors
            assert contents(out) == expected, f"{out} is not what an uninterrupted run writes"
        if (
            folder / f".{out.name}.partial"
        ).exists():  # killed after the exchange: what was replaced is left over
            assert overwrite
            slow_growth(source, pause=0).save(out, overwrite=True, shard_bytes=SHARD)
        assert not (folder / f".{out.name}.partial").exists()
        shutil.rmtree(out)
    return counts


def main() -> None:
    """Kill and print the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(kill_saves(options.folder, options.times, options.seed)))


if __name__ == "__main__":
    main()
