"""A recipe carried out in phases, each leaving its file: linearize, measure, train, measure again, report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..data.corpus import TextMixture
from ..data.packing import Packed
from ..evaluation import baselines
from ..evaluation.bench import bench
from ..evaluation.evaluate import assemble_rows, build_suite, evaluation_windows
from ..evaluation.perplexity import Candidate, measure
from ..evaluation.suite import Suite, add_share_of_teacher
from ..io.files import read_json_if_exists, write_json
from ..linearize.pipeline import choose_layers, train_linearized
from ..modeling import generate
from ..plan.plan import Plan
from ..report import html
from ..train.monitor import DEFAULT_MONITORING, MonitorConfig
from ..train.session import training_rows
from . import schema
from .journal import Journal
from .schema import Recipe

MARGIN = 30.0  # seconds kept back for saving, loading and the page


def run_recipe(
    recipe: Recipe, out: str, watching: MonitorConfig = DEFAULT_MONITORING
) -> dict[str, Any]:
    """Carry out a recipe in directory `out`, going on where an earlier call stopped; returns the report's numbers.

    `out` ends up holding the trained model, `report.html`, `report.json`, `metrics.jsonl`, `lineage.json` and the
    phases' JSON files. RegraftError when `out` holds another run or anything else.
    """
    if not distributed.is_rank0():
        return follow(recipe, Path(out), watching)
    experiment = Experiment(recipe, Path(out), watching)
    with experiment.journal.ticker:
        for name, phase in experiment.phases().items():
            if not experiment.journal.is_done(name):
                distributed.broadcast(name)
                experiment.journal.ticker.start(name)
                phase()
                experiment.journal.finish(name)
    html.write(experiment.out)
    distributed.broadcast("")
    return html.collect(experiment.out)


def follow(recipe: Recipe, out: Path, watching: MonitorConfig) -> dict[str, Any]:
    """What the other processes of a torchrun do: their part of the training, and wait for the rest."""
    while name := distributed.broadcast(""):
        if name == "train":
            Experiment(recipe, out, watching).train()
    return {}


class Experiment:
    """What the phases share: the journal, the source, the models that are in memory now."""

    def __init__(self, recipe: Recipe, out: Path, watching: MonitorConfig = DEFAULT_MONITORING):
        self.recipe, self.out, self.watching = recipe, out, watching
        self.journal = Journal(out, schema.dump(recipe), recipe.minutes)
        self.work = out / "work"
        self.linear = self.work / "linearized"

    def phases(self) -> dict[str, Callable[[], None]]:
        """Phases in order. The student's speed does not depend on training, so it is measured before: training then
        knows how much time the rest needs."""
        return {
            "linearize": self.linearize,
            "baselines": self.measure_baselines,
            "bench": self.measure_speed,
            "train": self.train,
            "evaluate": self.evaluate,
            "samples": self.sample,
            "clean up": self.clean_up,
        }

    @cached_property
    def source(self) -> Checkpoint:
        """The source, opened."""
        return Checkpoint.open(self.recipe.source)

    @cached_property
    def tokenizer(self) -> Any:
        """The source's tokenizer."""
        return modeling.load_tokenizer(self.source.path)

    @cached_property
    def rows(self) -> TextMixture:
        """Training text, read when it is asked for."""
        need = max((stage.tokens for stage in self.recipe.stages), default=0)
        return training_rows(
            self.recipe.train,
            self.tokenizer,
            need,
            self.work / "text",
            tell=self.journal.ticker.update,
        )

    @cached_property
    def teacher(self) -> nn.Module:
        """The source as a model."""
        return modeling.load(self.source.path)

    @cached_property
    def windows(self) -> Packed:
        """Held-out windows."""
        wanted = self.recipe.measure
        return evaluation_windows(
            self.recipe.heldout, self.tokenizer, wanted.windows, wanted.length
        )

    @cached_property
    def suite(self) -> Suite:
        """Benchmarks and recall, when the recipe has them."""
        wanted = self.recipe.measure
        return build_suite(
            str(self.source.path),
            wanted.tasks,
            self.recipe.heldout,
            lengths=wanted.recall,
            folder=wanted.task_data,
            limit=wanted.limit,
        )

    def report_progress(self, done: int, total: int) -> None:
        """Tell the ticker."""
        self.journal.ticker.update(done / total)

    def report_measurement(self, name: str, share: float, words: str) -> None:
        """Tell the ticker what is measured of which model."""
        self.journal.ticker.update(share, f"{name}: {words}")

    def score(
        self, candidates: Mapping[str, Candidate], known: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Rows of the table by name, KL to the teacher, in addition to the known ones; benchmarks of the new ones."""
        everyone = {baselines.TEACHER: Candidate(self.teacher), **candidates}
        scores = measure(
            everyone,
            self.windows.input_ids,
            self.windows.bytes,
            baselines.TEACHER,
            self.report_progress,
        )
        rows = dict(known)
        for name, candidate in everyone.items():
            if name not in known:
                rows[name] = scores[name].json() | self.suite(
                    candidate, partial(self.report_measurement, name)
                )
        return {
            name: add_share_of_teacher(row, rows[baselines.TEACHER]) for name, row in rows.items()
        }

    def linearize(self) -> None:
        """Save the linearized model in the work folder, and the plan; missing benchmarks show now, not at the end."""
        assert self.suite
        after = choose_layers(self.source, self.recipe.remix, self.rows, self.journal.ticker)(
            self.source
        )
        write_json(self.out / "plan.json", Plan.of(self.source, after).to_dict())
        after.save(self.linear, overwrite=True)

    def measure_baselines(self) -> None:
        """Rows that need no training."""
        remix = baselines.remix_of(Checkpoint.open(self.linear))
        assert remix is not None
        makers = baselines.zero_token(self.source, remix)
        candidates = {name: make() for name, make in makers.items() if name != baselines.TEACHER}
        write_json(self.out / "baselines.json", self.score(candidates, {}))

    def measure_speed(self) -> None:
        """Speed and memory of teacher and student by context length."""
        wanted = self.recipe.measure
        models = {"teacher": str(self.source.path), "student": str(self.linear)}
        note = self.journal.ticker.update
        rows = bench(
            models,
            wanted.bench,
            wanted.bench_steps,
            lambda done, total, words: note(done / total, words),
        )
        write_json(self.out / "bench.json", rows)

    def seconds_after_training(self) -> float:
        """Seconds that the phases after training will take, from what the earlier ones took."""
        quality = self.journal.phases["baselines"]
        speed = [
            rows[0]["decode_tok_s"]
            for rows in read_json_if_exists(self.out / "bench.json").values()
            if rows
        ]
        wanted = self.recipe.measure
        return (
            MARGIN
            + quality
            + sum(len(wanted.prompts) * wanted.sample_tokens / rate for rate in speed if rate)
        )

    def stage_seconds(self, stage: int) -> float | None:
        """Seconds for a stage: what is left for the last one, at most half of that for an earlier one."""
        left = self.journal.ticker.seconds_left()
        if left is None or not distributed.is_rank0():  # the others are told
            return left
        left -= self.seconds_after_training()
        return left if stage == len(self.recipe.stages) - 1 else left / 2

    def train(self) -> None:
        """Calibrate and train; the trained model is put into the output directory."""
        recipe = self.recipe
        ledger = train_linearized(
            self.source, self.linear, lambda: self.teacher, self.rows, recipe.stages, recipe.calibration, self.out,
            self.journal.ticker, recipe.seed, self.stage_seconds, self.watching,
        )  # fmt: skip
        if distributed.is_rank0():
            write_json(self.out / "ledger.json", ledger | {"text": self.rows.facts()})

    def evaluate(self) -> None:
        """The quality table."""
        rows = self.score(
            baselines.model_candidates(modeling.load(self.out)),
            read_json_if_exists(self.out / "baselines.json"),
        )
        write_json(self.out / "eval.json", assemble_rows(rows, str(self.out)))

    def sample(self) -> None:
        """Teacher and student continue the same prompts, greedily."""
        wanted, models = (
            self.recipe.measure,
            {"teacher": self.teacher, "student": modeling.load(self.out)},
        )
        pairs: list[dict[str, str]] = [{"prompt": prompt} for prompt in wanted.prompts]
        for number, pair in enumerate(pairs):
            self.report_progress(number, len(pairs))
            for name, model in models.items():
                made = generate.generate(
                    model, self.tokenizer, pair["prompt"], wanted.sample_tokens, chat=wanted.chat
                )
                pair[name] = made.text
        write_json(self.out / "samples.json", pairs)

    def clean_up(self) -> None:
        """Remove what only an interrupted run needs."""
        for folder in (self.work, self.out / "run"):
            shutil.rmtree(folder, ignore_errors=True)
