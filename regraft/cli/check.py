"""`regraft check`: what can be proved about an output."""

from __future__ import annotations

from .verb import Outcome, Verb


def check_output(
    source: str, out: str, trust_remote_code: bool = False, json: bool = False
) -> Outcome:
    """Receipts: source and output compared as transformers loads both, recorded steps done again,
    parallel against recurrent; exit 1 if one does not hold.

    Args:
        source: the model that was changed
        out: what came of it
        trust_remote_code: run the Python files beside the model, if its classes are there
        json: print one JSON object on standard output and nothing else
    """
    from ..checks import check as proofs
    from ..core.custom_code import run_custom_code
    from ..progress import Ticker

    run_custom_code(source, trust_remote_code)
    with Ticker() as ticker:
        ticker.start(f"checking {out}")
        found = proofs.check(source, out, progress=ticker.update)
    return Outcome(
        found, lambda console: proofs.print_receipts(found, console), 0 if found["holds"] else 1
    )


VERB = Verb(
    check_output,
    examples=(
        "regraft check SOURCE OUT",
        "regraft check SOURCE OUT --json",
    ),
)
