"""The `regraft` command: parses, calls one verb, prints, sets the exit code; heavy imports wait
until a verb runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

from ..errors import RegraftError
from ..progress import is_main_process, quiet, started_by_torchrun
from .parser import VERBS, parse
from .verb import Outcome

OTHERS_WAIT = 5.0  # seconds


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """JSON or the human form on standard output."""
    if as_json:
        print(json.dumps(outcome.data))
    elif outcome.show is not None:
        from rich.console import Console

        outcome.show(Console())


def report_error(message: object) -> int:
    """One line on standard error; 2. What went wrong in all processes of a torchrun, the first one
    says for all.
    """
    who = ""
    if not is_main_process():
        time.sleep(
            OTHERS_WAIT
        )  # torchrun ends this process meanwhile if the first one has failed too
        who = f"process {os.environ['RANK']}: "
    print(f"regraft: {who}" + re.sub(r"\s*\n\s*", " ", str(message)).strip(), file=sys.stderr)
    return 2


def distributed_context(verb: str) -> AbstractContextManager[None]:
    """Under torchrun, the processes of a verb that trains as one; RegraftError for another verb."""
    if not started_by_torchrun():
        return contextlib.nullcontext()
    if not VERBS[verb].distributed:
        raise RegraftError(f"'{verb}' runs in one process; without torchrun: regraft {verb} ..")
    from .. import distributed

    return distributed.init_distributed()


def report_interrupt(verb: str) -> int:
    """One line on how to go on; 130."""
    how = (
        "run the same command again to resume"
        if verb in VERBS and VERBS[verb].resumes
        else "nothing was finished; run the command again"
    )
    if is_main_process():
        print(f"regraft: interrupted: {how}", file=sys.stderr)
    return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code: 0 done, 1 a check does not hold, 2 wrong use or input,
    130 Ctrl-C.
    """
    quiet()
    verb = ""
    try:
        verb, options = parse(sys.argv[1:] if arguments is None else arguments)
        if verb == "version":
            from importlib.metadata import version

            print(f"regraft {version('regraft')}")
            return 0
        as_json = options.pop("json", False)
        streams = verb == "generate" and not as_json
        with (
            distributed_context(verb),
            contextlib.nullcontext() if streams else contextlib.redirect_stdout(sys.stderr),
        ):
            outcome = VERBS[verb].function(**options)
        if is_main_process():
            print_outcome(outcome, as_json)
        return outcome.code
    except RegraftError as error:
        return report_error(error)
    except KeyboardInterrupt:
        return report_interrupt(verb)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until exit, so that flushing it cannot fail again
        return 0
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f" ({error.filename})" if error.filename else ""
        return report_error(
            f"{error.strerror or error}{where}: free space or check the path, then run the command"
            " again"
        )
