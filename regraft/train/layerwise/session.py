"""Alignment layer by layer from a saved model to a saved model; neither is whole in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ... import distributed, modeling
from ...core.checkpoint import Checkpoint
from ...data.text import Text
from ...errors import RegraftError
from ...io import output
from ...io.files import read_json_lines
from ...mixers.remix import needs_bos
from ...modeling.reopen import save_model
from ...progress import Ticker
from ..metrics import FILE
from ..monitor import DEFAULT_MONITORING, MonitorConfig, summarize_steps
from ..output import TEXT, TRAINED, finish_run, open_run, publish_model
from ..records import StageSummary, StepRow
from ..requests import describe_request, describe_run
from ..session import begin_texts, training_rows
from ..stage import Stage
from . import align
from .state import LayerwiseRun, check_layerwise_models


def align_saved_model(
    model: str,
    out: str,
    data: Text,
    stage: Stage,
    teacher: str | None,
    seed: int,
    ticker: Ticker,
    scratch: Path | None = None,
    calibration: int = 0,
    watching: MonitorConfig = DEFAULT_MONITORING,
    cache: Path | None = None,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Align a linearized model layer by layer with its source and write it to `out`.

    Called again with the same arguments after a kill, it resumes.

    RegraftError when `out` holds a finished model or anything that is not such a run, without a
    teacher, and when the models and the stage do not fit.

    Args:
        model: the linearized model's folder or name.
        out: the output folder.
        data: the text.
        stage: of kind `align` or `matrix`.
        teacher: the source model's folder or name.
        seed: of the rows' order.
        ticker: shows the progress.
        scratch: folder for the hidden states of two layers; None for one in `out`.
        calibration: tokens for the closed-form start of a model as linearize wrote it, 0 for none.
        watching: trackers and the limit for loss spikes.
        cache: where tokens are stored for later runs; None for `out`, until the run ends.
        allow_nonfinite: take and write NaN and infinity.
        trust_remote_code: whether code of the tokenizer may be run.

    Returns:
        The ledger with `text` (what was read), `summary` (a `StageSummary` of each layer) and
        `out`.
    """
    if not teacher:
        raise RegraftError(
            f"stage '{stage.kind}' needs a teacher: give --teacher, the source of {model}"
        )
    target = output.check_apart(out, [("model", model), ("teacher", teacher), ("cache", cache)])

    def request() -> dict[str, Any]:
        return describe_request(model, data, teacher, seed, stage, calibration=calibration)

    with open_run(target, "layer-wise training", request) as marker:
        if marker.complete:
            result = marker.result
        else:
            result = align_in_folder(
                model, target, data, stage, teacher, seed, ticker, scratch, calibration, watching,
                cache, allow_nonfinite, trust_remote_code,
            )  # fmt: skip
    return {**result, "out": out}


def align_in_folder(
    model: str,
    target: Path,
    data: Text,
    stage: Stage,
    teacher: str,
    seed: int,
    ticker: Ticker,
    scratch: Path | None,
    calibration: int,
    watching: MonitorConfig,
    cache: Path | None,
    allow_nonfinite: bool,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """Align in a claimed folder and say that it is complete; see `align_saved_model`."""
    ticker.start(f"reading {model}")
    source, student = (Checkpoint.open(path, allow_nonfinite) for path in (teacher, model))
    check_layerwise_models(source, student)
    for checkpoint in (source, student):
        checkpoint.verify()

    data = begin_texts(data, needs_bos(student))
    ticker.start("reading data")
    tokenizer = modeling.load_tokenizer(model, trust_remote_code)
    text = target / TEXT
    rows_of = training_rows([data], tokenizer, stage.tokens, text, cache, ticker.update)
    rows = rows_of(stage.length)
    calibration_rows = -(-calibration // stage.length)  # rounded up

    ticker.start(f"{stage.kind}, layer by layer")
    facts = describe_run(model, data, teacher, seed, stage)
    with watching.monitor(target, ticker, facts) as watchers:
        run = LayerwiseRun(
            source, student, stage, rows, target, seed, calibration_rows, scratch, **watchers
        )
        trained, ledger = align.align(run)

    ticker.start(f"writing {target}")
    result = ledger | {"text": rows_of.facts(), "summary": summarize_layers(target)}

    def publish() -> None:
        save_model(trained, target / TRAINED, overwrite=True)
        publish_model(target / TRAINED, target)
        # Only now: the trained mixers are read from the work folder while the model is written.
        finish_run(target, result)

    distributed.on_rank0(publish)
    return result


def summarize_layers(out: Path) -> list[StageSummary]:
    """Summarize every layer that was trained, as `monitor.summarize_stages` does stages."""
    layers: dict[int, list[StepRow]] = {}
    for row in read_json_lines(out / FILE, StepRow):
        layers.setdefault(row["layer"], []).append(cast(StepRow, row))

    # Tokens, seconds and steps in the rows count over all layers; here from the layer's start.
    found, tokens, seconds = [], 0, 0.0
    for layer, rows in layers.items():
        own = [
            row | {"tokens": row["tokens"] - tokens, "seconds": row["seconds"] - seconds}
            for row in rows
        ]
        summary = summarize_steps(layer, own)
        summary["steps"] = len(rows)
        found.append(summary)
        tokens, seconds = rows[-1]["tokens"], rows[-1]["seconds"]
    return found
