"""`regraft train`: train a linearized or a stock model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ..errors import RegraftError
from .outcome import Outcome, check_unused_flags

if TYPE_CHECKING:
    from rich.console import Console


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
    mask_share: float = 0.15,
    layers: str = "all",
    layer_drop: float = 0.0,
    token_drop: float = 0.0,
    learn: Literal["all", "new", "lit"] = "all",
    lit: dict[str, Any] | None = None,
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
    max_tokens: int | None = None,
    cache: str | None = None,
    json: bool = False,
) -> Outcome:
    """Train a linearized or a stock model, under torchrun on all its processes; the same command resumes.

    Args:
        model: model directory
        out: directory to write
        data: text (.txt, .jsonl, .parquet, also .gz .xz .zst; a pattern, a folder, a,b); for image a .npz file with
            pixel_values and labels
        tokens: how many tokens, for image how many images, to train on
        stage: matrix (softmax matrices of layers), align (layer outputs), distil (the teacher's distribution), next
            (next token), mask (masked tokens of an encoder) or image (the class of an image)
        teacher: the source, needed by align and distil
        length: tokens per row
        batch: rows per step, of all processes together
        micro: rows that go through the model at a time, 0 for all of a process; gradients add up, results do not change
        precision: of matrix products: float32, bfloat16, or auto (bfloat16 where this machine multiplies it faster)
        lr_new: learning rate of weights that the source does not have
        lr_mixer: learning rate of inherited weights inside mixers
        lr_body: learning rate of all other weights, 0 to freeze them; 3e-5, or 3e-4 for a model without mixers
        mask_share: share of the tokens that mask hides
        layers: all, bottom:N (the sub-model of the first N layers) or train:A-B (only these and the head learn)
        layer_drop: largest probability that a layer is left out of a step
        token_drop: share of the tokens that skip the middle layers
        learn: all; new (what was copied from the source stays frozen); lit (the same until the loss hardly falls)
        lit: when it hardly falls, as JSON: {"window": 100, "tau": 0.01, "patience": 1, "warmup": 40, "max_steps": 500}
        heldout: text or images to measure loss and accuracy on, before, after and every N steps
        every: this N, 0 for before and after alone
        moments: Adam's state to begin with, as grow --optimizer-state or --keep-moments wrote it
        save_seconds: time between checkpoints; the last two are kept until the model is written
        track: send the rows of metrics.jsonl to trackio, wandb or tensorboard too, or to a list of them
        spike_factor: stop when the loss stays above this many times its running median; 0: never
        teacher_cache: folder that keeps what the teacher says about rows, for later passes and runs (distil, align)
        teacher_cache_size: disk that the folder may take; what no longer fits is computed anew
        teacher_cache_kind: hidden (exact), hidden:bfloat16 (half the size) or topk:K (the K likeliest tokens)
        scratch: with --stream, a folder for hidden states; one in /dev/shm keeps them in memory
        calibration: with --stream, tokens for a closed-form start of the mixers, 0 for none
        seed: of the data order
        field: key or column that holds the text
        overflow: a document longer than its row is carried on in the next row, or cut
        max_tokens: tokens of the text to read at most, 0 for all (default: what is trained on, and at least 16.8 million)
        cache: folder that keeps the text's tokens for other runs
    """
    from pathlib import Path

    from ..progress import Ticker
    from ..recipes import schema as settings
    from ..report import tables
    from ..train import session, trackers
    from ..train.layerwise import session as layerwise
    from ..train.lit import Lit
    from ..train.monitor import MonitorConfig
    from ..train.stage import Stage
    from ..train.teacher_cache import TeacherCacheConfig

    trackers.import_trackers(track)

    if not data or tokens < 1:
        raise RegraftError(
            f"train needs --data PATH and --tokens N >= 1: got data {data!r} and tokens {tokens}"
        )
    if every < 0 or (every and not heldout):
        raise RegraftError(
            f"--every {every} measures held-out rows every so many steps: give N >= 0 and --heldout PATH"
        )
    rates: dict[str, Any] = {"lr_new": lr_new, "lr_mixer": lr_mixer, "lr_body": lr_body}
    rates = {key: rate for key, rate in rates.items() if rate is not None}
    rates |= {
        "mask_share": mask_share,
        "layers": layers,
        "layer_drop": layer_drop,
        "token_drop": token_drop,
    }
    rates |= {
        "precision": precision,
        "learn": learn,
        "lit": settings.build(lit or {}, "--lit", Lit),
    }
    asked = Stage(stage, tokens, length, batch, **rates)
    begun = Path(moments) if moments else None
    text = settings.Text(
        data, field=field, overflow=overflow, skip_bad=skip_bad, max_tokens=max_tokens
    )
    options: dict[str, Any] = {
        "heldout": heldout,
        "every": every,
        "moments": begun,
        "keep_moments": keep_moments,
    }
    options |= {"save_seconds": save_seconds, "watching": MonitorConfig(track, spike_factor)}
    kept = Path(cache) if cache else None
    options |= {"micro": micro, "checkpointing": checkpointing, "hybrid": hybrid}
    if not stream and (scratch or calibration):
        raise RegraftError(
            f"--scratch {scratch} and --calibration {calibration} are for --stream: add it, or omit them"
        )
    if stream and (heldout or moments or keep_moments or micro or checkpointing or hybrid):
        raise RegraftError(
            f"--stream {stage} holds no whole model: leave out --heldout, --moments, --keep-moments, --micro, "
            "--checkpointing and --hybrid"
        )
    if stream and teacher_cache:
        raise RegraftError(
            f"--stream runs each layer of the teacher once: leave out --teacher-cache {teacher_cache}"
        )
    if teacher_cache:
        options["keeping"] = TeacherCacheConfig.parse(
            teacher_cache, teacher_cache_size, teacher_cache_kind
        )
    else:
        check_unused_flags(
            train,
            locals(),
            ("teacher_cache_size", "teacher_cache_kind"),
            "give --teacher-cache DIR as well",
        )
    with Ticker() as ticker:
        if stream:
            place, watching = Path(scratch) if scratch else None, options["watching"]
            result = layerwise.align_saved_model(
                model, out, text, asked, teacher, seed, ticker, place, calibration, watching, kept
            )
        else:
            result = session.train_saved_model(
                model, out, text, asked, teacher, seed, ticker, cache=kept, **options
            )

    def show(console: Console) -> None:
        console.print(tables.training_table(result["summary"], result.get("start", ())))
        console.print(
            f"{result['tokens']:,} {asked.unit}, {result['flops']:.3g} FLOPs, {result['seconds']:.0f} s; wrote {out}",
            soft_wrap=True,
            highlight=False,
        )
        if kept := result.get("teacher_cache"):
            said = "teacher: {read:,} rows read, {computed:,} computed, {kept:,} kept, {refused:,} found no room"
            console.print(said.format(**kept), highlight=False)

    return Outcome(result, show)
