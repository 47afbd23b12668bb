"""From a source to a linearized model: layers chosen, mixers put in, started in closed form and trained."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..data import default_text
from ..data.corpus import Text, TextMixture
from ..data.packing import pack
from ..data.rows import Table
from ..errors import RegraftError
from ..evaluation.baselines import remix_of
from ..io.files import read_json_if_exists, write_json
from ..mixers.remix import Remix
from ..progress import Ticker
from ..train import fsdp, loop
from ..train.ledger import COSTS
from ..train.monitor import DEFAULT_MONITORING, MonitorConfig
from ..train.session import calibrate_once, save_trained, training_rows
from ..train.stage import LAYERWISE, Stage
from . import select_layers
from .methods import Method

WINDOWS, LENGTH = 4, 1024  # text on which layers are chosen
REQUEST_FILE = "asked.json"
Limit = Callable[[int], float | None]


def choose_layers(
    source: Checkpoint, remix: Remix, rows: Callable[[int], Table] | None, ticker: Ticker
) -> Remix:
    """`remix` with its layers chosen, by measurement where it names a rule; see `choosing`.

    `rows`: packed text by length (None: Python's own documentation, without what is held out of it).
    """
    if select_layers.parse_keep(remix.keep) is None:
        return remix
    if rows is None:
        tokenizer = modeling.load_tokenizer(source.path)
        rows = cache(lambda length: pack(default_text.documentation(), tokenizer, length))
    ticker.start(f"measuring layers ({remix.keep})")
    try:
        table = rows(min(LENGTH, source.sizes.get("pos", LENGTH)))
    except RegraftError as error:
        raise RegraftError(
            f"{error} (read for --keep {remix.keep}; --keep every:4 measures nothing)"
        ) from None
    picked = table[loop.shuffled_indices(len(table), min(WINDOWS, len(table)), remix.seed)]
    batches = loop.calibration_batches(table, WINDOWS, remix.seed + 1)
    return select_layers.resolve_keep(
        source, remix, select_layers.SelectionData(picked, batches, ticker.update)
    )


def train_linearized(
    source: Checkpoint,
    folder: Path,
    teacher: Callable[[], PreTrainedModel],
    rows: Callable[[int], Table],
    stages: Sequence[Stage],
    calibration: int,
    out: Path,
    ticker: Ticker,
    seed: int = 0,
    limit: Limit = lambda stage: None,
    watching: MonitorConfig = DEFAULT_MONITORING,
) -> dict[str, Any]:
    """Calibrate the linearized model in `folder` on so many tokens, train it and put it into `out`; the ledger, whose
    `start` is what came before the stages: choosing layers and the closed form, each with tokens, FLOPs and seconds.

    `teacher` gives the whole source, which under torchrun the first process needs for calibration. Called again it
    goes on where it was.
    """
    checkpoint, work = Checkpoint.open(folder), out / "work"
    length = stages[0].length if stages else LENGTH
    batches = (
        loop.calibration_batches(rows(length), calibration // length, seed) if calibration else []
    )
    layerwise = any(stage.kind in LAYERWISE for stage in stages)
    over = fsdp.build_mesh() if distributed.world_size() > 1 else None
    if over is not None:  # the closed-form start is made by the first process, of whole models

        def begin() -> None:
            whole = teacher()
            calibrate_once(
                modeling.materialize(checkpoint),
                whole,
                modeling.slots(whole, source),
                batches,
                work,
                ticker,
            )

        distributed.on_rank0(begin)
    student = fsdp.load_sharded(checkpoint, over, layerwise)
    guide = fsdp.load_sharded(source, over) if over is not None else teacher()
    slots = modeling.slots(guide, source)
    spent = calibrate_once(student, guide, slots, batches, work, ticker)
    if over is None:
        student, guide = student.to(distributed.device()), guide.to(distributed.device())

    facts = {
        "source": str(source.path),
        "seed": seed,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }
    with watching.monitor(out, ticker, facts) as watched:
        ledger = loop.train(
            loop.Run(student, stages, rows, out, guide, slots, seed=seed, limit=limit, **watched)
        )
    ledger["start"] = start_costs(checkpoint, spent)
    save_trained(checkpoint, student, stages, ledger, out)
    if over is None:
        guide.to("cpu")  # it may be measured beside others, which is done there
    return ledger


def start_costs(
    linearized: Checkpoint, calibration: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """What was spent before training, in rows like those of a ledger's stages."""
    remix = remix_of(linearized)
    chosen = remix.scores if remix else {}
    rows = (
        [{"kind": f"layers: {chosen['rule']}", **{key: chosen[key] for key in COSTS}}]
        if chosen
        else []
    )
    return rows + ([{"kind": "closed form", **calibration}] if calibration else [])


def run_method(
    source: Checkpoint,
    method: Method,
    out: Path,
    data: Text,
    stages: Sequence[Stage],
    seed: int,
    ticker: Ticker,
    overwrite: bool = False,
    watching: MonitorConfig = DEFAULT_MONITORING,
    cache: Path | None = None,
) -> tuple[Remix, dict[str, Any]]:
    """A method from end to end: (what was replaced, the ledger); called again it goes on where it was.

    RegraftError when `out` holds a finished model, which `overwrite` deletes, or another conversion.
    """
    distributed.on_rank0(lambda: str(source.path))  # a GGUF file is converted by one process
    work = out / "work"
    facts: dict[str, Any] = {
        "source": str(source.path),
        "data": repr(
            dataclasses.replace(data, skip_bad=False)
        ),  # asked for after a bad line stopped the first attempt
        "seed": seed,
        "method": repr(method),
        "stages": repr(stages),
    }
    if source.path.resolve().is_relative_to(out.resolve()):
        raise RegraftError(
            f"'{out}' holds the source, which is read while the result is made: choose another output"
        )
    distributed.on_rank0(lambda: claim(out, facts, overwrite))
    rows = text_rows(
        source,
        data,
        ticker,
        max((stage.tokens for stage in stages), default=0),
        work / "text",
        cache,
    )
    linear = work / "linearized"

    def convert() -> None:
        if not (linear / "config.json").exists():
            choose_layers(source, method.remix, rows, ticker)(source).save(linear, overwrite=True)

    distributed.on_rank0(convert)
    remix = remix_of(Checkpoint.open(linear))
    assert remix is not None
    ticker.start("training")
    whole = partial(modeling.materialize, source)
    ledger = train_linearized(
        source,
        linear,
        whole,
        rows,
        stages,
        method.calibration,
        out,
        ticker,
        seed,
        watching=watching,
    )
    ledger["text"] = rows.facts()

    def clean_up() -> None:
        for folder in (work, out / "run"):
            shutil.rmtree(folder, ignore_errors=True)
        (out / REQUEST_FILE).unlink(missing_ok=True)

    distributed.on_rank0(clean_up)
    return remix, ledger


def text_rows(
    source: Checkpoint,
    data: Text,
    ticker: Ticker,
    need: int = 0,
    own: Path | None = None,
    cache: Path | None = None,
) -> TextMixture:
    """Rows of a text by length, in the source's tokens."""
    return training_rows(
        [data], modeling.load_tokenizer(source.path), need, own, cache, ticker.update
    )


def claim(out: Path, facts: dict[str, Any], overwrite: bool) -> None:
    """Note in `out` what is being made there; RegraftError when something else is there already."""
    if overwrite and (out / "config.json").exists():
        shutil.rmtree(out)
    if (out / "config.json").exists():
        raise RegraftError(
            f"{out} holds a finished model: choose another folder, or delete it to begin again"
        )
    theirs = read_json_if_exists(out / REQUEST_FILE)
    if theirs is None and out.exists() and any(out.iterdir()):
        raise RegraftError(
            f"{out} exists and holds no conversion: choose another folder or delete it"
        )
    other = next(
        (key for key in facts if theirs is not None and theirs.get(key) != facts[key]), None
    )
    if theirs is not None and other:
        raise RegraftError(
            f"{out} holds a conversion with another {other}: choose another folder or delete it"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REQUEST_FILE, facts)
