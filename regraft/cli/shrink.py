"""`regraft shrink`: the source of a grown model, byte for byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .verb import Outcome, Verb

if TYPE_CHECKING:
    from rich.console import Console


def shrink_model(grown: str, out: str, overwrite: bool = False, json: bool = False) -> Outcome:
    """Undo a growth: write the source of a grown model, byte for byte, or say why that cannot be.

    Args:
        grown: a model that regraft grew and nobody trained since
        out: directory to write
        overwrite: replace the output if it exists
        json: print one JSON object on standard output and nothing else
    """
    from ..growth.shrink import shrink
    from ..progress import Ticker

    with Ticker() as ticker:
        ticker.start(f"writing {out}")
        found = shrink(grown, out, overwrite)

    def show(console: Console) -> None:
        lines = [
            f"{name}: sha256 {digest}, the source's" for name, digest in found["files"].items()
        ]
        if found["missing"]:
            lines.append(f"not there: {', '.join(found['missing'])}, left behind when it grew")
        for line in [*lines, f"Wrote {out}"]:
            console.print(line, soft_wrap=True, highlight=False)

    return Outcome(found | {"out": out}, show)


VERB = Verb(
    shrink_model,
    examples=(
        "regraft shrink GROWN OUT",
        "regraft shrink GROWN OUT --json",
    ),
)
