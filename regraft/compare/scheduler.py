"""Runs a comparison: data first, then sources, then arms, each run in a process of its own."""

from __future__ import annotations

import contextlib
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
from ..io import output
from ..io.files import read_own_json, write_json
from ..io.identity import keep_inputs
from ..progress import Ticker, print_line
from ..recipes import schema
from ..train.output import open_run
from . import data, report, savings, start
from .numbers import ComparisonNumbers, FailedRun
from .recipe import Comparison, dump

RECIPE = "recipe.json"
INPUTS = "inputs.json"
FREE_KEYS = ("arms", "seeds", "others")  # of a recipe: may change between calls on one folder
# What a comparison writes into its folder.
NAMES = (
    RECIPE,
    INPUTS,
    "data",
    "tokenizer",
    "blank",
    "sources",
    "arms",
    "logs",
    "compare.json",
    "table.md",
    "compare.html",
)
PATH_KEYS = ("source", "data", "heldout")  # as paths they may change: their content is compared
POLL_SECONDS = 0.1
SECONDS_TO_STOP = 60.0  # for all that a run needs to end in order
OWN_ERROR_LINE = re.compile("^regraft: ")
# torchrun ends with ChildFailedError whatever went wrong: that line explains nothing.
LIBRARY_ERROR_LINE = re.compile(r"(?<!ChildFailed)(Error|Exception|Interrupt)\b|\bSignal \d+")


@dataclass(frozen=True)
class TrainingJob:
    """One training run.

    Attributes:
        kind: `source` or `arm`.
        name: of the source or the arm.
        seed: of the run.
    """

    kind: str
    name: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Where it keeps its files."""
        return out / ("sources" if self.kind == "source" else "arms") / self.name / str(self.seed)

    def log_path(self, out: Path) -> Path:
        """Its standard output and error."""
        return out / "logs" / f"{self.kind}-{self.name}-{self.seed}.txt"

    def progress_path(self, out: Path) -> Path:
        """Where it writes which share of its work is done."""
        return self.log_path(out).with_suffix(".share")

    def read_error(self, out: Path) -> str:
        """Why it ended: the last line of regraft's own, else the last that names an error."""
        log = self.log_path(out).read_text(encoding="utf-8", errors="replace")
        lines = [line for line in log.splitlines() if line]

        # Not simply the last line: a launcher may have added its own behind the reason.
        for pattern in (OWN_ERROR_LINE, LIBRARY_ERROR_LINE):
            if matching := [line for line in lines if pattern.search(line)]:
                return OWN_ERROR_LINE.sub("", matching[-1]).strip()
        return lines[-1] if lines else "it ended without a message"

    def read_progress(self, out: Path) -> float:
        """The share of its work that is done; 0 before it has written any."""
        try:
            return float(self.progress_path(out).read_text())
        except (OSError, ValueError):
            return 0.0


def run(recipe: Comparison, out: str | Path, jobs: int = 1, launch: str = "") -> ComparisonNumbers:
    """Carry out a comparison in directory `out`, going on where an earlier call stopped.

    A run that ends with an error does not stop the others; `failed` in the numbers names it.
    RegraftError when `out` holds something else, or when the recipe cannot be carried out.

    Args:
        recipe: the comparison.
        out: directory to write.
        jobs: training runs at a time.
        launch: command that starts the processes of a run, such as
            `torchrun --standalone --nproc-per-node 8`; without it each run is one process.

    Returns:
        The numbers of compare.json.
    """
    out = Path(out)
    if jobs < 1:
        raise RegraftError(f"--jobs {jobs} starts nothing: give 1 or more")
    if launch and shutil.which(shlex.split(launch)[0]) is None:
        raise RegraftError(
            f"--launch '{launch}' begins with no program that is here: give torchrun and its flags"
        )

    target = output.check_apart(out, comparison_inputs(recipe))
    # Arms, seeds and sources may come and go between calls: finished runs stay comparable. Anything
    # else that differs would mix two experiments in one table, as would sources or data that are
    # not the same any more.
    fixed = {key: value for key, value in dump(recipe).items() if key not in FREE_KEYS}
    fixed |= {key: "a path" for key in PATH_KEYS if isinstance(fixed[key], str)}
    with open_run(target, "comparison", lambda: fixed, NAMES):
        keep_inputs(target / INPUTS, data.identify_inputs(recipe), f"the comparison in '{out}'")
        write_json(target / RECIPE, dump(recipe))
        return carry_out(recipe, target, jobs, launch)


def comparison_inputs(recipe: Comparison) -> list[tuple[str, str | None]]:
    """What a comparison reads: (what it is, path)."""
    folders = [source for source in recipe.sources().values() if isinstance(source, str)]
    texts = [("data", recipe.data), ("held-out data", recipe.heldout)]
    return [*(("source", folder) for folder in folders), *texts]


def carry_out(recipe: Comparison, out: Path, jobs: int, launch: str) -> ComparisonNumbers:
    """Do all runs in a claimed folder and report them; see `run`."""
    with Ticker() as ticker:
        ticker.start("making data, tokenizer and configs")
        data.prepare_data(recipe, out)
        start.verify(recipe, out)

        errors = run_jobs(pretraining_jobs(recipe), recipe, out, jobs, launch, ticker)
        # An arm whose source failed has nothing to grow.
        missing = {(job.name, job.seed) for job in errors}
        wanted = [
            job for job in arm_jobs(recipe) if (source_name(recipe, job), job.seed) not in missing
        ]
        errors |= run_jobs(wanted, recipe, out, jobs, launch, ticker)

    failed: list[FailedRun] = [
        {"kind": job.kind, "name": job.name, "seed": job.seed, "error": line}
        for job, line in errors.items()
    ]
    numbers = savings.summarise(recipe, out, failed)
    report.write(numbers, out)
    return numbers


def pretraining_jobs(recipe: Comparison) -> list[TrainingJob]:
    """Runs that pretrain the sources given as configs."""
    names = [name for name, source in recipe.sources().items() if isinstance(source, dict)]
    return [TrainingJob("source", name, seed) for seed in recipe.seeds for name in names]


def arm_jobs(recipe: Comparison) -> list[TrainingJob]:
    """Runs of arms, all arms of a seed before the next seed."""
    return [TrainingJob("arm", arm.name, seed) for seed in recipe.seeds for arm in recipe.arms]


def source_name(recipe: Comparison, job: TrainingJob) -> str:
    """The source that an arm's run needs; empty for scratch."""
    arm = recipe.arm(job.name)
    return "" if arm.scratch else arm.source


def load_recipe(out: Path) -> Comparison:
    """The recipe of a comparison's folder."""
    file = out / RECIPE
    recipe: Comparison = schema.build(read_own_json(file, dict[str, Any]), str(file), Comparison)
    return recipe


def run_jobs(
    jobs: Sequence[TrainingJob],
    recipe: Comparison,
    out: Path,
    at_once: int,
    launch: str,
    ticker: Ticker,
) -> dict[TrainingJob, str]:
    """Run what is not done yet; the error lines of the runs that failed.

    Args:
        jobs: runs in order.
        recipe: the comparison.
        out: its folder.
        at_once: how many run at a time.
        launch: see `run`.
        ticker: shows the progress.
    """
    waiting = [job for job in jobs if not is_done(recipe, out, job)]
    running: dict[TrainingJob, subprocess.Popen[bytes]] = {}
    errors: dict[TrainingJob, str] = {}
    count = len(waiting)
    if waiting:
        done = len(jobs) - count
        ticker.start(f"training {len(jobs)} {waiting[0].kind}s, {done} of them done before")

    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job] = start_process(job, out, at_once, launch)

            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                if process.returncode or not is_done(recipe, out, job):
                    errors[job] = job.read_error(out)
                    print_line(f"{job.kind} {job.name}, seed {job.seed}: {errors[job]}")

            finished = count - len(waiting) - sum(1 - job.read_progress(out) for job in running)
            ticker.update(finished / count, ", ".join(f"{job.name} {job.seed}" for job in running))
            time.sleep(POLL_SECONDS)
    finally:
        # When this process is interrupted, no run is left behind.
        for process in running.values():
            process.terminate()
        # Those that train keep a checkpoint first, and hold their folders' locks until then.
        for process in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
    return errors


def start_process(
    job: TrainingJob, out: Path, at_once: int, launch: str
) -> subprocess.Popen[bytes]:
    """Start the process of a run, or the launcher of its processes; see `run_jobs`."""
    job.log_path(out).parent.mkdir(exist_ok=True)
    job.progress_path(out).unlink(missing_ok=True)

    # A launcher sets its processes' threads itself; single processes share the cores evenly.
    environment = dict(os.environ)
    if not launch:
        threads = str(max(1, usable_cores() // at_once))
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}

    launcher = shlex.split(launch) or [sys.executable]
    words = [*launcher, "-m", "regraft.compare", str(out), job.kind, job.name, str(job.seed)]
    with job.log_path(out).open("wb") as log:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )


def usable_cores() -> int:
    """Cores that this process may use; 1 where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def is_done(recipe: Comparison, out: Path, job: TrainingJob) -> bool:
    """Whether a run is finished; RegraftError when it was another one under the same name."""
    facts = savings.read_done(job.folder(out), job.kind)
    if facts is None:
        return False

    if job.kind == "arm":
        wanted, finished = dataclasses.asdict(recipe.arm(job.name)), dict(facts["arm"])
    else:
        source = recipe.sources()[job.name]
        assert isinstance(source, dict)  # a source that is a directory has no run
        wanted, finished = source, facts["config"]
    if wanted != finished:
        raise RegraftError(
            f"{job.folder(out)} holds another {job.kind} '{job.name}' ({finished}): "
            "rename yours or delete that folder"
        )
    return True
