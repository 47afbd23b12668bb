"""`regraft convert`: any source as a plain Hugging Face directory with safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .verb import Outcome, Verb, check_apart, describe_request

if TYPE_CHECKING:
    from rich.console import Console


def convert(
    source: str,
    out: str,
    part: Literal["text"] | None = None,
    dtype: str | None = None,
    copy_code: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    json: bool = False,
) -> Outcome:
    """Write a model as a plain Hugging Face directory: safetensors, dequantised, an adapter merged.

    Pickled weights (.bin) are read here alone, as tensors and nothing else.

    Args:
        source: model directory, GGUF file, or name on the hub (ORG/MODEL, ORG/MODEL@REVISION)
        out: directory to write
        part: text: the language model of a multimodal model alone, as the stock class of its own
        dtype: store in float32, bfloat16, float16 or float64 (default: as the source; that of a
            quantised model is the one before quantisation); not for .bin files, which stay as they
            are
        copy_code: also copy Python files beside the weights, which regraft never runs
        overwrite: replace the output if it exists
        allow_nonfinite: take and write NaN and infinity; lineage.json notes it
        json: print one JSON object on standard output and nothing else
    """
    from dataclasses import replace
    from pathlib import Path

    from ..core import pickles
    from ..core.checkpoint import Checkpoint
    from ..growth.sizes_to_steps import cast_checkpoint
    from ..growth.steps.take_text import TakeText
    from ..io import shard_writer
    from ..modeling.reopen import save_model
    from ..progress import Ticker
    from .verb import check_unused_flags

    given = locals()
    check_apart(given, ("source",))
    found = pickles.find_pickles(Path(source))
    if found:
        names = ("part", "dtype", "copy_code", "allow_nonfinite")
        check_unused_flags(convert, given, names, ".bin files are written as they are")
    request = describe_request(convert, given, () if found else ("source",))
    done = shard_writer.check_target(out, overwrite, request)
    with Ticker() as ticker:
        ticker.start(f"writing {out}")
        if found and not done:
            pickles.convert_pickles(Path(source), Path(out), overwrite, request, ticker.update)
        elif not done:
            checkpoint = replace(Checkpoint.open(source, allow_nonfinite), copy_code=copy_code)
            checkpoint = TakeText()(checkpoint) if part else checkpoint
            checkpoint = cast_checkpoint(checkpoint, dtype) if dtype else checkpoint
            save_model(checkpoint, out, overwrite=overwrite, request=request)

    def show(console: Console) -> None:
        wrote = f"{out} is there already" if done else f"Wrote {out}"
        console.print(wrote, soft_wrap=True, highlight=False)

    return Outcome({"out": out, "pickles": [file.name for file in found]}, show)


VERB = Verb(
    convert,
    examples=(
        "regraft convert MODEL-GPTQ-4BIT PLAIN --dtype bfloat16",
        "regraft convert GEMMA-3 TEXT --part text",
    ),
    pushes=True,
)
