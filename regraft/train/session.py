"""Between the training loop and the disk: rows, the closed-form start, the trained model."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..data.corpus import TextMixture
from ..data.images import read_images
from ..data.text import Text
from ..errors import RegraftError
from ..io import output
from ..io.files import read_json_if_exists, write_json
from ..io.identity import identify_model
from ..io.request import Identity
from ..io.safetensors import read_tensors, save_tensors
from ..mixers.older_names import rename_older
from ..mixers.remix import needs_bos
from ..modeling import flops
from ..modeling.reopen import save_model
from ..progress import Ticker
from . import fsdp, loop
from .calibrate import calibrate
from .gate_shift import choose_gate_shift, find_gates
from .monitor import DEFAULT_MONITORING, MonitorConfig, summarize_stages
from .objectives import Data, Rows
from .output import TEXT, TRAINED, finish_run, open_run, publish_model
from .records import Cost
from .requests import describe_request, describe_run
from .row_store import check_cache_folder
from .stage import LAYERWISE, Stage
from .teacher_cache import CachedTeacher, Teacher, TeacherCacheConfig


def training_rows(
    texts: Sequence[Text],
    tokenizer: Any,
    need: int = 0,
    run_folder: Path | None = None,
    cache: Path | None = None,
    tell: Callable[[float, str], None] = lambda share, words: None,
) -> TextMixture:
    """Training rows by length: the largest set without repetition in which each text has its share.

    RegraftError when there is no text or a share is not positive.

    Args:
        texts: the texts with their shares.
        tokenizer: the model's tokenizer.
        need: tokens of the largest stage; 0 for all there are.
        run_folder: where the run stores tokens until it ends.
        cache: where tokens are stored for later runs, too.
        tell: called with the share that is done and a note.
    """
    return TextMixture(texts, tokenizer, need, run_folder, cache, tell)


def begin_texts(text: Text, wanted: bool) -> Text:
    """The text, beginning with the BOS token where it was asked for or a model wants it."""
    return dataclasses.replace(text, bos=text.bos or wanted)


def calibrate_once(
    student: nn.Module,
    teacher: nn.Module,
    teacher_slots: Sequence[nn.Module],
    batches: list[Any],
    work: Path,
    ticker: Ticker,
    seconds: float | None = None,
) -> Cost | None:
    """Give the student's mixers their closed-form start, or the one that an earlier run stored.

    Args:
        student: the linearized model; under torchrun its weights may be sharded.
        teacher: the source model.
        teacher_slots: its attention modules, by layer.
        batches: (input_ids, position_ids, segments or None), each (batch, time); an empty list
            leaves the student as it is.
        work: folder in which the start is stored for a restart.
        ticker: shows the progress.
        seconds: what the start may take, see `calibrate`.

    Returns:
        What the start cost, None without batches.
    """
    file, costs = work / "calibrated.safetensors", work / "calibrated.json"
    if not batches:
        return None

    if not file.exists():
        begin = time.monotonic()
        with flops.build_flop_counter() as counter:
            tokens = calibrate_mixers(student, teacher, teacher_slots, batches, ticker, seconds)
        cost: Cost = {
            "tokens": tokens,
            "flops": counter.get_total_flops(),
            "seconds": round(time.monotonic() - begin, 3),
        }
        # The weights come last: where they exist, the start is complete.
        work.mkdir(parents=True, exist_ok=True)
        write_json(costs, cost)
        weights = {name: value.contiguous() for name, value in mixer_weights(student).items()}
        save_tensors(file, weights)

    # Read back also what was just written, so that a resumed run has the same weights.
    values = {rename_older(name): value for name, value in read_tensors(file).items()}
    with torch.no_grad():
        for name, parameter in mixer_weights(student).items():
            fsdp.local_part(parameter).copy_(fsdp.shard_like(values[name], parameter))
    stored: Cost | None = read_json_if_exists(costs, Cost)
    return stored


def calibrate_mixers(
    student: nn.Module,
    teacher: nn.Module,
    teacher_slots: Sequence[nn.Module],
    batches: list[Any],
    ticker: Ticker,
    seconds: float | None = None,
) -> int:
    """Run the closed-form start over all layers and count the tokens; see `calibrate_once`.

    Of a model with gates the last quarter of four batches or more is kept apart, to judge how far
    they open.
    """
    slots = modeling.slots(student)
    apart = len(batches) // 4 if find_gates(slots) else 0
    fitted, judges = batches[: len(batches) - apart], batches[len(batches) - apart :]
    rows = calibrate(slots, teacher, list(teacher_slots), fitted, ticker.update, seconds)
    tokens = max((row["tokens"] for row in rows), default=0)
    if judges:
        input_ids = torch.cat([ids for ids, _, _ in judges])
        report = functools.partial(ticker.update, note="choosing how far gates open")
        choose_gate_shift(slots, student, teacher, input_ids, report)
        tokens += input_ids.numel()
    return tokens


def mixer_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters of the converted layers, as `LAYER.NAME`."""
    pairs = zip(modeling.slots(model), model.config.mixers, strict=True)
    return {
        f"{layer}.{name}": parameter.data
        for layer, (slot, spec) in enumerate(pairs)
        if spec is not None
        for name, parameter in slot.named_parameters()
    }


def save_trained(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    stages: Sequence[Stage],
    ledger: Mapping[str, Any],
    out: Path,
) -> None:
    """Write a trained model into `out`, which may hold other files of the run.

    The first process gathers all weights and writes them; every process must call it.

    Args:
        checkpoint: what the model was loaded from; only its values change.
        model: the trained model.
        stages: the stages it went through, for the lineage.
        ledger: what they cost, for the lineage.
        out: the output folder.
    """
    # Gathering needs every process, also those that get nothing.
    weights = fsdp.gather_state_dict(model)
    if distributed.is_rank0():
        values = modeling.to_checkpoint_names(model, weights)
        write_trained(checkpoint, values, stages, ledger, out)
    distributed.barrier()


def write_trained(
    checkpoint: Checkpoint,
    values: Mapping[str, torch.Tensor],
    stages: Sequence[Stage],
    ledger: Mapping[str, Any],
    out: Path,
) -> None:
    """Write values by their names in the checkpoint as a model in `out`; see `save_trained`."""
    step = {
        "step": "Train",
        "arguments": {"stages": [dataclasses.asdict(stage) for stage in stages]},
        "ledger": ledger,
    }
    save_model(checkpoint.with_values(values, step), out / TRAINED, overwrite=True)
    publish_model(out / TRAINED, out)


def load_for_training(
    path: str,
    over: fsdp.DeviceMesh | None,
    layerwise: bool = False,
    allow_nonfinite: bool = False,
) -> PreTrainedModel:
    """The model at `path` on the device it is trained on.

    Args:
        path: a model's folder or name.
        over: load this process's shards over a mesh; None for the whole model.
        layerwise: see `fsdp.shard_model`.
        allow_nonfinite: take NaN and infinity.
    """
    if over is None:
        return modeling.load(path, allow_nonfinite=allow_nonfinite).to(distributed.device())
    checkpoint = Checkpoint.open(path, allow_nonfinite)
    # Asking for the path converts a GGUF file: one process does it while the others wait.
    distributed.on_rank0(lambda: str(checkpoint.path))
    distributed.on_rank0(checkpoint.verify)
    return fsdp.load_sharded(checkpoint, over, layerwise)


def load_stage_rows(
    data: Text,
    stage: Stage,
    tokenizer: Any,
    run_folder: Path | None = None,
    cache: Path | None = None,
    ticker: Ticker | None = None,
) -> Callable[[int], Data]:
    """Rows by length for a stage: of text, or the images of a .npz file.

    The arguments are those of `training_rows`.
    """
    if stage.kind == "image":
        images = read_images(data.path)
        return lambda length: images
    tell = ticker.update if ticker else lambda share, words: None
    return training_rows([data], tokenizer, stage.tokens, run_folder, cache, tell)


def load_heldout_rows(
    data: Text,
    path: str,
    stage: Stage,
    tokenizer: Any,
    run_folder: Path,
    cache: Path | None,
    ticker: Ticker,
) -> Rows:
    """All held-out rows at `path`, read like the training data; see `load_stage_rows`."""
    whole = dataclasses.replace(data, path=path, max_tokens=0)
    rows = load_stage_rows(whole, stage, tokenizer, run_folder, cache, ticker)
    return rows(stage.length)[:]


def load_teacher(
    teacher: str,
    keeping: TeacherCacheConfig | None,
    over: fsdp.DeviceMesh | None,
    allow_nonfinite: bool = False,
) -> Teacher:
    """The teacher; behind a cache it is loaded when a row is first missing."""
    load = functools.partial(
        load_for_training, over=over, layerwise=False, allow_nonfinite=allow_nonfinite
    )
    return CachedTeacher(teacher, keeping, load) if keeping else load(teacher)


def identify_models(model: str | Path, teacher: str | Path | None) -> dict[str, Identity]:
    """The identities of a run's models; the first process reads them for all."""
    paths = {"model": model, "teacher": teacher}
    return distributed.on_rank0(
        lambda: {name: identify_model(path) for name, path in paths.items() if path}
    )


def check_stage(
    checkpoint: Checkpoint,
    model: str,
    stage: Stage,
    teacher: str | None,
    keeping: TeacherCacheConfig | None,
) -> None:
    """RegraftError when a stage does not fit the model's family or positions, or has no outputs to
    cache.
    """
    family = checkpoint.config["model_type"]
    flops.count_positions(checkpoint, stage.length)
    if stage.kind in LAYERWISE and family != "regraft":
        raise RegraftError(
            f"{model} is a {family} model without mixers, which '{stage.kind}' is for: "
            "regraft linearize it first"
        )
    if keeping and (not teacher or stage.kind not in ("align", "distil")):
        raise RegraftError(
            f"stage '{stage.kind}' with teacher {teacher} has no outputs to keep: "
            "leave out the cache"
        )


def train_saved_model(
    model: str,
    out: str,
    data: Text,
    stage: Stage,
    teacher: str | None,
    seed: int,
    ticker: Ticker,
    heldout: str | None = None,
    watching: MonitorConfig = DEFAULT_MONITORING,
    cache: Path | None = None,
    keeping: TeacherCacheConfig | None = None,
    hybrid: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a saved model for one stage and write it to `out`.

    Called again with the same arguments after a kill, it resumes.

    RegraftError when `out` holds a finished model or anything that is not a run, and when the
    stage does not fit the model.

    Args:
        model: the model's folder or name.
        out: the output folder.
        data: text, or a .npz file of images.
        stage: what to train, and how long.
        teacher: the source model's folder or name, for stages that need it.
        seed: of the rows' order, masks and drops.
        ticker: shows the progress.
        heldout: path of held-out data, read like `data`.
        watching: trackers and the limit for loss spikes.
        cache: where tokens are stored for later runs; None for `out`, until the run ends.
        keeping: where the teacher's outputs are cached; None for no cache.
        hybrid: see `fsdp.build_mesh`.
        allow_nonfinite: take and write NaN and infinity.
        trust_remote_code: whether code of the tokenizer may be run.
        options: more fields of `loop.Run`.

    Returns:
        The ledger of `loop.train` with `text` (what was read), `summary` (of the stage, see
        `StageSummary`), `out` and, with a cache, `teacher_cache` (see `TeacherCacheUse`).
    """
    target = output.check_apart(out, [("model", model), ("teacher", teacher), ("cache", cache)])
    moments, keep_moments = options.get("moments"), options.get("keep_moments", False)
    if keeping:  # a folder that is not regraft's is refused before anything is read
        check_cache_folder(keeping.folder)

    def request() -> dict[str, Any]:
        return describe_request(
            model, data, teacher, seed, stage, heldout, moments, keep_moments=keep_moments
        )

    with open_run(target, "training", request) as marker:
        if marker.complete:
            result = marker.result
        else:
            result = train_in_folder(
                model, target, data, stage, teacher, seed, ticker, heldout, watching, cache,
                keeping, hybrid, allow_nonfinite, trust_remote_code, **options,
            )  # fmt: skip
    return {**result, "out": out}


def train_in_folder(
    model: str,
    target: Path,
    data: Text,
    stage: Stage,
    teacher: str | None,
    seed: int,
    ticker: Ticker,
    heldout: str | None,
    watching: MonitorConfig,
    cache: Path | None,
    keeping: TeacherCacheConfig | None,
    hybrid: bool,
    allow_nonfinite: bool,
    trust_remote_code: bool,
    **options: Any,
) -> dict[str, Any]:
    """Train in a claimed folder and say that it is complete; see `train_saved_model`."""
    ticker.start(f"reading {model}")
    checkpoint = Checkpoint.open(model, allow_nonfinite)
    check_stage(checkpoint, model, stage, teacher, keeping)
    data = begin_texts(data, needs_bos(checkpoint))
    inputs = identify_models(model, teacher)
    over = fsdp.build_mesh(hybrid) if distributed.world_size() > 1 else None
    student = load_for_training(model, over, stage.kind in LAYERWISE, allow_nonfinite)
    tokenizer = None
    if stage.kind != "image":
        tokenizer = modeling.load_tokenizer(model, trust_remote_code)
    guide = load_teacher(teacher, keeping, over, allow_nonfinite) if teacher else None
    # A cached teacher finds its own attention modules, when it has to run at all.
    slots = []
    if teacher and stage.kind in LAYERWISE and not keeping:
        slots = modeling.slots(guide, Checkpoint.open(teacher))

    ticker.start("reading data")
    text = target / TEXT
    rows = load_stage_rows(data, stage, tokenizer, text, cache, ticker)
    held = None
    if heldout:
        held = load_heldout_rows(data, heldout, stage, tokenizer, text / "heldout", cache, ticker)
    rows(stage.length)  # text is read and tokenized now, while the ticker says so

    ticker.start(stage.kind)
    facts = describe_run(model, data, teacher, seed, stage)
    cache_use = {}
    try:
        with watching.monitor(target, ticker, facts) as watchers:
            run = loop.Run(
                student, [stage], rows, target, guide, slots, seed=seed, heldout=held,
                inputs=inputs, **watchers, **options,
            )  # fmt: skip
            ledger = loop.train(run)
    finally:
        # Also when the run is stopped, so that the teacher's work is there when it is resumed.
        if isinstance(guide, CachedTeacher):
            cache_use = {"teacher_cache": guide.flush()}

    if isinstance(rows, TextMixture):
        ledger["text"] = rows.facts()
    save_trained(checkpoint, student, [stage], ledger, target)
    ledger |= {"summary": summarize_stages(target)} | cache_use
    distributed.on_rank0(lambda: finish_run(target, ledger))
    return ledger
