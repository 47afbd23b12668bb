"""Verbs that plan, make and prove a model; heavy imports happen inside, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RegraftError
from .outcome import Outcome

if TYPE_CHECKING:
    from rich.console import Console


def grow(
    source: str,
    out: str,
    hidden: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: int | None = None,
    to: str | None = None,
    how: str = "pad",
    depth_how: str = "identity",
    fold: Literal["auto", "stream", "eps"] = "auto",
    noise: float | None = None,
    dtype: str | None = None,
    optimizer_state: str | None = None,
    data: str | None = None,
    fit: dict[str, Any] | None = None,
    seed: int = 0,
    field: str = "text",
    skip_bad: bool = False,
    bridge: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> Outcome:
    """Grow a model wider or deeper without changing what it computes, and save it as a stock model.

    Args:
        source: model directory or GGUF file
        out: directory to write; after a kill the same command goes on
        hidden: width of the residual stream
        ffn: neurons of every MLP
        heads: query heads
        kv_heads: key/value heads
        head_dim: width of a head
        layers: number of layers
        to: a directory whose config.json gives all sizes
        how: width operator, or one each (hidden=tile,ffn=pad): pad, zero_in, pair, split, tile, duplicate, aki, lemon;
            copy starts all that is new at random; auto takes what trained best in our comparison, exact or not; ligo
            learns width and depth from --data
        depth_how: identity, llama_pro, stack, gstack, interpolate, midas, upscale or mslt
        fold: how norms keep their mean square over a padded stream
        noise: spread of the noise that separates copies, relative to a tensor's own; 0 for none
        dtype: store in float32, bfloat16, float16 or float64 (default: as the source)
        optimizer_state: safetensors with exp_avg/NAME, exp_avg_sq/NAME: grown into OUT/optimizer.safetensors
        data: for --how ligo: text (.txt, .jsonl, .parquet, also .gz .xz .zst; a folder), or .npz images
        fit: for --how ligo: its options as JSON, such as {"steps": 100, "reads": "inverse", "batch": 16, "length": 256}
        seed: of fresh weights
        field: for --how ligo: key or column that holds the text
    """
    import shutil

    from .. import distributed
    from ..checks import growth as parity
    from ..core.checkpoint import Checkpoint
    from ..data.corpus import Text
    from ..growth import optimizer_state as moments
    from ..growth.sizes_to_steps import LEARNED, Growth
    from ..plan import plan as planning
    from ..progress import Ticker
    from ..train import fit_ligo

    if Path(out).resolve() == Path(source).resolve():
        raise RegraftError(f"'{out}' is the source, which the result is checked against: choose another output")
    before = Checkpoint.open(source)
    sizes = (hidden, ffn, heads, kv_heads, head_dim, layers)
    growth = Growth(*sizes, to, how, depth_how, fold, noise, bridge, dtype, seed)
    if how != LEARNED and (data or fit):
        raise RegraftError(f"--data and --fit are for --how ligo, not {how}: leave them out")
    after = growth(before)
    made = planning.Plan.of(before, after)
    print(f"regraft: {made.forecast()}", file=sys.stderr)
    maps = Path(out).resolve().parent / f".{Path(out).resolve().name}.fitting"
    with Ticker() as ticker:
        if how == LEARNED:
            text = Text(data, field=field, skip_bad=skip_bad) if data else None
            after = growth(before, fit_ligo.fitted(before, growth, text, fit or {}, ticker, maps))
        ticker.start(f"writing {out}")
        if optimizer_state:
            if bridge:
                raise RegraftError(f"--optimizer-state '{optimizer_state}' has no law across --bridge: leave one out")
            moments.read(before, Path(optimizer_state))
        grown = after

        def write() -> dict[str, Any] | None:
            grown.save(out, overwrite=overwrite)
            shutil.rmtree(maps, ignore_errors=True)
            if optimizer_state:
                moments.grow(before, growth.steps(before), optimizer_state, out)
            return None if growth.exact(before) else parity.step0(source, out)

        step0 = distributed.once(write)

    def show(console: Console) -> None:
        planning.render(made, console)
        if step0:
            console.print(parity.told(step0), soft_wrap=True, highlight=False)
        console.print(f"Wrote {out}. Next: regraft check {source} {out}", soft_wrap=True, highlight=False)

    return Outcome(made.json() | {"out": out, "step0": step0}, show)


def linearize(
    source: str,
    out: str,
    method: str = "auto",
    mixer: str | None = None,
    keep: str | None = None,
    window: int | None = None,
    sinks: int | None = None,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    inherit: str | None = None,
    data: str | None = None,
    tokens: int = 0,
    length: int = 1024,
    batch: int = 1,
    track: str | None = None,
    jump: float = 1.5,
    field: str = "text",
    long: Literal["carry", "cut"] = "carry",
    skip_bad: bool = False,
    read: int | None = None,
    cache: str | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> Outcome:
    """Replace attention layers by linear-cost mixers and save the model; with --data and --tokens train it too.

    Args:
        source: model directory or GGUF file
        out: directory to write; a training that was stopped goes on with the same command
        method: a published way, or auto, ours (an unknown name lists them); the flags below change what it says
        mixer: the token mixer, such as gated_deltanet, gla, retnet or window; README.md has the list
        keep: layers that keep softmax attention: every:N, a list such as 0,7,14, all, none, or chosen by measurement:
            bypass, halo, recall or restore with a number or share of layers, such as restore:8 or recall:25%, which
            auto has where --data is given (every:4 otherwise)
        window: width of the gated window branch, 0 for the linear mixer alone
        sinks: first tokens that the window always sees
        seed: of fresh weights and of the data order
        options: the mixer's own options as JSON, such as {"grouped": false}
        inherit: projections of the source's attention that mixers copy: all, none, or a list such as v,o
        data: text to choose layers and to train on (.txt, .jsonl, .parquet, also .gz .xz .zst; a pattern, a folder)
        tokens: how many to train on, over all stages of the method; 0 converts only
        length: tokens per row
        batch: rows per step
        track: send the rows of metrics.jsonl to trackio, wandb or tensorboard too, or to a list of them
        jump: stop when the loss stays above so many times the usual one; 0 goes on regardless
        field: key or column that holds the text
        long: a document longer than its row is carried on in the next row, or cut
        read: tokens of the text to read at most, 0 for all (default: what is trained on, and at least 16.8 million)
        cache: folder that keeps the text's tokens for other runs
    """
    from .. import distributed
    from ..core.checkpoint import Checkpoint
    from ..data.corpus import Text
    from ..linearize import methods, pipeline
    from ..plan import plan as planning
    from ..progress import Ticker
    from ..report import tables
    from ..train import monitor, trackers

    trackers.chosen(track)
    if tokens < 0 or (tokens and not data):
        raise RegraftError(f"--tokens {tokens} are trained on text: give --data PATH and 0 or more tokens")
    before = Checkpoint.open(source)
    flags = {"mixer": mixer, "keep": keep, "window": window, "sinks": sinks, "options": options, "inherit": inherit}
    way, notes = methods.find(method).changed(seed=seed, **flags), list[str]()
    if not data:
        way, notes = way.untold()
    stages = way.stages(tokens, length, batch) if tokens else []
    ledger = None
    text = Text(data, field=field, long=long, skip_bad=skip_bad, read=read) if data else None
    kept = Path(cache) if cache else None
    with Ticker() as ticker:
        if tokens and text:
            watched = monitor.Watching(track, jump)
            remix, ledger = pipeline.carry_out(
                before, way, Path(out), text, stages, seed, ticker, overwrite, watched, kept
            )
            ledger |= {"summary": monitor.summary(out)}
            after = remix(before)
        else:
            rows = pipeline.text_rows(before, text, ticker, cache=kept) if text else None
            remix = distributed.once(lambda: pipeline.converted(before, way.remix, rows, ticker))
            after = remix(before)
            distributed.once(lambda: after.save(out, overwrite=overwrite))
    made = planning.Plan.of(before, after, notes=notes)

    def show(console: Console) -> None:
        planning.render(made, console)
        if ledger:
            console.print(tables.training(ledger["summary"], ledger["start"]))
        following = f"regraft eval {out} --baseline {source}" if ledger else f"regraft check {source} {out}"
        console.print(f"Wrote {out}. Next: {following}", soft_wrap=True, highlight=False)

    return Outcome(made.json() | {"out": out, "method": method, "ledger": ledger}, show)


def receipts(source: str, out: str, json: bool = False) -> Outcome:
    """Receipts: every tensor accounted for, step-0 difference, parallel against recurrent; exit 1 if one does not hold.

    Args:
        source: the model that was changed
        out: what came of it
    """
    from ..checks import check as proofs

    found = proofs.check(source, out)
    return Outcome(found, lambda console: proofs.render(found, console), 0 if found["holds"] else 1)
