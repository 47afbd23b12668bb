"""`regraft train`: train a linearized or a stock model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RegraftError
from .verb import Outcome, Verb, check_apart, check_folders, check_unused_flags

if TYPE_CHECKING:
    from rich.console import Console

    from ..train.stage import Stage

# Arguments that are paths of what is read, or of what other runs may write to as well.
INPUTS = ("model", "teacher", "data", "heldout", "moments", "cache", "teacher_cache", "scratch")


def train(
    model: str,
    out: str,
    data: str | None = None,
    tokens: int = 0,
    stage: Literal["matrix", "align", "distil", "next", "mask", "image"] = "distil",
    teacher: str | None = None,
    length: int = 1024,
    batch: int = 1,
    micro: int = 0,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    checkpointing: bool = False,
    hybrid: bool = False,
    lr_new: float | None = None,
    lr_mixer: float | None = None,
    lr_body: float | None = None,
    layers: str = "all",
    learn: Literal["all", "new", "lit"] = "all",
    stage_options: dict[str, Any] | None = None,
    heldout: str | None = None,
    every: int = 0,
    moments: str | None = None,
    keep_moments: bool = False,
    save_seconds: float = 60.0,
    track: str | None = None,
    spike_factor: float = 1.5,
    teacher_cache: str | None = None,
    teacher_cache_size: str = "4GB",
    teacher_cache_kind: str = "hidden",
    stream: bool = False,
    scratch: str | None = None,
    calibration: int = 0,
    seed: int = 0,
    field: str = "text",
    overflow: Literal["carry", "cut"] = "carry",
    skip_bad: bool = False,
    bos: bool = False,
    max_tokens: int | None = None,
    max_line_bytes: int = 128_000_000,
    cache: str | None = None,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    json: bool = False,
) -> Outcome:
    """Train a linearized or a stock model, under torchrun on all its processes; the same command
    resumes.

    Args:
        model: model directory
        out: directory to write
        data: text (.txt, .jsonl, .parquet, also .gz .xz .zst; a pattern, a folder, a,b); for image
            a .npz file with pixel_values and labels
        tokens: how many tokens, for image how many images, to train on
        stage: matrix (softmax matrices of layers), align (layer outputs), distil (the teacher's
            distribution), next (next token), mask (masked tokens of an encoder) or image (the class
            of an image)
        teacher: the source, needed by align and distil
        length: tokens per row
        batch: rows per step, of all processes together
        micro: rows that go through the model at a time, 0 for all of a process; gradients add up,
            results do not change
        precision: of matrix products: float32, bfloat16, or auto (bfloat16 where this machine
            multiplies it faster)
        lr_new: learning rate of weights that the source does not have
        lr_mixer: learning rate of inherited weights inside mixers
        lr_body: learning rate of all other weights, 0 to freeze them; 3e-5, or 3e-4 for a model
            without mixers
        layers: all, bottom:N (the sub-model of the first N layers) or train:A-B (only these and the
            head learn)
        stage_options: rarer fields of the stage as JSON, in the words of a recipe's stage, such as
            {"mask_share": 0.15, "layer_drop": 0.1, "token_drop": 0.15, "lit": {"window": 100,
            "tau": 0.01, "warmup": 40}}
        learn: all; new (what was copied from the source stays frozen); lit (the same until the loss
            hardly falls)
        heldout: text or images to measure loss and accuracy on, before, after and every N steps
        every: this N, 0 for before and after alone
        moments: Adam's state to begin with, as grow --optimizer-state or --keep-moments wrote it
        save_seconds: time between checkpoints; the last two are kept until the model is written
        track: send the rows of metrics.jsonl to trackio, wandb or tensorboard too, or to a list of
            them
        spike_factor: stop when the loss stays above this many times its running median; 0: never
        teacher_cache: folder that keeps what the teacher says about rows, for later passes and runs
            (distil, align)
        teacher_cache_size: disk that the folder may take; what no longer fits is computed anew
        teacher_cache_kind: hidden (exact), hidden:bfloat16 (half the size) or topk:K (the K
            likeliest tokens)
        scratch: with --stream, a folder for hidden states; one in /dev/shm keeps them in memory
        calibration: with --stream, tokens for a closed-form start of the mixers, 0 for none
        seed: of the data order
        field: key or column that holds the text
        overflow: a document longer than its row is carried on in the next row, or cut
        max_tokens: tokens of the text to read at most, 0 for all (default: what is trained on, and
            at least 16.8 million)
        max_line_bytes: bytes that a line of text may have; longer ones cannot be read
        cache: folder that keeps the text's tokens for other runs
        checkpointing: recompute activations in the backward pass instead of keeping them
        hybrid: under torchrun on several machines: shard inside a machine, the same model on each
        keep_moments: write Adam's state as OUT/optimizer.safetensors
        stream: matrix and align layer by layer: two layers in memory, whatever the depth
        skip_bad: leave out lines of text that cannot be read, and count them
        bos: documents begin with the tokenizer's BOS token, in the place of their first, also what
            a row carries on of one; they do for models with sink_window
        allow_nonfinite: take and write NaN and infinity; lineage.json notes it
        trust_remote_code: run the Python files beside the tokenizer, if it needs them
        json: print one JSON object on standard output and nothing else
    """
    from pathlib import Path

    from ..data.text import Text
    from ..progress import Ticker
    from ..train import session, trackers
    from ..train.layerwise import session as layerwise
    from ..train.monitor import MonitorConfig

    given = locals()
    trackers.import_trackers(
        track
    )  # a tracker that is not installed is an error now, not after hours
    check_flags(given)
    check_apart(given, INPUTS)
    check_folders(given, ("cache", "teacher_cache", "scratch"))
    request = build_stage(given)
    text = Text(
        data or "",
        field=field,
        overflow=overflow,
        skip_bad=skip_bad,
        max_tokens=max_tokens,
        bos=bos,
        max_line_bytes=max_line_bytes,
    )
    monitor = MonitorConfig(track, spike_factor)
    cache_folder = Path(cache) if cache else None

    with Ticker() as ticker:
        if stream:
            result = layerwise.align_saved_model(
                model,
                out,
                text,
                request,
                teacher,
                seed,
                ticker,
                Path(scratch) if scratch else None,
                calibration,
                monitor,
                cache_folder,
                allow_nonfinite,
                trust_remote_code,
            )
        else:
            result = session.train_saved_model(
                model,
                out,
                text,
                request,
                teacher,
                seed,
                ticker,
                cache=cache_folder,
                heldout=heldout,
                every=every,
                moments=Path(moments) if moments else None,
                keep_moments=keep_moments,
                save_seconds=save_seconds,
                watching=monitor,
                micro=micro,
                checkpointing=checkpointing,
                hybrid=hybrid,
                allow_nonfinite=allow_nonfinite,
                trust_remote_code=trust_remote_code,
                keeping=build_teacher_cache(given),
            )
    return Outcome(result, lambda console: print_result(result, request, out, console))


def check_flags(given: Mapping[str, Any]) -> None:
    """RegraftError for flags that contradict each other or that nothing would read.

    Args:
        given: the verb's arguments by name.
    """
    if not given["data"] or given["tokens"] < 1:
        raise RegraftError(
            f"train needs --data PATH and --tokens N >= 1: got data {given['data']!r} and tokens "
            f"{given['tokens']}"
        )
    if given["every"] < 0 or (given["every"] and not given["heldout"]):
        raise RegraftError(
            f"--every {given['every']} measures held-out rows every so many steps: give N >= 0 and "
            "--heldout PATH"
        )
    if not given["stream"]:
        check_unused_flags(train, given, ("scratch", "calibration"), "give --stream as well")
        return

    # Layer by layer there is never a whole model to measure, resume Adam's state of, or split over
    # machines.
    whole_model = ("heldout", "moments", "keep_moments", "micro", "checkpointing", "hybrid")
    if any(given[name] for name in whole_model):
        raise RegraftError(
            f"--stream {given['stage']} holds no whole model: leave out --heldout, --moments, "
            "--keep-moments, --micro, --checkpointing and --hybrid"
        )
    if given["teacher_cache"]:
        raise RegraftError(
            "--stream runs each layer of the teacher once: leave out --teacher-cache "
            f"{given['teacher_cache']}"
        )


def build_stage(given: Mapping[str, Any]) -> Stage:
    """The stage that the flags describe; RegraftError for a value that no stage has."""
    from ..recipes.schema import build
    from ..train.stage import Stage

    rates = {name: given[name] for name in ("lr_new", "lr_mixer", "lr_body")}
    fields = {name: rate for name, rate in rates.items() if rate is not None}
    fields |= {name: given[name] for name in ("length", "batch", "layers", "precision", "learn")}
    fields |= {"kind": given["stage"], "tokens": given["tokens"]}
    options = given["stage_options"] or {}
    if twice := sorted(set(options) & {*fields, *rates}):
        flag = "--stage" if twice[0] == "kind" else f"--{twice[0].replace('_', '-')}"
        raise RegraftError(
            f"--stage-options has '{twice[0]}', which is a flag: give {flag} instead"
        )
    stage: Stage = build(fields | options, "--stage-options", Stage)
    return stage


def build_teacher_cache(given: Mapping[str, Any]) -> Any:
    """The TeacherCacheConfig that the flags ask for, None without `--teacher-cache`."""
    # No annotation: jsonargparse imports what this module imports for type checking, and that one
    # needs torch.
    from ..train.teacher_cache import TeacherCacheConfig

    if not given["teacher_cache"]:
        names = ("teacher_cache_size", "teacher_cache_kind")
        check_unused_flags(train, given, names, "give --teacher-cache DIR as well")
        return None
    return TeacherCacheConfig.parse(
        given["teacher_cache"], given["teacher_cache_size"], given["teacher_cache_kind"]
    )


def print_result(result: Mapping[str, Any], stage: Stage, out: str, console: Console) -> None:
    """The table of stages, what training cost, and what the cache of teacher outputs did."""
    from ..report import tables

    console.print(tables.training_table(result["summary"], result.get("start", ())))
    console.print(
        f"{result['tokens']:,} {stage.unit}, {result['flops']:.3g} FLOPs, "
        f"{result['seconds']:.0f} s; wrote {out}",
        soft_wrap=True,
        highlight=False,
    )
    if counts := result.get("teacher_cache"):
        line = (
            "teacher: {read:,} rows read, {computed:,} computed, {kept:,} kept, {refused:,} over"
            " the limit"
        )
        console.print(line.format(**counts), highlight=False)


VERB = Verb(
    train,
    examples=(
        (
            "regraft train LINEAR TRAINED --data text.jsonl --teacher SOURCE --stage distil"
            " --tokens 200000"
        ),
        (
            "regraft train GROWN TRAINED --data text.jsonl --stage next --tokens 200000 --heldout"
            " heldout.txt --every 50"
        ),
    ),
    sections={
        "data": (
            "data",
            "tokens",
            "length",
            "field",
            "overflow",
            "skip_bad",
            "bos",
            "max_tokens",
            "max_line_bytes",
            "cache",
        ),
        "stage": (
            "stage",
            "learn",
            "layers",
            "stage_options",
        ),
        "teacher": (
            "teacher",
            "teacher_cache",
            "teacher_cache_size",
            "teacher_cache_kind",
        ),
        "optimisation": (
            "batch",
            "micro",
            "lr_new",
            "lr_mixer",
            "lr_body",
            "precision",
            "checkpointing",
            "spike_factor",
            "moments",
            "seed",
        ),
        "held-out measurement": (
            "heldout",
            "every",
        ),
        "layer by layer": (
            "stream",
            "scratch",
            "calibration",
        ),
        "distributed": ("hybrid",),
        "output": (
            "keep_moments",
            "save_seconds",
            "track",
            "allow_nonfinite",
            "trust_remote_code",
            "json",
        ),
    },
    resumes=True,
    distributed=True,
)
