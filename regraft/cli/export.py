"""`regraft export`: a model as another class, which programs without regraft run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import RegraftError
from .verb import Outcome, Verb, check_apart, describe_request

if TYPE_CHECKING:
    from rich.console import Console


def export(
    source: str,
    out: str | None = None,
    to: str | None = None,
    no_check: bool = False,
    copy_code: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    json: bool = False,
) -> Outcome:
    """Write a model as a class that other programs run; without OUT say which targets hold it and
    why others do not.

    Args:
        source: model directory or GGUF file
        out: directory to write
        to: the target: granite_swa, granite_hybrid, or hf for the directory with regraft's code
        no_check: do not compare the result with the model in plain transformers before it is put in
            place
        copy_code: also copy Python files beside the weights, which regraft never runs
        overwrite: replace the output if it exists
        allow_nonfinite: take and write NaN and infinity; lineage.json notes it
        json: print one JSON object on standard output and nothing else
    """
    import dataclasses

    from ..core.checkpoint import Checkpoint
    from ..export import write
    from ..export.target import find_target, list_targets
    from ..io import shard_writer

    given = locals()
    if out and not to:
        raise RegraftError(
            f"'{out}' is to be written, but not as what: give --to with one of "
            f"{', '.join(list_targets())}"
        )
    target = find_target(to) if to else None
    checkpoint = dataclasses.replace(Checkpoint.open(source, allow_nonfinite), copy_code=copy_code)
    if out is None:
        misfits = write.list_misfits(checkpoint)
        chosen = {name: misfits[name] for name in misfits if to in (None, name)}
        return Outcome({"targets": chosen}, lambda console: print_targets(source, chosen, console))

    assert target is not None and to is not None
    check_apart(given, ("source",))
    request = describe_request(export, given, ("source",), ("no_check",))
    done = shard_writer.check_target(out, overwrite, request)
    found = None
    if not done:
        found = write.write_export(
            checkpoint, to, out, not no_check, overwrite=overwrite, request=request
        )
    notes = write.list_notes(checkpoint)

    def show(console: Console) -> None:
        if found:
            console.print(
                f"{found['loaded']} in transformers against regraft's model on {found['tokens']}"
                f" tokens: {found['difference']:.1e} of the largest logit",
                soft_wrap=True,
                highlight=False,
            )
        for note in notes:
            console.print(note, soft_wrap=True, highlight=False)
        wrote = f"{out} is there already" if done else f"Wrote {out}"
        console.print(f"{wrote}: {target.loads}", soft_wrap=True, highlight=False)

    facts: dict[str, Any] = {"out": out, "to": to, "check": found, "notes": notes}
    return Outcome(facts, show)


def print_targets(source: str, misfits: dict[str, list[str]], console: Console) -> None:
    """Which targets hold a model, and why others do not."""
    for name, found in misfits.items():
        text = "; ".join(found) if found else f"regraft export {source} OUT --to {name}"
        verdict = "no" if found else "yes"
        console.print(f"{name:12s} {verdict:4s} {text}", soft_wrap=True, highlight=False)


VERB = Verb(
    export,
    examples=(
        "regraft export MODEL",
        "regraft export MODEL OUT --to granite_swa",
    ),
)
