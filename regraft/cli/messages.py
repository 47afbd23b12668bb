"""The parser's complaints in the user's words.

jsonargparse's messages speak of keys and Python types. Each rule below begins with an example of
what it rewrites; what no rule knows is passed on in one line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import suggest
from .verb import Verb

KINDS = {"int": "a whole number", "float": "a number"}


def explain_parser_error(message: str, words: Sequence[str], verbs: Mapping[str, Verb]) -> str:
    """A parser's message on one line in the user's words.

    Args:
        message: what jsonargparse or argparse said.
        words: the command line.
        verbs: all verbs by name, for near matches.
    """
    message = re.sub(r"\s+", " ", message.replace("Parser key ", "")).strip()
    verb = verbs.get(words[0]) if words else None
    explained = (
        explain_unknown_flag(message, words, verb)
        or explain_unknown_verb(message, verbs)
        or explain_wrong_type(message)
    )
    return explained or re.sub(r"required: (\w+)\.", "required: ", message)


def explain_unknown_flag(message: str, words: Sequence[str], verb: Verb | None) -> str | None:
    """`unrecognized arguments: --kv_head 3` -> `unknown flag --kv-head (in '--kv-head 3'): did you
    mean ...`.
    """
    match = re.match(r"unrecognized arguments: (--?[\w.-]+)(.*)", message)
    if not match:
        return None
    as_typed = re.sub(r"--[\w.-]+", lambda found: found[0].replace("_", "-"), match[1] + match[2])
    flag = as_typed.split(" ", 1)[0]

    # A required argument written as a flag: `generate MODEL --prompt x`.
    places = verb.positional if verb else []
    if flag[2:] in places:
        order = " ".join(name.upper() for name in places)
        return f"unknown flag {flag}: it is given by its place, regraft {words[0]} {order}"
    names = [*verb.optional, *(["variant"] if verb.source else [])] if verb else []
    known = [f"--{name.strip('_').replace('_', '-')}" for name in names]
    remedy = suggest(flag, known) or f"regraft {words[0] if verb else ''} --help lists all"
    return re.sub(" +", " ", f"unknown flag {flag} (in '{as_typed}'): {remedy}").strip()


def explain_unknown_verb(message: str, verbs: Mapping[str, Verb]) -> str | None:
    """`... invalid choice: 'growe' (choose from ...)` -> `unknown verb 'growe': did you mean grow?
    use one of ...`.
    """
    match = re.search(r"invalid choice: '([^']+)'", message)
    if not match:
        return None
    return f"unknown verb '{match[1]}': {suggest(match[1], verbs)}use one of {', '.join(verbs)}"


def explain_wrong_type(message: str) -> str | None:
    """`"batch": Expected a <class 'int'>. Got value: x` -> `--batch takes a whole number, got 'x'`.

    Literals list their choices: `Expected a typing.Literal['carry', 'cut']`.
    """
    match = re.match(r"\"(\w+)\": (.*(?:Expected a|Subtypes:).*)(?:Got|Given) value: (.*)", message)
    if not match:
        return None
    name, expected, value = match.groups()
    choices = re.findall(r"'(\w+)'", "".join(re.findall(r"Literal\[(.*?)\]", expected)))
    kinds = [
        kind
        for python, kind in KINDS.items()
        if f"<class '{python}'>" in expected.partition("Given")[0]
    ]
    if not choices and not kinds:
        return None
    flag = f"--{name.strip('_').replace('_', '-')}"
    return f"{flag} takes {' or '.join(choices or kinds[:1])}, got '{value}'"
