"""`regraft grow`: a wider or deeper model that computes the same function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import RegraftError
from .verb import Outcome, Verb, build_growth, check_apart, describe_request, format_check

if TYPE_CHECKING:
    from rich.console import Console

INPUTS = (
    "source",
    "to",
    "data",
    "optimizer_state",
    "add_tokens",
)  # arguments that are paths of what is read


def grow(
    source: str,
    out: str,
    hidden: int | None = None,
    ffn: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    layers: int | None = None,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    tower: str | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    vocab: int | None = None,
    add_tokens: str | None = None,
    to: str | None = None,
    width_init: str = "pad",
    depth_init: str = "identity",
    fold: Literal["auto", "stream", "eps"] = "auto",
    noise: float | None = None,
    dtype: str | None = None,
    optimizer_state: str | None = None,
    data: str | None = None,
    fit: dict[str, Any] | None = None,
    seed: int = 0,
    field: str = "text",
    skip_bad: bool = False,
    max_line_bytes: int = 128_000_000,
    bridge: bool = False,
    untie: bool = False,
    vocab_init: Literal["pieces", "mean", "zero"] = "pieces",
    expert_noise: float = 0.0,
    expert_reinit: float = 0.0,
    adopt: str | None = None,
    copy_code: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    trust_remote_code: bool = False,
    json: bool = False,
) -> Outcome:
    """Grow a model wider or deeper without changing what it computes, and save it as a stock model.

    Args:
        source: model directory, GGUF file, or name on the hub (ORG/MODEL, ORG/MODEL@REVISION)
        out: directory to write; after a kill the same command goes on
        hidden: width of the residual stream
        ffn: neurons of every MLP
        heads: query heads
        kv_heads: key/value heads
        head_dim: width of a head
        layers: number of layers; of an encoder and a decoder that are equally deep, of both
        encoder_layers: number of layers of the encoder in front of a decoder
        decoder_layers: number of layers of the decoder behind an encoder
        tower: text or vision, of a model with a tower for each (CLIP, SigLIP): which one grows;
            without it both, where they are equally large
        experts: experts in place of the MLP, in the stock class that has them; of a model with
            experts a multiple of their number
        top_k: experts that a token goes to (default: 2; of a model with experts as many times more)
        vocab: rows of the vocabulary, for padding that kernels want
        add_tokens: tokens that tokenizer and embeddings get: a file with one a line, or a .json
            list
        to: a directory whose config.json says what to grow to: all sizes, and the other settings
            where that keeps the function; what would change it is refused by name. The dtype is
            --dtype's
        width_init: width operator, or one each (hidden=tile,ffn=pad): pad, zero_in, pair, split,
            tile, duplicate, aki, lemon; copy starts all that is new at random; auto takes what
            trained best in our comparison, exact or not; ligo learns width and depth from --data
        depth_init: identity, llama_pro, stack, gstack, interpolate, midas, upscale or mslt
        fold: how norms keep their mean square over a padded stream
        noise: spread of the noise that separates copies, relative to a tensor's own; 0 for none
        dtype: store in float32, bfloat16, float16 or float64 (default: as the source)
        optimizer_state: safetensors with exp_avg/NAME, exp_avg_sq/NAME: grown into
            OUT/optimizer.safetensors
        data: for --width-init ligo: text (.txt, .jsonl, .parquet, also .gz .xz .zst; a folder), or
            .npz images
        fit: for --width-init ligo: its options as JSON, such as {"steps": 100, "reads": "inverse",
            "batch": 16, "length": 256}
        seed: of fresh weights
        field: for --width-init ligo: key or column that holds the text
        skip_bad: leave out lines of text that cannot be read, and count them
        max_line_bytes: bytes that a line of text may have; longer ones cannot be read
        bridge: write the model as another class where its own cannot hold the sizes
        untie: give the model an output embedding of its own, a copy of the input embedding
        vocab_init: what new rows of the vocabulary hold: the mean of the rows of the pieces that a
            token replaces (padding: of all rows), the mean of all, or zero
        expert_noise: spread of noise on experts, relative to a tensor's own, which is not exact
        expert_reinit: share of every expert's neurons that are drawn anew (Drop-Upcycling), which
            is not exact
        adopt: keys of --to, such as rope_theta,rms_norm_eps, or all, that are taken although the
            function changes
        copy_code: also copy Python files beside the weights, which regraft never runs; without them
            auto_map is left out
        overwrite: replace the output if it exists
        allow_nonfinite: take and write NaN and infinity; lineage.json notes it
        trust_remote_code: run the Python files beside the model, if its classes are there, and for
            --width-init ligo those of the tokenizer
        json: print one JSON object on standard output and nothing else
    """
    from .. import distributed
    from ..checks import growth as parity
    from ..checks.outputs import steps_between
    from ..core.checkpoint import Checkpoint
    from ..core.custom_code import run_custom_code
    from ..core.moments import FILE as MOMENTS_FILE
    from ..data.text import Text
    from ..growth import optimizer_state as moments
    from ..growth.sizes_to_steps import LEARNED
    from ..io import output, shard_writer
    from ..io.shard_writer import ExtraFile
    from ..modeling.reopen import save_model
    from ..plan.plan import Plan, print_plan
    from ..progress import Ticker, print_line
    from ..train import fit_ligo
    from ..train.output import open_scratch

    given = locals()
    check_flags(given)
    target = check_apart(given, INPUTS)
    request = distributed.on_rank0(lambda: describe_request(grow, given, INPUTS))
    done = distributed.on_rank0(lambda: shard_writer.check_target(out, overwrite, request))
    copy_code = run_custom_code(source, trust_remote_code) or copy_code
    before = replace(Checkpoint.open(source, allow_nonfinite), copy_code=copy_code)
    growth = build_growth(given)
    if optimizer_state:
        # A wrong file is an error before any work.
        moments.check_growable(before, growth.steps(before), Path(optimizer_state))

    # What the growth will cost, before it begins. For LiGO this is the start that its maps are
    # fitted from.
    grown = growth(before)
    exact = parity.is_exact(steps_between(before, grown))
    plan = Plan.of(before, grown)
    print_line(plan.format_cost())

    # Fitted maps lie beside the output until it is written, so that a run after a kill resumes from
    # them.
    maps = output.sibling_path(target, "regraft-fitting", fit_ligo.KIND)
    extra_files = {}
    if optimizer_state:
        extra_files[MOMENTS_FILE] = ExtraFile(
            optimizer_state,
            lambda file: moments.grow_optimizer_state(
                before, growth.steps(before), optimizer_state, file
            ),
        )

    with Ticker() as ticker:
        if width_init == LEARNED and not done:
            text = None
            if data:
                text = Text(data, field=field, skip_bad=skip_bad, max_line_bytes=max_line_bytes)
            with open_scratch(target) as scratch:
                fitted = fit_ligo.fit_from_options(
                    before, growth, text, fit or {}, ticker, maps, scratch, trust_remote_code
                )
            grown = growth(before, fitted)
        ticker.start(f"writing {out}")

        def write() -> parity.Step0 | None:
            if not done:
                save_model(
                    grown, out, overwrite=overwrite, extra_files=extra_files, request=request
                )
            output.remove_output(maps)
            if maps.is_dir():  # a call that was killed at its very end
                output.release_folder(maps, is_new=True)
            if exact or allow_nonfinite:  # NaN has no difference to measure
                return None
            return parity.measure_step0(source, out)

        step0 = distributed.on_rank0(write)

    def show(console: Console) -> None:
        print_plan(plan, console)
        if step0:
            console.print(parity.format_step0(step0), soft_wrap=True, highlight=False)
        wrote = f"{out} is there already" if done else f"Wrote {out}"
        following = f"{wrote}. Next: {format_check(source, out)}"
        console.print(following, soft_wrap=True, highlight=False)

    return Outcome(plan.to_dict() | {"out": out, "step0": step0}, show)


def check_flags(given: Mapping[str, Any]) -> None:
    """RegraftError for flags that contradict each other.

    Args:
        given: the verb's arguments by name.
    """
    width_init = given["width_init"]
    if width_init != "ligo" and (given["data"] or given["fit"]):
        raise RegraftError(
            f"--data and --fit are for --width-init ligo, not {width_init}: leave them out"
        )
    if given["optimizer_state"] and given["bridge"]:
        raise RegraftError(
            f"--optimizer-state '{given['optimizer_state']}' has no law across --bridge: leave"
            " one out"
        )


VERB = Verb(
    grow,
    examples=(
        "regraft grow SOURCE OUT --hidden 768 --ffn 2048 --layers 36",
        "regraft grow SOURCE OUT --hidden 1152 --width-init tile --depth-init stack --layers 60",
    ),
    sections={
        "sizes": (
            "hidden",
            "ffn",
            "heads",
            "kv_heads",
            "head_dim",
            "layers",
            "encoder_layers",
            "decoder_layers",
            "tower",
            "experts",
            "top_k",
            "vocab",
            "add_tokens",
            "to",
        ),
        "method": (
            "width_init",
            "depth_init",
            "fold",
            "noise",
            "bridge",
            "untie",
            "vocab_init",
            "expert_noise",
            "expert_reinit",
            "adopt",
            "seed",
        ),
        "LiGO": (
            "data",
            "fit",
            "field",
            "skip_bad",
            "max_line_bytes",
        ),
        "output": (
            "dtype",
            "optimizer_state",
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
