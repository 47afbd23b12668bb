"""What jsonargparse says of a recipe that does not fit its schema, in one plain line.

jsonargparse nests its messages: one line for each key on the way, two spaces more each time. Below
are the kinds there are, each with what becomes of it.

An unknown key at the top:

    Option 'sorce' is not accepted
    -> unknown key 'sorce'; did you mean source or scores?

in a block:

    Group 'remix' does not accept option 'mixr'
    -> unknown key 'mixr' in 'remix'; did you mean mixer or remix?

and in an entry of a list:

    Parser key "stages":
      Problem with given class_path 'regraft.train.stage.Stage':
        Option 'token' is not accepted
    -> unknown key 'token' in 'stages'; did you mean tokens or token_drop?

A value of the wrong type, with the keys that lead to it:

    Parser key "train":
      Problem with given class_path 'regraft.data.text.Text':
        Parser key "share":
          Expected a <class 'float'>. Got value: much
    -> "train": in Text: "share": Expected a <class 'float'>. Got value: much

A number or list where a block of keys must be, which is an error of Python's:

    functools.partial(...) argument after ** must be a mapping, not int
    -> a block of keys is int: give keys with values, such as 'remix: {keep: none}'

Anything else is put into one line and left as it is:

    the following arguments are required: source, train
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator

# `Option 'a.b' is not accepted` or `Group 'a' does not accept option 'b'`
UNKNOWN_KEY = re.compile(r"(?:Option '([\w.]+)' is not accepted|accept option '([\w.]+)')")
# `Group 'a'` or `"a":`, the outermost first
BLOCK = re.compile(r"Group '([\w.]+)'|\"(\w+)\":")
CLASS_PATH = re.compile(r"Problem with given class_path '[\w.]*\.(\w+)':")
NO_MAPPING = re.compile(r"argument after \*\* must be a mapping, not (\w+)")


def explain_error(message: str, schema: type) -> str:
    """A message of jsonargparse in one line, with near matches for an unknown key.

    Args:
        message: as jsonargparse wrote it.
        schema: the dataclass that was to be built; has the keys there are.
    """
    line = " ".join(message.split()).replace("Parser key ", "")
    if unknown := UNKNOWN_KEY.search(line):
        block = BLOCK.search(line)
        inside = (block[1] or block[2]) if block else None
        return describe_unknown_key(unknown[1] or unknown[2], inside, schema)
    if value := NO_MAPPING.search(line):
        return (
            f"a block of keys is {value[1]}: give keys with values, such as 'remix: {{keep: none}}'"
        )
    return CLASS_PATH.sub(r"in \1:", line)


def describe_unknown_key(key: str, inside: str | None, schema: type) -> str:
    """The line for a key that the schema does not have.

    Args:
        key: as it was written, `remix.mixr` when it was an override.
        inside: the block or list that it stands in, None at the top.
        schema: has the keys that it is compared with.
    """
    parts, known = key.split("."), list(schema_keys(schema))
    near = [
        *difflib.get_close_matches(parts[0], known, n=2),
        *difflib.get_close_matches(parts[-1], known, n=2),
    ]
    matches = [name for name in dict.fromkeys(near) if name not in parts]
    remedy = f"did you mean {' or '.join(matches)}?" if matches else "remove it"
    where = f" in '{inside}'" if inside else ""
    return f"unknown key '{key}'{where}; {remedy}"


def schema_keys(schema: type) -> Iterator[str]:
    """Every key of a schema, those of nested dataclasses too."""
    for name, hint in typing.get_type_hints(schema).items():
        yield name
        for part in (hint, *typing.get_args(hint)):  # list[Stage], Lit | None
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from schema_keys(part)
