"""From a source to a linearized model: choose layers, put mixers in, start them, train."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..data import default_text
from ..data.corpus import TextMixture
from ..data.files import find_files
from ..data.packing import pack
from ..data.rows import Table
from ..data.text import Text
from ..errors import RegraftError
from ..evaluation.baselines import remix_of
from ..export.target import find_target
from ..io import output
from ..io.identity import identify_files, identify_model
from ..io.request import Identity
from ..mixers.registry import mixer_class
from ..mixers.remix import Remix
from ..mixers.remix_options import RemixOptions
from ..modeling import flops
from ..modeling.reopen import save_model
from ..progress import Ticker, print_line
from ..train import fsdp, loop
from ..train.monitor import DEFAULT_MONITORING, MonitorConfig
from ..train.output import TEXT, WORK, finish_run, open_replacing_run
from ..train.records import StartCost
from ..train.session import begin_texts, calibrate_once, save_trained, training_rows
from ..train.stage import LAYERWISE, Stage
from . import select_layers
from .methods import Method

WINDOWS, LENGTH = 4, 1024  # rows, and tokens of a row, on which layers are chosen
LOOKED_AT = 64  # rows of the training text
SHARE = 0.25  # of tokens behind a window, below which a text is called short
KIND = "linearized training"  # of the output folder while it is made
Limit = Callable[[int], float | None]  # number of a stage -> seconds it may take


class ConversionRequest(TypedDict):
    """What a folder's conversion was started with."""

    length: NotRequired[int]  # tokens of the rows for the closed form, where no stage says it

    data: str  # how the Text is read
    seed: int
    method: str
    stages: str
    inputs: dict[str, Identity]


def check_target(
    source: Checkpoint, options: RemixOptions, name: str, flags: Sequence[str] = ()
) -> None:
    """RegraftError when a target of `regraft export` cannot hold what a Remix makes.

    Args:
        source: the model to linearize.
        options: what is replaced by what. Layers that are chosen by measurement are not known yet:
            the target must hold any.
        name: of the target.
        flags: that changed what the target chooses, for the message.
    """
    measured = select_layers.parse_keep(options.keep) is not None
    for keep in ("none", "all", "every:2") if measured else (options.keep,):
        remix = Remix.from_options(options, keep=keep, scores={})
        try:
            find_target(name).check_holds(remix(source))
        except RegraftError as error:
            if not flags or f"--for {name}" not in str(error):
                raise
            raise RegraftError(f"{error}, without {', '.join(flags)}") from None


def choose_layers(
    source: Checkpoint,
    options: RemixOptions,
    rows: Callable[[int], Table] | None,
    ticker: Ticker,
    trust_remote_code: bool = False,
) -> Remix:
    """A Remix with its layers chosen by measurement, where `keep` names a rule.

    Args:
        source: the model to linearize.
        options: what is replaced by what; taken as it is when `keep` names no rule.
        rows: gives packed text for a row length. None: Python's own documentation, without what is
            held out of it.
        ticker: shows the progress.
        trust_remote_code: whether code of the tokenizer may be run.

    RegraftError when the text has too few tokens.
    """
    remix = Remix.from_options(options)
    if select_layers.parse_keep(remix.keep) is None:
        return remix
    if rows is None:
        tokenizer = modeling.load_tokenizer(source.path, trust_remote_code)
        rows = cache(lambda length: pack(default_text.documentation(), tokenizer, length))

    ticker.start(f"measuring layers ({remix.keep})")
    try:
        # Rows must show what lies beyond the window.
        length = max(LENGTH, 2 * remix.window)
        table = rows(min(length, source.sizes.get("pos", length)))
    except RegraftError as error:
        raise RegraftError(
            f"{error} (read for --keep {remix.keep}; --keep every:4 measures nothing)"
        ) from None

    # Rows to score layers on and rows to calibrate on are drawn independently.
    windows = table[loop.shuffled_indices(len(table), min(WINDOWS, len(table)), remix.seed)]
    batches = loop.calibration_batches(table, WINDOWS, remix.seed + 1)
    return select_layers.resolve_keep(
        source, remix, select_layers.SelectionData(windows, batches, ticker.update)
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
    length: int = LENGTH,
    start_seconds: float | None = None,
) -> dict[str, Any]:
    """Give a linearized model its closed-form start, train it and put it into `out`.

    Called again after a kill, it continues where it was. Under torchrun every process calls it.

    Args:
        source: the model that was linearized.
        folder: the linearized model.
        teacher: loads the whole source. Under torchrun only the first process calls it, for the
            closed-form start.
        rows: gives packed text for a row length.
        stages: of the training, in order.
        calibration: tokens for the closed-form start, 0 to leave it out.
        out: output folder.
        ticker: shows the progress.
        seed: of the order of rows.
        limit: seconds that a stage may take, None for as long as its tokens need.
        watching: trackers, and when a loss counts as too high.
        length: tokens of a row for the closed form, where there is no stage to say it.
        start_seconds: what the closed form may take, None for as long as its tokens need.

    Returns:
        The ledger. Its `start` is what was spent before the stages: choosing layers and the closed
        form.
    """
    checkpoint, work = Checkpoint.open(folder, source.allow_nonfinite), out / WORK
    check_row_lengths(source, stages, remix_of(checkpoint))
    length = stages[0].length if stages else length
    if stages or calibration:
        distributed.on_rank0(lambda: warn_of_short_documents(checkpoint, rows(length), seed))
    batches = []
    if calibration:
        batches = loop.calibration_batches(rows(length), calibration // length, seed)

    layerwise = any(stage.kind in LAYERWISE for stage in stages)
    mesh = fsdp.build_mesh() if distributed.world_size() > 1 else None
    if mesh is not None:
        # The closed form needs whole models. The first process stores its start in `work`, and
        # calibrate_once below reads it into the shards.
        def calibrate_whole() -> None:
            whole = teacher()
            slots = modeling.slots(whole, source)
            calibrate_once(
                modeling.materialize(checkpoint), whole, slots, batches, work, ticker,
                start_seconds,
            )  # fmt: skip

        distributed.on_rank0(calibrate_whole)

    student = fsdp.load_sharded(checkpoint, mesh, layerwise)
    teacher_model = fsdp.load_sharded(source, mesh) if mesh is not None else teacher()
    slots = modeling.slots(teacher_model, source)
    spent = calibrate_once(student, teacher_model, slots, batches, work, ticker, start_seconds)
    if mesh is None:  # shards are on their devices already
        student = student.to(distributed.device())
        teacher_model = teacher_model.to(distributed.device())

    facts = {
        "source": str(source.path),
        "seed": seed,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }
    with watching.monitor(out, ticker, facts) as watched:
        ledger = loop.train(
            loop.Run(
                student, stages, rows, out, teacher_model, slots, seed=seed, limit=limit, **watched
            )
        )
    ledger["start"] = start_costs(checkpoint, spent)
    save_trained(checkpoint, student, stages, ledger, out)

    if mesh is None:
        teacher_model.to("cpu")  # the caller may measure it with other models, which is done there
    return ledger


def start_costs(linearized: Checkpoint, calibration: Mapping[str, Any] | None) -> list[StartCost]:
    """What was spent before training: on choosing layers and on the closed-form start.

    Args:
        linearized: its lineage says how layers were chosen.
        calibration: cost of the closed form, None where there was none.
    """
    rows = []
    remix = remix_of(linearized)
    if remix and remix.scores:
        rows.append(_start_cost(f"layers: {remix.scores['rule']}", remix.scores))
    if calibration:
        rows.append(_start_cost("closed form", calibration))
    return rows


def _start_cost(kind: str, costs: Mapping[str, Any]) -> StartCost:
    return {
        "kind": kind,
        "tokens": costs["tokens"],
        "flops": costs["flops"],
        "seconds": costs["seconds"],
    }


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
    trust_remote_code: bool = False,
    length: int = LENGTH,
) -> tuple[Remix, dict[str, Any]]:
    """A method from the source to the trained model; (what was replaced, the ledger).

    Called again after a kill, it continues where it was.

    Args:
        source: the model to linearize.
        method: what is replaced by what, and how it is started.
        out: output folder.
        data: text to choose layers on and to train on.
        stages: of the training, usually `method.stages`.
        seed: of the order of rows.
        ticker: shows the progress.
        overwrite: replace a finished output of regraft in `out`, once the new one is complete.
        watching: trackers, and when a loss counts as too high.
        cache: folder that keeps the text's tokens for later runs.
        trust_remote_code: whether code of the tokenizer may be run.
        length: tokens of a row for the closed form, where there is no stage to say it.

    RegraftError when `out` holds a finished model (without `overwrite`), another conversion,
    anything else, or the source.
    """
    check_row_lengths(source, stages, method.remix)
    distributed.on_rank0(lambda: str(source.path))  # a GGUF file is converted by one process
    target = output.check_apart(out, [("source", source.origin), ("source", source.path)])
    if not overwrite and target.exists():
        output.check_claimable(target)  # before anything is read
    texts, data = (
        find_files(data.path),
        begin_texts(data, mixer_class(method.remix.mixer).begins_with_bos),
    )
    request: ConversionRequest = {
        # --skip-bad may be added after a bad line stopped the first attempt
        "data": repr(dataclasses.replace(data, path="", skip_bad=False)),
        "seed": seed,
        "method": repr(method),
        "stages": repr(stages),
        "inputs": distributed.on_rank0(
            lambda: {"source": identify_model(source.origin), "data": identify_files(texts)}
        ),
    }
    if not stages:
        request["length"] = length

    with open_replacing_run(target, overwrite, KIND, request) as (folder, marker):
        if marker.complete:
            ledger = marker.result
        else:
            ledger = convert_and_train(
                source, method, folder, data, stages, seed, ticker, watching, cache,
                trust_remote_code, length,
            )  # fmt: skip

    remix = remix_of(Checkpoint.open(target))
    assert remix is not None
    return remix, ledger


def convert_and_train(
    source: Checkpoint,
    method: Method,
    folder: Path,
    data: Text,
    stages: Sequence[Stage],
    seed: int,
    ticker: Ticker,
    watching: MonitorConfig,
    cache: Path | None,
    trust_remote_code: bool,
    length: int,
) -> dict[str, Any]:
    """Linearize and train in a claimed folder; the ledger. Arguments as of `run_method`."""
    linear, need = folder / WORK / "linearized", max((stage.tokens for stage in stages), default=0)
    rows = text_rows(source, data, ticker, need, folder / TEXT, cache, trust_remote_code)

    def convert() -> None:
        if not (linear / "config.json").exists():
            remix = choose_layers(source, method.remix, rows, ticker)
            save_model(remix(source), linear, overwrite=True)

    distributed.on_rank0(convert)
    ticker.start("training" if stages else "closed form")
    teacher = partial(modeling.load_stored, source)
    ledger = train_linearized(
        source,
        linear,
        teacher,
        rows,
        stages,
        method.calibration,
        folder,
        ticker,
        seed,
        watching=watching,
        length=length,
    )
    ledger["text"] = rows.facts()
    distributed.on_rank0(lambda: finish_run(folder, ledger))
    return ledger


def check_row_lengths(
    source: Checkpoint, stages: Sequence[Stage], remix: RemixOptions | None
) -> None:
    """RegraftError when a stage has longer rows than the model has positions, or rows that the
    window beside a linear mixer sees whole.
    """
    window = remix.window if remix and not mixer_class(remix.mixer).is_window else 0
    for stage in stages:
        flops.count_positions(source, stage.length)
        if stage.length <= window:
            raise RegraftError(
                f"rows of {stage.length} tokens never leave the window of {window}, so that the "
                f"linear branch beside it would learn nothing: give --length {4 * window} or at "
                f"least {window + 1}, or a narrower --window such as {max(stage.length // 4, 1)}"
            )


def note_untrained(checkpoint: Checkpoint, out: str | Path) -> list[str]:
    """A line for a converted model with mixers that do not start as the source's attention.

    Args:
        checkpoint: the linearized model, not trained.
        out: where it is.
    """
    specs = [spec for spec in checkpoint.config["mixers"] if spec]
    names = {spec["name"] for spec in specs if not mixer_class(spec["name"]).softmax_tokens(spec)}
    if not names:
        return []
    return [
        f"{', '.join(sorted(names))} without a window does not compute the source's attention"
        f" before it is trained: regraft train {out} --data TEXT --tokens 200000, or linearize"
        " with --data and --tokens"
    ]


def warn_of_short_documents(checkpoint: Checkpoint, rows: Table, seed: int) -> None:
    """Say so where few tokens of a text have others before what a window shows them.

    On the rest a converted layer computes the source's attention already.

    Args:
        checkpoint: the linearized model.
        rows: of the text.
        seed: of the rows that are looked at.
    """
    specs = [spec for spec in checkpoint.config["mixers"] if spec]
    shown = max((mixer_class(spec["name"]).softmax_tokens(spec) for spec in specs), default=0)
    if not shown:
        return
    some = rows[loop.shuffled_indices(len(rows), min(len(rows), LOOKED_AT), seed)]
    share = float((some.position_ids >= shown).float().mean())
    if share < SHARE:
        print_line(
            f"only {share:.0%} of the training tokens have text before the {shown} tokens that a "
            "window shows them, and layers learn from those alone: give longer documents"
        )


def text_rows(
    source: Checkpoint,
    data: Text,
    ticker: Ticker,
    need: int = 0,
    own: Path | None = None,
    cache: Path | None = None,
    trust_remote_code: bool = False,
) -> TextMixture:
    """Rows of a text by their length, in the source's tokens.

    Args:
        source: has the tokenizer.
        data: the text.
        ticker: shows the progress of reading.
        need: tokens of the largest stage.
        own: the run's folder for text, see `TextMixture`.
        cache: folder that keeps tokens for later runs.
        trust_remote_code: whether code of the tokenizer may be run.
    """
    tokenizer = modeling.load_tokenizer(source.path, trust_remote_code)
    return training_rows([data], tokenizer, need, own, cache, ticker.update)
