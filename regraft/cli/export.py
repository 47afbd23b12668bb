"""`regraft export`: a model as another class, which programs without regraft run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RegraftError
from .verb import Outcome, Verb, check_apart, describe_request

if TYPE_CHECKING:
    from rich.console import Console

DEFAULT = "q8_0"  # quantisation of the GGUF file beside a stock class


def export(
    source: str,
    out: str | None = None,
    to: str | None = None,
    quantize: str | None = None,
    no_check: bool = False,
    check_engine: bool = False,
    copy_code: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    json: bool = False,
) -> Outcome:
    """Write a model as a class that other programs run; without OUT say which targets hold it and
    why others do not.

    Args:
        source: model directory, GGUF file, or name on the hub (ORG/MODEL, ORG/MODEL@REVISION)
        out: directory to write
        to: the target: granite_swa, qwen3_5, granite_hybrid, gguf for llama.cpp, rwkv6qwen2 for
            llama.cpp where all layers are rwkv6, or hf for the directory with regraft's code;
            without it the stock class that holds the model, with model-q8_0.gguf beside it where
            llama.cpp holds it
        quantize: also write model-QUANTIZE.gguf: q8_0, or q4_k_m where llama.cpp is installed
        no_check: do not compare the result with the model in plain transformers before it is put in
            place
        check_engine: run llama.cpp on the result and compare it with transformers, also token by
            token
        copy_code: also copy Python files beside the weights, which regraft never runs
        overwrite: replace the output if it exists
        allow_nonfinite: take and write NaN and infinity; lineage.json notes it
        json: print one JSON object on standard output and nothing else
    """
    import dataclasses

    from ..core.checkpoint import Checkpoint
    from ..export import write
    from ..export.target import find_served_target, find_target
    from ..io import shard_writer
    from ..progress import Ticker

    given = locals()
    if to:
        find_target(to)
    checkpoint = dataclasses.replace(Checkpoint.open(source, allow_nonfinite), copy_code=copy_code)
    if out is None:
        check_no_output(given)
        misfits = write.list_misfits(checkpoint)
        chosen = {name: misfits[name] for name in misfits if to in (None, name)}
        return Outcome({"targets": chosen}, lambda console: print_targets(source, chosen, console))

    check_apart(given, ("source",))
    request = describe_request(export, given, ("source",), ("no_check", "check_engine"))
    done = shard_writer.check_target(out, overwrite, request)
    notes = []
    if to is None:
        to = find_served_target(checkpoint.config)
        is_file = find_target(to).prepare is not None
        reason = None if quantize or is_file else write.explain_no_gguf(checkpoint)
        quantize = quantize or (None if reason else DEFAULT)
        notes += [f"no {DEFAULT} GGUF file: {reason}"] if reason else []
    target, proof = find_target(to), write.Proof()
    notes += write.list_notes(checkpoint, bool(quantize) or target.prepare is not None)
    if not done:
        with Ticker() as ticker:
            ticker.start(f"writing {out}")
            proof = write.write_export(
                checkpoint,
                to,
                out,
                not no_check,
                quantize,
                check_engine,
                overwrite=overwrite,
                request=request,
            )

    def show(console: Console) -> None:
        wrote = f"{out} is there already" if done else f"Wrote {out}"
        files = sorted(Path(out).glob("*.gguf"))
        loads = target.loads.replace("OUT/FILE.gguf", str(files[-1]) if files else "")
        for line in (*describe_proof(proof), *notes, f"{wrote}: {loads}"):
            console.print(line, soft_wrap=True, highlight=False)

    facts: dict[str, Any] = {
        "out": out,
        "to": to,
        "quantize": quantize,
        "check": proof.get("stock"),
        "gguf": proof.get("gguf"),
        "engine": proof.get("engine"),
        "notes": notes,
    }
    return Outcome(facts, show)


def check_no_output(given: dict[str, Any]) -> None:
    """RegraftError for options of writing where nothing is written."""
    for name in ("quantize", "check_engine"):
        if given[name]:
            raise RegraftError(
                f"--{name.replace('_', '-')} is of a written model, and '{given['source']}' is only"
                " asked about: give OUT too"
            )


def describe_proof(proof: Mapping[str, Any]) -> list[str]:
    """What was compared, a line each; see `export.write.Proof`."""
    lines = []
    if stock := proof.get("stock"):
        lines.append(
            f"{stock['loaded']} in transformers against regraft's model on {stock['tokens']}"
            f" tokens: {stock['difference']:.1e} of the largest logit"
        )
    for one in proof.get("gguf", []):
        logits = (
            "transformers does not read it"
            if one["difference"] is None
            else f"logits as transformers loads it {one['difference']:.1e} of the largest apart"
        )
        equal = f"off by {one['rounding']:.1e}" if one["rounding"] is not None else "equal"
        lines.append(f"{one['file']}: {one['tensors']} tensors read back, {equal}; {logits}")
    if engine := proof.get("engine"):
        lines.append(
            f"{engine['engine']}, float32, on {engine['tokens']} tokens: logits"
            f" {engine['difference']:.1e} of the largest apart, token by token"
            f" {engine['step_difference']:.1e}; best token equal in {engine['argmax']:.1%}"
        )
    return lines


def print_targets(source: str, misfits: dict[str, list[str]], console: Console) -> None:
    """Which targets hold a model, and why others do not."""
    for name, found in misfits.items():
        text = "; ".join(found) if found else f"regraft export {source} SERVED --to {name}"
        verdict = "no" if found else "yes"
        console.print(f"{name:15s} {verdict:4s} {text}", soft_wrap=True, highlight=False)


VERB = Verb(
    export,
    examples=(
        "regraft export MODEL",
        "regraft export MODEL OUT",
    ),
    pushes=True,
)
