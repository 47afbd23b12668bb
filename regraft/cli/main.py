"""The `regraft` command: parses, calls one verb, prints, sets the exit code; heavy imports wait until a verb runs."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from jsonargparse import ArgumentParser

from ..errors import RegraftError
from ..progress import is_main_process, quiet, started_by_torchrun
from .bench import bench
from .check import check
from .compare import compare
from .demo import demo
from .evaluate import evaluate
from .generate import generate
from .grow import grow
from .linearize import linearize
from .outcome import Outcome
from .plan import plan
from .run import run
from .train import train

VERBS: dict[str, Callable[..., Outcome]] = {
    "plan": plan,
    "grow": grow,
    "linearize": linearize,
    "check": check,
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "bench": bench,
    "run": run,
    "compare": compare,
    "demo": demo,
}
OTHERS_WAIT = 5.0  # seconds
DISTRIBUTED_VERBS = (
    "train",
    "run",
    "linearize",
    "grow",
)  # verbs that several processes do as one, under torchrun
RESUMES = ("grow", "linearize", "train", "run", "compare", "demo")
OPEN_ENDED = ("run", "compare", "demo")  # take `--key.sub VALUE` for any field of their recipe
VALUED = (
    "--jobs",
    "--launch",
    "--track",
    "--spike-factor",
)  # flags of such a verb itself that have a value
KINDS = {"int": "a whole number", "float": "a number"}
FLAGS = {
    "json": "print one JSON object on standard output and nothing else",
    "overwrite": "replace the output if it exists",
    "plot": "also draw the rows into bench.svg or positions.svg in the current folder",
    "positions": "measure perplexity by tokens of context, of --windows documents of --length tokens",
    "bridge": "write the model as another class where its own cannot hold the sizes",
    "chat": "wrap the prompt in the model's chat template",
    "skip_bad": "leave out lines of text that cannot be read, and count them",
    "checkpointing": "compute layers again in the backward pass instead of keeping their activations",
    "hybrid": "under torchrun on several machines: shard inside a machine, the same model on each",
    "train": "also forecast its training on the GPUs that --gpus and --gpu name: memory, tokens/s, days, cost",
    "keep_moments": "leave Adam's state as OUT/optimizer.safetensors",
    "skip_prefill": "time decoding alone, from a cache filled with copies of one token instead of a context",
    "stream": "matrix and align layer by layer: two layers in memory, whatever the depth",
}


class Parser(ArgumentParser):
    """Shows `--kv-heads` where Python says kv_heads; `dashed` takes either."""

    def format_help(self) -> str:
        """The help text with dashes inside flags."""
        return re.sub(
            r"(?<=--)[a-z_]+", lambda name: name[0].replace("_", "-"), super().format_help()
        )


def normalize_flags(words: Sequence[str]) -> list[str]:
    """Flags as the parser knows them: underscores inside names."""
    return [
        re.sub(r"^--[a-z-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)
        for word in words
    ]


def build_parser() -> ArgumentParser:
    """The whole command line, from the verbs' signatures and docstrings."""
    parser = Parser(
        prog="regraft",
        exit_on_error=False,
        description="Give pretrained weights a new body: wider, deeper, or linear in cost.",
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subcommands(dest="verb", required=False, metavar="VERB")
    for name, function in VERBS.items():
        sub = Parser(exit_on_error=False, description=summary(function))
        parameters = inspect.signature(function).parameters.values()
        flags = {p.name for p in parameters if p.default is False}
        places = {
            p.name
            for p in parameters
            if p.name == "out" and p.default is not inspect.Parameter.empty
        }
        for place in places:
            sub.add_argument(
                place, nargs="?", default=inspect.signature(function).parameters[place].default
            )
        sub.add_function_arguments(
            function, as_positional=True, skip=flags | places | {"overrides"}
        )
        for flag in sorted(flags):
            sub.add_argument(f"--{flag}", action="store_true", help=FLAGS[flag])
        commands.add_subcommand(name, sub, help=summary(function))
    return parser


def summary(function: Callable[..., Any]) -> str:
    """First line of a docstring."""
    return (function.__doc__ or "").strip().splitlines()[0].rstrip(".")


def split_overrides(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--key.sub VALUE` and `--key.sub=VALUE` of recipes out of a command line; flags of the verb itself stay."""
    own = {f"--{flag}" for flag in (*FLAGS, "help")}
    rest, overrides, queue = [], {}, list(words)
    while queue:
        word = queue.pop(0)
        if word.partition("=")[0] in VALUED:
            rest += [word] if "=" in word else [word, *queue[:1]]
            queue = queue if "=" in word else queue[1:]
            continue
        if not word.startswith("--") or word in own:
            rest.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        if not equals and not queue:
            raise RegraftError(f"override --{key} has no value: write --{key} VALUE")
        overrides[key] = value if equals else queue.pop(0)
    return rest, overrides


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Command line -> verb and its arguments; RegraftError on wrong use."""
    overrides: dict[str, str] = {}
    words = list(words)
    if words and words[0] in OPEN_ENDED:
        words[1:], overrides = split_overrides(words[1:])
    parser = build_parser()
    try:
        namespace = parser.parse_args(normalize_flags(words))
    except argparse.ArgumentError as error:
        raise RegraftError(
            f"{explain_parser_error(str(error), words)}; see: regraft {usage_of(words)}--help"
        ) from error
    if namespace.version:
        return "version", {}
    if namespace.verb is None:
        raise RegraftError(
            f"no verb given (got {words}): use one of {', '.join(VERBS)}; see: regraft --help"
        )
    arguments = namespace[namespace.verb].as_dict()
    if namespace.verb in OPEN_ENDED:
        arguments["overrides"] = overrides
    return namespace.verb, arguments


def usage_of(words: Sequence[str]) -> str:
    """The verb and a space when the command line began with one."""
    return f"{words[0]} " if words and words[0] in VERBS else ""


def explain_parser_error(message: str, words: Sequence[str]) -> str:
    """The parser's message on one line in the user's words; near matches for an unknown verb or flag."""
    message = re.sub(r"\s+", " ", message.replace("Parser key ", "")).strip()
    message = re.sub(r"required: (\w+)\.", "required: ", message)
    if match := re.match(r"unrecognized arguments: (--?[\w.-]+)(.*)", message):
        flag, *rest = re.sub(
            r"--[\w.-]+", lambda found: found[0].replace("_", "-"), match[1] + match[2]
        ).split(" ", 1)
        if flag[2:] in (places := option_names(words, placed=True)):
            order = " ".join(name.upper() for name in places)
            return f"unknown flag {flag}: it is given by its place, regraft {words[0]} {order}"
        known = [f"--{name.replace('_', '-')}" for name in option_names(words)]
        return f"unknown flag {flag} (in '{' '.join([flag, *rest])}'){suggest(flag, known)}"
    if match := re.search(r"invalid choice: '([^']+)'", message):
        return f"unknown verb '{match[1]}'{suggest(match[1], list(VERBS))}: use one of {', '.join(VERBS)}"
    if match := re.match(
        r"\"(\w+)\": (.*(?:Expected a|Subtypes:).*)(?:Got|Given) value: (.*)", message
    ):
        choices = re.findall(r"'(\w+)'", "".join(re.findall(r"Literal\[(.*?)\]", match[2])))
        kinds = [
            words
            for kind, words in KINDS.items()
            if f"<class '{kind}'>" in match[2].partition("Given")[0]
        ]
        if choices or kinds:
            return f"--{match[1].replace('_', '-')} takes {' or '.join(choices or kinds[:1])}, got '{match[3]}'"
    return message


def option_names(words: Sequence[str], placed: bool = False) -> list[str]:
    """Parameters of the verb that the command line names: flags, or those given by their place."""
    found = inspect.signature(VERBS[words[0]]).parameters if usage_of(words) else {}
    return [
        name
        for name, parameter in found.items()
        if (parameter.default is parameter.empty) == placed
    ]


def suggest(word: str, known: Sequence[str]) -> str:
    """`, did you mean X` for a close match."""
    close = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {close[0]}?" if close else ""


def print_outcome(outcome: Outcome, as_json: bool) -> None:
    """JSON or the human form on standard output."""
    if as_json:
        print(json.dumps(outcome.data))
    elif outcome.show is not None:
        from rich.console import Console

        outcome.show(Console())


def report_error(message: object) -> int:
    """One line on standard error; 2. What went wrong in all processes of a torchrun, the first one says for all."""
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
    if verb not in DISTRIBUTED_VERBS:
        raise RegraftError(f"'{verb}' runs in one process; without torchrun: regraft {verb} ..")
    from .. import distributed

    return distributed.init_distributed()


def report_interrupt(verb: str) -> int:
    """One line on how to go on; 130."""
    how = (
        "the same command goes on from here"
        if verb in RESUMES
        else "nothing was finished; run the command again"
    )
    if is_main_process():
        print(f"regraft: interrupted: {how}", file=sys.stderr)
    return 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; the exit code: 0 done, 1 a check does not hold, 2 wrong use or input, 130 Ctrl-C."""
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
            outcome = VERBS[verb](**options)
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
            f"{error.strerror or error}{where}: free space or check the path, then run the command again"
        )
