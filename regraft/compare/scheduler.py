"""A comparison carried out: what is shared first, then sources, then arms, each run in a process of its own."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io.files import read_json_if_exists, write_json
from ..progress import Ticker
from ..recipes import schema
from . import arm as arms
from . import data, report, savings
from .recipe import Comparison, dump

RECIPE = "recipe.json"
POLL = 0.1
OWN_ERROR_LINE = re.compile("^regraft: ")
LIBRARY_ERROR_LINE = re.compile(r"(?<!ChildFailed)(Error|Exception|Interrupt)\b|\bSignal \d+")


@dataclass(frozen=True)
class TrainingJob:
    """One training run: kind `source` or `arm`, its name and seed."""

    kind: str
    name: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it keeps its files."""
        return out / ("sources" if self.kind == "source" else "arms") / self.name / str(self.seed)

    def log_path(self, out: Path) -> Path:
        """Its standard error."""
        return out / "logs" / f"{self.kind}-{self.name}-{self.seed}.txt"

    def read_error(self, out: Path) -> str:
        """What its standard error says of its end: our own line, else the last that names an error or a signal."""
        lines = [
            line
            for line in self.log_path(out)
            .read_text(encoding="utf-8", errors="replace")
            .splitlines()
            if line
        ]
        for telling in (
            OWN_ERROR_LINE,
            LIBRARY_ERROR_LINE,
        ):  # a launcher may have said more behind it
            if found := [line for line in lines if telling.search(line)]:
                return OWN_ERROR_LINE.sub("", found[-1]).strip()
        return lines[-1] if lines else "it ended without a word"

    def read_progress(self, out: Path) -> float:
        """How far it says it is."""
        try:
            return float(self.log_path(out).with_suffix(".share").read_text())
        except (OSError, ValueError):
            return 0.0


def run(recipe: Comparison, out: str | Path, jobs: int = 1, launch: str = "") -> dict[str, Any]:
    """Carry out a comparison in directory `out`, going on where an earlier call stopped; the numbers of compare.json.

    `launch`: words that start the processes of a run, such as `torchrun --standalone --nproc-per-node 8`. In the
    numbers `failed` names runs that ended with an error, with its line. RegraftError when `out` holds something else,
    or when the recipe cannot be carried out.
    """
    out = Path(out)
    if jobs < 1:
        raise RegraftError(f"--jobs {jobs} starts nothing: give 1 or more")
    if launch and shutil.which(shlex.split(launch)[0]) is None:
        raise RegraftError(
            f"--launch '{launch}' begins with no program that is here: give torchrun and its flags"
        )
    claim(recipe, out)
    with Ticker() as ticker:
        ticker.start("making data, tokenizer and configs")
        data.prepare_data(recipe, out)
        arms.verify(recipe, out)
        failed = run_jobs(pretraining_jobs(recipe), recipe, out, jobs, launch, ticker)
        lost = {(task.name, task.seed) for task in failed}
        wanted = [
            task
            for task in arm_jobs(recipe)
            if not lost or (recipe_source(recipe, task), task.seed) not in lost
        ]
        failed |= run_jobs(wanted, recipe, out, jobs, launch, ticker)
    numbers = savings.summarise(recipe, out)
    numbers["failed"] = [
        {**dataclasses.asdict(task), "error": line} for task, line in failed.items()
    ]
    report.write(numbers, out)
    return numbers


def pretraining_jobs(recipe: Comparison) -> list[TrainingJob]:
    """Pretraining runs."""
    found = [name for name, source in recipe.sources().items() if isinstance(source, dict)]
    return [TrainingJob("source", name, seed) for seed in recipe.seeds for name in found]


def arm_jobs(recipe: Comparison) -> list[TrainingJob]:
    """Runs of arms, all arms of a seed before the next seed."""
    return [TrainingJob("arm", arm.name, seed) for seed in recipe.seeds for arm in recipe.arms]


def recipe_source(recipe: Comparison, task: TrainingJob) -> str:
    """The source that an arm's run needs; empty for scratch."""
    arm = recipe.arm(task.name)
    return "" if arm.scratch else arm.source


def claim(recipe: Comparison, out: Path) -> None:
    """Keep the recipe in `out`; arms and seeds may come and go, RegraftError for any other difference."""
    file = out / RECIPE
    if not file.exists() and out.is_dir() and any(out.iterdir()):
        raise RegraftError(
            f"{out} exists and holds no comparison: choose another folder or delete it"
        )
    if file.exists():
        theirs, mine = read_json_if_exists(file), dump(recipe)
        for key in (
            key
            for key in mine
            if key not in ("arms", "seeds", "others") and mine[key] != theirs.get(key)
        ):
            raise RegraftError(
                f"{out} holds a comparison with another {key} ({theirs.get(key)} there, {mine[key]} here): choose "
                "another folder or delete it"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, dump(recipe))


def load_recipe(out: Path) -> Comparison:
    """The recipe of a comparison's folder."""
    made: Comparison = schema.build(
        read_json_if_exists(out / RECIPE), str(out / RECIPE), Comparison
    )
    return made


def run_jobs(
    tasks: Sequence[TrainingJob],
    recipe: Comparison,
    out: Path,
    jobs: int,
    launch: str,
    ticker: Ticker,
) -> dict[TrainingJob, str]:
    """Run what is not done yet, `jobs` at a time; the error lines of those that failed."""
    waiting = [task for task in tasks if not is_done(recipe, out, task)]
    count, running = len(waiting), dict[TrainingJob, subprocess.Popen[bytes]]()
    failed: dict[TrainingJob, str] = {}
    if waiting:
        ticker.start(
            f"training {len(tasks)} {waiting[0].kind}s, {len(tasks) - count} of them done before"
        )
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                running[task] = start_process(task, out, jobs, launch)
            for task, process in [(t, p) for t, p in running.items() if p.poll() is not None]:
                del running[task]
                if process.returncode or not is_done(recipe, out, task):
                    failed[task] = task.read_error(out)
                    print(
                        f"regraft: {task.kind} {task.name}, seed {task.seed}: {failed[task]}",
                        file=sys.stderr,
                    )
            finished = count - len(waiting) - sum(1 - task.read_progress(out) for task in running)
            ticker.update(
                finished / count, ", ".join(f"{task.name} {task.seed}" for task in running)
            )
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.terminate()
    return failed


def start_process(task: TrainingJob, out: Path, jobs: int, launch: str) -> subprocess.Popen[bytes]:
    """The process of a run, or the launcher of its processes; cores are shared evenly."""
    threads = (
        max(1, len(os.sched_getaffinity(0)) // jobs) if hasattr(os, "sched_getaffinity") else 1
    )
    task.log_path(out).parent.mkdir(exist_ok=True)
    task.log_path(out).with_suffix(".share").unlink(missing_ok=True)
    start = shlex.split(launch) or [sys.executable]
    words = [*start, "-m", "regraft.compare", str(out), task.kind, task.name, str(task.seed)]
    with task.log_path(out).open("wb") as log:
        env = os.environ | (
            {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if not launch else {}
        )
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)


def is_done(recipe: Comparison, out: Path, task: TrainingJob) -> bool:
    """Whether a run is finished; RegraftError when it was another one under the same name."""
    facts = read_json_if_exists(task.folder(out) / arms.DONE)
    if facts is None:
        return False
    mine = (
        dataclasses.asdict(recipe.arm(task.name))
        if task.kind == "arm"
        else recipe.sources()[task.name]
    )
    theirs = facts["arm"] if task.kind == "arm" else facts["config"]
    if mine != theirs:
        raise RegraftError(
            f"{task.folder(out)} holds another {task.kind} '{task.name}' ({theirs}): rename yours or delete that folder"
        )
    return True
