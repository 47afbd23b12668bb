"""The command line as a parser, made from the verbs' signatures and docstrings, without torch."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import keyword
import re
from collections.abc import Sequence
from typing import Any

import docstring_parser
from jsonargparse import ArgumentParser
from yaml import YAMLError

from ..errors import RegraftError
from ..io.typed import parse_mapping
from ..io.yaml_loader import check_bounds
from . import (
    anatomy,
    bench,
    check,
    compare,
    convert,
    demo,
    evaluate,
    export,
    generate,
    grow,
    linearize,
    plan,
    run,
    shrink,
    train,
)
from .messages import explain_parser_error
from .verb import Verb

VERBS: dict[str, Verb] = {
    "plan": plan.VERB,
    "grow": grow.VERB,
    "linearize": linearize.VERB,
    "check": check.VERB,
    "shrink": shrink.VERB,
    "train": train.VERB,
    "export": export.VERB,
    "convert": convert.VERB,
    "anatomy": anatomy.VERB,
    "eval": evaluate.VERB,
    "generate": generate.VERB,
    "bench": bench.VERB,
    "run": run.VERB,
    "compare": compare.VERB,
    "demo": demo.VERB,
}
VARIANT_HELP = (
    "take other weights of the model's directory: fp16 means model.fp16.safetensors, which can also"
    " be given as the path, here and wherever else a model is read"
)
ADAPTER_HELP = (
    "merge a PEFT adapter (LoRA, rsLoRA or DoRA) into the model while it is read: the folder that"
    " PEFT's save_pretrained wrote"
)
PUSH_HELP = (
    "also upload OUT, with its model card, as ORG/NAME on the Hugging Face hub; a new model there"
    " is private"
)


class Parser(ArgumentParser):
    """A parser whose help has one section for each group of flags, and examples at the end.

    Python says kv_heads where the command line says `--kv-heads`, and for_ where it says `--for`:
    `normalize_flags` takes either, help shows dashes.
    """

    verb: Verb | None = None

    def format_help(self) -> str:
        """The help text: usage, sections, examples."""
        text = self._format_sections(self.verb) if self.verb else super().format_help()
        return re.sub(r"(?<=--)[a-z_]+", lambda name: name[0].strip("_").replace("_", "-"), text)

    def _format_sections(self, verb: Verb) -> str:
        by_name = {action.dest: action for action in self._actions}
        required = [action for action in self._actions if not action.option_strings]
        sections: dict[str, list[argparse.Action]] = {"arguments": required}
        for title, names in verb.sections.items():
            sections[title] = [by_name[name] for name in names]
        listed = {id(action) for actions in sections.values() for action in actions}
        rest = [action for action in self._actions if id(action) not in listed]
        sections["other" if verb.sections else "options"] = rest

        formatter = self.formatter_class(prog=self.prog)
        words = " ".join(action.dest.upper() for action in required)
        formatter.add_text(f"usage: {self.prog.replace(' [options]', '')} {words} [options]")
        formatter.add_text(self.description)
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return (
            formatter.format_help()
            + "\nexamples:\n"
            + "".join(f"  {example}\n" for example in verb.examples)
        )


def normalize_flags(words: Sequence[str]) -> list[str]:
    """Flags as the parser knows them: underscores inside names, and behind words of Python."""

    def find_name(flag: re.Match[str]) -> str:
        name = flag[0][2:].replace("-", "_")
        return f"--{name}_" if keyword.iskeyword(name) else f"--{name}"

    return [re.sub(r"^--[a-z-]+", find_name, word) for word in words]


def build_parser() -> ArgumentParser:
    """The whole command line, from the verbs' signatures and docstrings."""
    parser = Parser(
        prog="regraft",
        exit_on_error=False,
        description=(
            "Reuse pretrained Hugging Face weights in a different architecture: grow a model"
            " without changing its outputs, or linearize its attention."
        ),
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subcommands(dest="verb", required=False, metavar="VERB")
    for name, verb in VERBS.items():
        commands.add_subcommand(name, build_verb_parser(verb), help=verb.summary)
    return parser


def build_verb_parser(verb: Verb) -> Parser:
    """The parser of one verb.

    jsonargparse would want a value behind a flag of a bool, and every parameter with a default as a
    flag: these two kinds are added here, and mappings, with the help of the verb's docstring.
    """
    parser = Parser(exit_on_error=False, description=verb.summary)
    parser.verb = verb
    parameters = inspect.signature(verb.function).parameters.values()
    described = docstring_parser.parse(verb.function.__doc__ or "").params
    helps = {parameter.arg_name: parameter.description or "" for parameter in described}

    switches = sorted(parameter.name for parameter in parameters if parameter.default is False)
    optional_places = [
        parameter
        for parameter in parameters
        if parameter.name == "out" and parameter.default is not parameter.empty
    ]
    # Read here, not by jsonargparse: it would import and call what a `class_path` in them names.
    mappings = list_mappings(verb)
    skip = {*switches, *(parameter.name for parameter in optional_places), *mappings, "overrides"}
    parser.add_function_arguments(verb.function, as_positional=True, skip=skip)
    # Behind the places that must be given.
    for parameter in optional_places:
        parser.add_argument(
            parameter.name, nargs="?", default=parameter.default, help=helps[parameter.name]
        )
    for name in mappings:
        parser.add_argument(f"--{name}", type=str, default=None, help=helps[name])
    for switch in switches:
        parser.add_argument(f"--{switch}", action="store_true", help=helps[switch])
    if verb.source:
        parser.add_argument("--variant", type=str, default=None, help=VARIANT_HELP)
        parser.add_argument("--adapter", type=str, default=None, help=ADAPTER_HELP)
    if verb.pushes:
        parser.add_argument("--push_to_hub", type=str, default=None, help=PUSH_HELP)
    return parser


def list_mappings(verb: Verb) -> list[str]:
    """The parameters of a verb that are mappings, such as `--options`."""
    parameters = inspect.signature(verb.function).parameters.values()
    return [one.name for one in parameters if one.annotation == "dict[str, Any] | None"]


def split_overrides(verb: Verb, words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take `--key.sub VALUE` and `--key.sub=VALUE` of recipes out of a command line.

    The verb's own flags stay, those with a value together with it.

    Args:
        verb: a verb that takes overrides.
        words: the command line behind the verb.
    """
    parameters = inspect.signature(verb.function).parameters
    flags = {f"--{name.replace('_', '-')}": one.default for name, one in parameters.items()}
    switches = {"--help", "-h", *(flag for flag, default in flags.items() if default is False)}
    valued = set(flags) - switches

    rest, overrides, queue = [], {}, list(words)
    while queue:
        word = queue.pop(0)
        flag, equals, value = word.partition("=")
        if flag in valued:
            rest += [word] if equals else [word, *queue[:1]]
            queue = queue if equals else queue[1:]
        elif not word.startswith("--") or word in switches:
            rest.append(word)
        elif not equals and not queue:
            raise RegraftError(f"override {flag} has no value: write {flag} VALUE")
        else:
            overrides[flag[2:]] = value if equals else queue.pop(0)
    return rest, overrides


def parse(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The verb of a command line and its arguments; `version` for `--version`. RegraftError on
    wrong use.
    """
    words = list(words)
    for word in words:
        # jsonargparse reads any word as YAML and would write nested aliases out, without end.
        if "&" in word and "*" in word:
            with contextlib.suppress(YAMLError):
                check_bounds(word, f"argument '{word[:40]}..'")

    overrides: dict[str, str] = {}
    verb = VERBS.get(words[0]) if words else None
    if verb and verb.takes_overrides:
        words[1:], overrides = split_overrides(verb, words[1:])

    try:
        namespace = build_parser().parse_args(normalize_flags(words))
    except argparse.ArgumentError as error:
        see = f"regraft {words[0]} --help" if verb else "regraft --help"
        raise RegraftError(
            f"{explain_parser_error(str(error), words, VERBS)}; see: {see}"
        ) from error
    if namespace.version:
        return "version", {}
    if namespace.verb is None:
        raise RegraftError(
            f"no verb given (got {words}): use one of {', '.join(VERBS)}; see: regraft --help"
        )
    arguments = namespace[namespace.verb].as_dict()
    for name in list_mappings(VERBS[namespace.verb]):
        if arguments[name] is not None:
            arguments[name] = parse_mapping(arguments[name], f"--{name.replace('_', '-')}")
    if verb and verb.takes_overrides:
        arguments["overrides"] = overrides
    return namespace.verb, arguments
