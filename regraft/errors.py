"""The one exception a user sees, help with misspelt names, and foreign text made safe to print."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

NO_MEMORY = re.compile("not enough memory|[Cc]annot allocate memory|out of memory|unable to mmap")

# What a terminal acts on instead of showing it: control characters (C0, DEL, C1), line and
# paragraph separators, and the marks that reverse the direction of text. Surrogates stand for
# bytes of a file name that are not UTF-8, and cannot be written.
NOT_PRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class RegraftError(Exception):
    """Wrong use or wrong input: one line saying what is wrong, the value, and what to do next.

    The command line prints it without a traceback and exits with status 2.
    """


def suggest(word: str, known: Iterable[str], count: int = 1) -> str:
    """A question that names what a misspelt word may have meant, for an error message.

    Args:
        word: the word that is not known.
        known: the words that are.
        count: how many near matches to name at most.

    Returns:
        "did you mean plan? ", with several matches "did you mean piqa or hellaswag? ", and an empty
        string when nothing comes close. The space is there because what to do follows.
    """
    close = difflib.get_close_matches(word, list(known), n=count)
    return f"did you mean {' or '.join(close)}? " if close else ""


@contextmanager
def explain_errors(what: str, remedy: str) -> Iterator[None]:
    """Inside, any exception becomes a RegraftError: the boundary around a reader of foreign files.

    Args:
        what: what could not be done, with the file's name; the exception's first line follows.
        remedy: what the user can do.
    """
    try:
        yield
    except (RegraftError, BrokenPipeError):  # a lost reader of our own output is no damaged file
        raise
    except Exception as error:  # libraries raise anything on a damaged file
        # PyTorch and safetensors report a lack of memory as errors of other types.
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            remedy = "there is not enough memory, free some or use a machine with more"
        raise RegraftError(f"{what} ({first_line(error)}): {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception, with the one that it announces by a colon; at most 200
    characters, its type where it says nothing.
    """
    lines = [line.strip() for line in printable(error, "\n").splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"[:200]


def printable(text: object, keep: str = "") -> str:
    """Text without what a terminal would act on: such characters become escapes like \\x1b.

    For names, prompts, texts of models and messages that hold them.

    Args:
        text: what is to be printed.
        keep: characters that stay, such as the newlines of a whole page.
    """
    return NOT_PRINTABLE.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(),
        str(text),
    )
