"""The one exception a user sees, and help with misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
