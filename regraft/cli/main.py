"""The `regraft` command: parses, calls one verb, prints, sets the exit code; heavy imports wait
until a verb runs.
"""

from __future__ import annotations

import contextlib
import errno
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io.failures import WRONG, report_error, report_failure
from ..io.signals import StopAtOnce, Terminated
from ..io.streams import guard_streams
from ..progress import PlainConsole, is_main_process, print_line, quiet, started_by_torchrun
from .parser import VERBS, parse
from .verb import Outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line.

    Returns:
        The exit code: 0 the result is there, 1 a check does not hold, 2 wrong use or input, 70 a
        bug, 128 + N ended by signal N (130 Ctrl-C, 141 nobody reads the output).
    """
    quiet()
    verb, options = "", dict[str, Any]()
    with guard_streams() as stdout, StopAtOnce():
        try:
            verb, options = parse(sys.argv[1:] if arguments is None else arguments)
            as_json = options.pop("json", False)
            outcome = run_verb(verb, options, as_json)
            if is_main_process():
                print_outcome(outcome, as_json, verb in VERBS and VERBS[verb].resumes)
            return outcome.code
        except KeyboardInterrupt as stop:
            return report_stop(signal.SIGINT, verb, options, str(stop))
        except Terminated as stop:
            return report_stop(stop.number, verb, options)
        except SystemExit as stop:  # help, or training that was stopped and has said so
            with contextlib.suppress(OSError):
                stdout.flush()
            if stop.code or stdout.lost is None:
                raise
            return report_lost_output(stdout.lost)
        except Exception as error:
            lost = stdout.lost
            return report_failure(error) if error is not lost else report_lost_output(lost)


def run_verb(verb: str, options: Mapping[str, Any], as_json: bool) -> Outcome:
    """Run a verb; what it prints goes to standard error, except for text that it streams."""
    if verb == "version":
        from importlib.metadata import version

        text = f"regraft {version('regraft')}"
        return Outcome({}, lambda console: console.print(text))

    streams = verb == "generate" and not as_json
    with (
        distributed_context(verb),
        contextlib.nullcontext() if streams else contextlib.redirect_stdout(sys.stderr),
    ):
        arguments = find_models(verb, options)
        name = arguments.pop("push_to_hub", None)
        if name is None:
            return VERBS[verb].function(**arguments)
        return push_output(verb, arguments, name)


def find_models(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A verb's arguments, in which models are paths: the folder of a name on the hub, which is
    fetched first, the file of the variant asked for, and what stands for it with an adapter.

    `plan` fetches no weights. RegraftError when there is no such model or variant.
    """
    arguments = dict(options)
    variant, adapter = arguments.pop("variant", None), arguments.pop("adapter", None)
    source = VERBS[verb].source
    from ..io import hub

    for name in VERBS[verb].models:
        if arguments[name] is not None and hub.names_model(arguments[name]):
            wanted = variant if name == source else None
            weights = verb != "plan" or wanted is not None
            arguments[name] = str(hub.fetch(arguments[name], weights, wanted))
    if variant is not None and source is not None:
        from ..io.safetensors import variant_file

        arguments[source] = variant_file(arguments[source], variant)
    if adapter is not None and source is not None:
        from ..io.adapted import adapted_path
        from ..io.output import check_apart

        if arguments.get("out") and verb != "check":
            inputs = [("adapter", adapter), ("source", arguments[source])]
            check_apart(arguments["out"], inputs)
        arguments[source] = adapted_path(arguments[source], adapter)
    return arguments


def push_output(verb: str, arguments: Mapping[str, Any], name: str) -> Outcome:
    """Run a verb and push what it writes to the hub; see `hub_push.push`.

    Args:
        verb: that writes a model.
        arguments: of it.
        name: ORG/NAME.
    """
    from .. import distributed
    from ..io import hub_push

    if not arguments["out"]:
        raise RegraftError(f"--push-to-hub {name} is of a written model: give OUT too")
    distributed.on_rank0(lambda: hub_push.prepare_push(name))
    outcome = VERBS[verb].function(**arguments)
    address = distributed.on_rank0(lambda: hub_push.push(Path(arguments["out"]), name))

    def show(console: Any) -> None:
        if outcome.show is not None:
            outcome.show(console)
        console.print(f"Pushed to {address}", soft_wrap=True, highlight=False)

    return Outcome({**outcome.data, "pushed": address}, show, outcome.code)


def distributed_context(verb: str) -> AbstractContextManager[None]:
    """Under torchrun, the processes of a verb that trains as one; RegraftError for another verb."""
    if not started_by_torchrun():
        return contextlib.nullcontext()
    if not VERBS[verb].distributed:
        raise RegraftError(f"'{verb}' runs in one process; without torchrun: regraft {verb} ..")
    from .. import distributed

    return distributed.init_distributed()


def print_outcome(outcome: Outcome, as_json: bool, written: bool) -> None:
    """JSON or the human form on standard output; OSError when it cannot be written.

    Args:
        outcome: what the verb gave back.
        as_json: whether JSON was asked for, which is then a part of the result.
        written: whether the result is on disk: a table of it that cannot be printed is no error.
    """
    try:
        if as_json:
            print(json.dumps(outcome.data))
        elif outcome.show is not None:
            outcome.show(PlainConsole(sys.stdout))
        sys.stdout.flush()
    except OSError as error:
        if as_json or not written or error is not getattr(sys.stdout, "lost", None):
            raise
        print_line(f"the result is written; its summary cannot be printed ({error.strerror})")


def report_lost_output(error: OSError) -> int:
    """The exit code of a command whose standard output cannot be written."""
    if error.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE  # as of any program whose reader has gone, without a word
    report_error(f"cannot write standard output ({error.strerror}): send it elsewhere")
    return WRONG


def find_partial(out: Path) -> Path | None:
    """The hidden folder of finished files that a stopped command left for its output."""
    # Where it was not imported nothing was written, and importing it is slow.
    if "regraft.io.shard_writer" not in sys.modules:
        return None
    from ..io import output, shard_writer

    folder = shard_writer.partial_path(output.real_path(out))
    return folder if folder.is_dir() else None


def report_stop(number: int, verb: str, options: Mapping[str, Any], said: str = "") -> int:
    """One line on what is kept after a signal; the exit code.

    Args:
        number: of the signal.
        verb: what it ended, empty before a verb was known.
        options: the verb's arguments.
        said: the line of a training run that has kept a checkpoint, empty elsewhere.
    """
    out = Path(str(options.get("out", "")))
    kept = "nothing was finished; run the command again"
    if verb in VERBS and VERBS[verb].resumes and out.is_dir() and any(out.iterdir()):
        kept = f"what '{out}' holds is kept; run the same command again"
    elif "out" in options and (partial := find_partial(out)):
        kept = f"files that are finished are kept in '{partial}'; run the same command again"
    if is_main_process():
        print_line(said or f"stopped by {signal.Signals(number).name}; {kept}")
    return 128 + number
