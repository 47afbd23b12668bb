"""`regraft linearize`: softmax attention replaced by linear-cost mixers, trained where text is
given.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RegraftError
from .verb import (
    Outcome,
    Verb,
    check_apart,
    check_folders,
    describe_request,
    format_check,
    name_method,
    remix_changes,
)

if TYPE_CHECKING:
    from rich.console import Console

INPUTS = ("source", "data")  # arguments that are paths of what is read


def linearize(
    source: str,
    out: str,
    method: str | None = None,
    mixer: str | None = None,
    keep: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    inherit: str | None = None,
    for_: str | None = None,
    data: str | None = None,
    tokens: int = 0,
    length: int = 1024,
    batch: int = 1,
    track: str | None = None,
    spike_factor: float = 1.5,
    field: str = "text",
    overflow: Literal["carry", "cut"] = "carry",
    skip_bad: bool = False,
    max_tokens: int | None = None,
    max_line_bytes: int = 128_000_000,
    cache: str | None = None,
    copy_code: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    json: bool = False,
) -> Outcome:
    """Replace attention layers by linear-cost mixers and save the model; with --data and --tokens
    train it too.

    Args:
        source: model directory, GGUF file, or name on the hub (ORG/MODEL, ORG/MODEL@REVISION)
        out: directory to write; a training that was stopped goes on with the same command
        method: a published method, or auto (ours), which is taken where none is given: aligned,
            auto, hypenet, liger, lolcats, mambainllama, mohawk, radlads, supra, supra_fitted, t2r,
            taylor or xatl; the flags below override its settings; --for takes aligned for forms
            without a window
        mixer: the token mixer: gated_deltanet, gla, hedgehog, lightning, lolcats, mamba, mamba2,
            retnet, rwkv6, sink_window, supra, t2r or window
        keep: layers that keep softmax attention: every:N, a list such as 0,7,14, all, none, or
            chosen by measurement: bypass, halo, recall or restore with a number or share of layers,
            such as restore:8 or recall:25%, which auto has where --data is given (every:4
            otherwise)
        window: width of the gated window branch, 0 for the linear mixer alone
        sinks: first tokens that the window always sees
        seed: of fresh weights and of the data order
        options: the mixer's own options as JSON, such as {"grouped": false}
        inherit: projections of the source's attention that mixers copy: all, none, or a list such
            as v,o
        for_: make what this target of `regraft export` can hold, such as granite_swa: it chooses
            the mixer and the window, and refuses what cannot be held; with --data the closed form
            is taken, whatever --tokens says
        data: text to choose layers and to train on (.txt, .jsonl, .parquet, also .gz .xz .zst; a
            pattern, a folder)
        tokens: how many to train on, over all stages of the method; 0 converts only
        length: tokens per row
        batch: rows per step
        track: send the rows of metrics.jsonl to trackio, wandb or tensorboard too, or to a list of
            them
        spike_factor: stop when the loss stays above this many times its running median; 0: never
        field: key or column that holds the text
        overflow: a document longer than its row is carried on in the next row, or cut
        max_tokens: tokens of the text to read at most, 0 for all (default: what is trained on, and
            at least 16.8 million)
        max_line_bytes: bytes that a line of text may have; longer ones cannot be read
        cache: folder that keeps the text's tokens for other runs
        skip_bad: leave out lines of text that cannot be read, and count them
        copy_code: also copy Python files beside the weights, which regraft never runs; without them
            auto_map is left out
        overwrite: replace the output if it exists
        allow_nonfinite: take and write NaN and infinity; lineage.json notes it
        trust_remote_code: run the Python files beside model and tokenizer, if they need them
        json: print one JSON object on standard output and nothing else
    """
    from .. import distributed
    from ..core.checkpoint import Checkpoint
    from ..core.custom_code import run_custom_code
    from ..data.text import Text
    from ..evaluation import baselines
    from ..io import shard_writer
    from ..linearize import methods, pipeline
    from ..mixers.registry import mixer_class
    from ..modeling.reopen import save_model
    from ..plan.plan import Plan, print_plan
    from ..progress import Ticker
    from ..report import tables
    from ..train import monitor, session, trackers
    from ..train.output import open_scratch

    given = locals()
    trackers.import_trackers(
        track
    )  # a tracker that is not installed is an error now, not after hours
    if tokens < 0 or (tokens and not data):
        raise RegraftError(
            f"--tokens {tokens} are trained on text: give --data PATH and 0 or more tokens"
        )

    target, done = check_apart(given, (*INPUTS, "cache")), False
    check_folders(given, ("cache",))
    request, runs = None, bool(tokens or (for_ and data))
    if not runs:  # a run that trains looks after its output itself
        ignored = ("track", "cache")
        request = distributed.on_rank0(lambda: describe_request(linearize, given, INPUTS, ignored))
        done = distributed.on_rank0(lambda: shard_writer.check_target(out, overwrite, request))

    # The method as published or as ours, then what the flags change of it.
    copy_code = run_custom_code(source, trust_remote_code) or copy_code
    before = replace(Checkpoint.open(source, allow_nonfinite), copy_code=copy_code)
    changes = remix_changes(given)
    name = name_method(method, for_)
    recipe, notes = methods.find_method(name).with_remix(seed=seed, **changes), list[str]()
    if for_:
        names = ("method", "mixer", "window", "sinks", "options")
        flags = [f"--{one}" for one in names if given[one] is not None]
        pipeline.check_target(before, recipe.remix, for_, flags)
    text = None
    if data:
        text = Text(
            data,
            field=field,
            overflow=overflow,
            skip_bad=skip_bad,
            max_tokens=max_tokens,
            max_line_bytes=max_line_bytes,
        )
    else:
        recipe, notes = recipe.without_text()  # layers cannot be measured without text

    ledger = None
    cache_folder = Path(cache) if cache else None
    with Ticker() as ticker:
        if text and runs:
            remix, ledger = pipeline.run_method(
                before,
                recipe,
                target,
                text,
                recipe.stages(tokens, length, batch) if tokens else (),
                seed,
                ticker,
                overwrite,
                monitor.MonitorConfig(track, spike_factor),
                cache_folder,
                trust_remote_code,
                length,
            )
            ledger |= {"summary": monitor.summarize_stages(out)}
            after = remix(before)
        elif done:
            made = baselines.remix_of(Checkpoint.open(out))
            assert made is not None
            after = made(before)
        else:
            with open_scratch(target) as scratch:
                rows = None
                if text:
                    rows = pipeline.text_rows(
                        before,
                        session.begin_texts(text, mixer_class(recipe.remix.mixer).begins_with_bos),
                        ticker,
                        own=scratch,
                        cache=cache_folder,
                        trust_remote_code=trust_remote_code,
                    )
                remix = distributed.on_rank0(
                    lambda: pipeline.choose_layers(
                        before, recipe.remix, rows, ticker, trust_remote_code
                    )
                )
            after = remix(before)
            distributed.on_rank0(
                lambda: save_model(after, out, overwrite=overwrite, request=request)
            )
            notes += pipeline.note_untrained(after, out)
    plan = Plan.of(before, after, notes=notes)

    def show(console: Console) -> None:
        print_plan(plan, console)
        if ledger:
            console.print(tables.training_table(ledger["summary"], ledger["start"]))
        following = (
            f"regraft eval {out} --baseline {source}" if ledger else format_check(source, out)
        )
        if for_:
            following += f"; regraft export {out} SERVED --to {for_}"
        wrote = f"{out} is there already" if done else f"Wrote {out}"
        console.print(f"{wrote}. Next: {following}", soft_wrap=True, highlight=False)

    return Outcome(plan.to_dict() | {"out": out, "method": name, "ledger": ledger}, show)


VERB = Verb(
    linearize,
    examples=(
        "regraft linearize SOURCE OUT --mixer gated_deltanet --keep every:4 --window 64 --sinks 4",
        "regraft linearize SOURCE OUT --data text.jsonl --tokens 200000",
    ),
    sections={
        "method": (
            "method",
            "mixer",
            "keep",
            "window",
            "sinks",
            "options",
            "inherit",
            "for_",
            "seed",
        ),
        "data": (
            "data",
            "field",
            "overflow",
            "skip_bad",
            "max_tokens",
            "max_line_bytes",
            "cache",
        ),
        "training": (
            "tokens",
            "length",
            "batch",
            "spike_factor",
            "track",
        ),
        "output": (
            "copy_code",
            "overwrite",
            "allow_nonfinite",
            "trust_remote_code",
            "json",
        ),
    },
    pushes=True,
    resumes=True,
    distributed=True,
)
