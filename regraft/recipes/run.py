"""Run a recipe in phases: linearize, measure, train, measure again, report. Each leaves a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..data.corpus import TextMixture
from ..data.files import find_files
from ..data.rows import Packed
from ..evaluation import baselines, tasks
from ..evaluation.bench import bench
from ..evaluation.evaluate import assemble_rows, build_suite, evaluation_windows
from ..evaluation.perplexity import Candidate, measure
from ..evaluation.rows import BenchRow, QualityRow
from ..evaluation.suite import Suite, add_share_of_teacher
from ..io import output
from ..io.files import read_json_if_exists, remove_parts, write_json
from ..io.identity import identify_files, identify_model
from ..io.request import Identity
from ..linearize.pipeline import choose_layers, train_linearized
from ..mixers.registry import mixer_class
from ..modeling import generate
from ..modeling.reopen import save_model
from ..plan.plan import Plan
from ..report import html
from ..train.monitor import DEFAULT_MONITORING, MonitorConfig
from ..train.output import RUN_NAMES, TEXT, WORK, finish_run, open_run
from ..train.session import begin_texts, training_rows
from . import schema, time_shares
from .journal import Journal
from .schema import Recipe
from .time_shares import TimeShares

# What a run writes into its folder, beside what its training does.
NAMES = (
    "recipe.yaml",
    "time.json",
    "plan.json",
    "baselines.json",
    "bench.json",
    "ledger.json",
    "eval.json",
    "samples.json",
    "report.json",
    "report.html",
)
KIND = "run"  # of the folder, in its marker
# Over each window after training: the teacher, the model with its linear branch and without.
EVALUATION_PASSES = 3


class Sample(TypedDict):
    """How teacher and student continue a prompt; `samples.json` has one for each prompt."""

    prompt: str
    teacher: str
    student: str


def run_recipe(
    recipe: Recipe, out: str, watching: MonitorConfig = DEFAULT_MONITORING
) -> dict[str, Any]:
    """Run a recipe, continuing where an earlier call stopped.

    `out` gets the trained model, `report.html`, `report.json`, `metrics.jsonl`, `lineage.json` and
    the phases' JSON files.

    Args:
        recipe: the experiment.
        out: output folder.
        watching: trackers, and when a loss counts as too high.

    Returns:
        The report's numbers; in the other processes of a torchrun, nothing.

    RegraftError when `out` holds another run or anything else.
    """
    target = output.check_apart(out, recipe_inputs(recipe))
    if distributed.on_rank0(lambda: is_reported(recipe, target)):
        return html.collect(target) if distributed.is_rank0() else {}

    def request() -> dict[str, Any]:
        return {"recipe": dump_without_paths(recipe), "inputs": identify_inputs(recipe)}

    with open_run(target, KIND, request, (*RUN_NAMES, *NAMES)) as marker:
        if not distributed.is_rank0():
            return {} if marker.complete else follow(recipe, target, watching)
        if not marker.complete:
            lead(recipe, target, watching)
        return html.collect(target)


def is_reported(recipe: Recipe, out: Path) -> bool:
    """Whether a run of this very recipe is complete, so that its inputs are needed no more.

    What a kill at its very end has left is removed.
    """
    file = out / "recipe.yaml"
    marker = output.read_marker(out) if file.is_file() else None
    if marker is None or not marker.complete or marker.kind != KIND:
        return False
    if file.read_text(encoding="utf-8") != schema.dump(recipe):
        return False
    output.remove_work(out)
    remove_parts(out)
    return True


def dump_without_paths(recipe: Recipe) -> str:
    """A recipe without the paths of its inputs, which may be moved: their content is compared."""
    measure = replace(recipe.measure, task_data=None)
    train = [replace(text, path="") for text in recipe.train]
    return schema.dump(replace(recipe, source="", train=train, heldout=None, measure=measure))


def recipe_inputs(recipe: Recipe) -> list[tuple[str, str | None]]:
    """What a recipe reads: (what it is, path)."""
    texts = [("train", piece) for text in recipe.train for piece in text.path.split(",")]
    own = [("source", recipe.source), ("task data", recipe.measure.task_data)]
    return [*own, ("held-out text", recipe.heldout), *texts]


def lead(recipe: Recipe, out: Path, watching: MonitorConfig) -> None:
    """Run the phases that are not done, write the report, and say that the run is complete.

    The arguments are those of `run_recipe`.
    """
    experiment = Experiment(recipe, out, watching)
    with experiment.journal.ticker:
        for name, phase in experiment.phases().items():
            if not experiment.journal.is_done(name):
                distributed.broadcast(name)  # to `follow`
                experiment.journal.ticker.start(name)
                phase()
                experiment.journal.finish(name)
    html.write(experiment.out)
    finish_run(out, None)
    distributed.broadcast("")  # the end


def identify_inputs(recipe: Recipe) -> dict[str, Identity]:
    """The identities of what a recipe names."""
    inputs = {"source": identify_model(recipe.source)}
    inputs["train"] = identify_files(
        file for text in recipe.train for file in find_files(text.path)
    )
    if recipe.heldout:
        inputs["heldout"] = identify_files(find_files(recipe.heldout))
    if folder := recipe.measure.task_data:
        names = [name for name in recipe.measure.tasks if name in tasks.TASKS]
        inputs["task data"] = identify_files(
            tasks.find_file(name, tasks.TASKS[name].files, Path(folder)) for name in names
        )
    return inputs


def follow(recipe: Recipe, out: Path, watching: MonitorConfig) -> dict[str, Any]:
    """What the other processes of a torchrun do: their part of the training, and wait.

    The arguments are those of `run_recipe`. Returns nothing.
    """
    while name := distributed.broadcast(""):  # the first process's value, whatever is given here
        if name == "train":
            Experiment(recipe, out, watching).train()
    return {}


class Experiment:
    """A recipe's phases, and what they share: journal, source, and the models in memory.

    Args:
        recipe: the experiment.
        out: output folder.
        watching: trackers, and when a loss counts as too high.
    """

    def __init__(self, recipe: Recipe, out: Path, watching: MonitorConfig = DEFAULT_MONITORING):
        self.recipe, self.out, self.watching = recipe, out, watching
        self.journal = Journal(out, schema.dump(recipe), recipe.minutes)
        self.shares = TimeShares(self.journal.ticker.budget, self.journal.notes)
        self.deadlines: dict[int, float] = {}  # of stages before the last, in monotonic seconds
        self.work = out / WORK
        self.linear = self.work / "linearized"

    def phases(self) -> dict[str, Callable[[], None]]:
        """The phases in order, by name.

        The student's speed does not depend on training. It is measured before, so that training
        knows how much time the rest needs.
        """
        return {
            "linearize": self.linearize,
            "baselines": self.measure_baselines,
            "bench": self.measure_speed,
            "train": self.train,
            "evaluate": self.evaluate,
            "samples": self.sample,
        }

    # Each of these is made when it is first needed: a resumed run loads only what its remaining
    # phases use.

    @cached_property
    def source(self) -> Checkpoint:
        """The model to linearize."""
        return Checkpoint.open(self.recipe.source)

    @property
    def begins_with_bos(self) -> bool:
        """Whether texts begin with the BOS token, as the mixer is made for."""
        return mixer_class(self.recipe.remix.mixer).begins_with_bos

    @cached_property
    def tokenizer(self) -> Any:
        """The source's tokenizer."""
        return modeling.load_tokenizer(self.source.path)

    @cached_property
    def rows(self) -> TextMixture:
        """Training text; it is read when rows are asked for."""
        need = max((stage.tokens for stage in self.recipe.stages), default=0)
        return training_rows(
            [begin_texts(text, self.begins_with_bos) for text in self.recipe.train],
            self.tokenizer,
            need,
            self.out / TEXT,
            tell=self.journal.ticker.update,
        )

    @cached_property
    def teacher(self) -> nn.Module:
        """The source as a model."""
        return modeling.load(self.source.path)

    @cached_property
    def windows(self) -> Packed:
        """Held-out windows of text."""
        settings = self.recipe.measure
        return evaluation_windows(
            self.recipe.heldout,
            self.tokenizer,
            settings.windows,
            settings.length,
            self.begins_with_bos,
        )

    @cached_property
    def window_count(self) -> int:
        """How many of the windows are measured, before training and after it."""
        known = read_json_if_exists(self.out / "baselines.json", dict[str, QualityRow])
        if known:
            return known[baselines.TEACHER]["windows"]
        if self.shares.seconds is None:
            return len(self.windows.input_ids)
        passes = len((baselines.TEACHER, *baselines.ZERO_TOKEN)) + EVALUATION_PASSES
        first = self.windows.input_ids[:1]
        with torch.inference_mode():
            self.teacher(input_ids=first)  # the first pass also reads the weights from disk
            begin = time.monotonic()
            self.teacher(input_ids=first)
        taken = time.monotonic() - begin
        return self.shares.count_windows(len(self.windows.input_ids), passes, taken)

    @cached_property
    def suite(self) -> Suite:
        """Benchmarks and recall, when the recipe has them."""
        settings = self.recipe.measure
        return build_suite(
            str(self.source.path),
            settings.tasks,
            self.recipe.heldout,
            lengths=settings.recall,
            folder=settings.task_data,
            limit=settings.limit,
        )

    def report_progress(self, done: int, total: int) -> None:
        """Show how much of a phase is done."""
        self.journal.ticker.update(done / total)

    def report_measurement(self, name: str, share: float, words: str) -> None:
        """Show what is measured, and of which model."""
        self.journal.ticker.update(share, f"{name}: {words}")

    def score(
        self, candidates: Mapping[str, Candidate], known: Mapping[str, QualityRow]
    ) -> dict[str, QualityRow]:
        """Rows of the quality table by name, the teacher's among them.

        Args:
            candidates: models to measure, beside the teacher.
            known: rows that were measured before; they come first. A teacher among them runs
                again, but only for the KL of the others.
        """
        models = {baselines.TEACHER: Candidate(self.teacher), **candidates}
        count = self.window_count
        scores = measure(
            models,
            self.windows.input_ids[:count],
            self.windows.bytes[:count],
            baselines.TEACHER,
            self.report_progress,
        )

        rows = dict(known)
        for name, candidate in models.items():
            if name not in known:
                suite_row = self.suite(candidate, partial(self.report_measurement, name))
                rows[name] = {**scores[name].json(), **suite_row}
        teacher = rows[baselines.TEACHER]
        return {name: add_share_of_teacher(row, teacher) for name, row in rows.items()}

    def linearize(self) -> None:
        """Save the linearized model in the work folder, and the plan."""
        assert self.suite  # made now: missing benchmarks show before hours of training
        remix = choose_layers(self.source, self.recipe.remix, self.rows, self.journal.ticker)
        after = remix(self.source)
        write_json(self.out / "plan.json", Plan.of(self.source, after).to_dict())
        save_model(after, self.linear, overwrite=True)

    def measure_baselines(self) -> None:
        """Rows that need no training."""
        remix = baselines.remix_of(Checkpoint.open(self.linear))
        assert remix is not None
        makers = baselines.zero_token(self.source, remix)
        candidates = {name: make() for name, make in makers.items() if name != baselines.TEACHER}
        write_json(self.out / "baselines.json", self.score(candidates, {}))

    def measure_speed(self) -> None:
        """Speed and memory of teacher and student by context length."""
        settings = self.recipe.measure
        models = {"teacher": str(self.source.path), "student": str(self.linear)}

        def report_progress(done: int, total: int, words: str) -> None:
            self.journal.ticker.update(done / total, words)

        limit = self.shares.share(time_shares.SPEED)
        rows = bench(models, settings.bench, settings.bench_steps, report_progress, seconds=limit)
        if any(row["extrapolated"] for found in rows.values() for row in found):
            self.shares.notes.append("speeds marked ~ follow from shorter contexts")
        write_json(self.out / "bench.json", rows)

    @cached_property
    def sample_tokens(self) -> int:
        """How many tokens a prompt is continued by, at the speed at the shortest context."""
        settings = self.recipe.measure
        return self.shares.count_sample_tokens(
            settings.sample_tokens, len(settings.prompts), self.decode_speeds
        )

    @cached_property
    def decode_speeds(self) -> list[float]:
        """Tokens per second of teacher and student at the shortest context, where measured."""
        benched = read_json_if_exists(self.out / "bench.json", dict[str, list[BenchRow]]) or {}
        return [speed for rows in benched.values() if rows and (speed := rows[0]["decode_tok_s"])]

    def seconds_after_training(self) -> float:
        """Seconds that the phases after training will take, from what earlier phases took."""
        before = len(baselines.ZERO_TOKEN) + 1  # passes over each window
        quality = self.journal.phases["baselines"] * EVALUATION_PASSES / before
        tokens = len(self.recipe.measure.prompts) * self.sample_tokens
        margin = self.shares.share(time_shares.MARGIN) or 0.0
        return margin + quality + sum(tokens / speed for speed in self.decode_speeds)

    def stage_seconds(self, stage: int) -> float | None:
        """Seconds that a stage may still take, None without a budget.

        What is left for the last stage, at most half of that for an earlier one.
        """
        left = self.journal.ticker.seconds_left()
        # The first process decides for all; what the others return is not used.
        if left is None or not distributed.is_rank0():
            return left
        left -= self.seconds_after_training()
        if stage == len(self.recipe.stages) - 1:
            return left
        now = time.monotonic()
        return self.deadlines.setdefault(stage, now + left / 2) - now

    def train(self) -> None:
        """Calibrate and train; puts the trained model into the output folder."""
        recipe = self.recipe
        ledger = train_linearized(
            self.source,
            self.linear,
            lambda: self.teacher,
            self.rows,
            recipe.stages,
            recipe.calibration,
            self.out,
            self.journal.ticker,
            recipe.seed,
            self.stage_seconds,
            self.watching,
            start_seconds=self.shares.share(time_shares.CALIBRATION),
        )
        if distributed.is_rank0():
            write_json(self.out / "ledger.json", ledger | {"text": self.rows.facts()})

    def evaluate(self) -> None:
        """The quality table of the trained model and its baselines."""
        candidates = baselines.model_candidates(modeling.load(self.out))
        rows = self.score(
            candidates, read_json_if_exists(self.out / "baselines.json", dict[str, QualityRow])
        )
        write_json(self.out / "eval.json", assemble_rows(rows, str(self.out)))

    def sample(self) -> None:
        """Teacher and student continue the same prompts, greedily."""
        settings = self.recipe.measure
        student, tokens = modeling.load(self.out), self.sample_tokens
        samples: list[Sample] = []
        for number, prompt in enumerate(settings.prompts):
            self.report_progress(number, len(settings.prompts))
            samples.append(
                {
                    "prompt": prompt,
                    "teacher": self._continue(self.teacher, prompt, tokens),
                    "student": self._continue(student, prompt, tokens),
                }
            )
        write_json(self.out / "samples.json", samples)

    def _continue(self, model: nn.Module, prompt: str, tokens: int) -> str:
        chat = self.recipe.measure.chat
        generated = generate.generate(model, self.tokenizer, prompt, tokens, chat=chat)
        return generated.text
