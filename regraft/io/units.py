"""Numbers as people write them: counts and sizes such as 500M, context lengths such as 4k."""

from __future__ import annotations

import re

from ..errors import RegraftError
from .schema import shorten

LARGEST = 1e18  # more tokens or bytes than there are
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def parse_number(text: str, name: str) -> int:
    """A count or a number of bytes: `200000`, `1.5B`, `500M`, `80GB`; RegraftError when it is none.

    K, M, G (or B) and T are powers of 1,000, as every trainer's flags have them.

    Args:
        text: digits and perhaps a unit; a B behind a unit of bytes changes nothing.
        name: of the value, for the error.
    """
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[0-9]+)?) ?([KMGBT]?)B?", text.strip(), re.I)
    if not found:
        raise RegraftError(f"{name} is '{text}': give a number such as 200000, 500M, 1B or 80GB")
    value = float(found[1]) * UNITS[found[2].upper()]
    if value >= LARGEST:
        raise RegraftError(f"{name} is '{shorten(text)}': give less than {LARGEST:.0e}")
    return int(value)


def parse_lengths(text: str) -> list[int]:
    """Context lengths: `1k,4k,16k` or `512,2048`; RegraftError on anything else.

    Here k is 1,024, not 1,000: models' context lengths are counted so.
    """
    lengths = []
    for word in text.lower().split(","):
        digits, factor = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        # Digits of other scripts are digits too, but no numbers; 12 of them are more than enough.
        if not re.fullmatch("[0-9]{1,12}", digits.strip()) or int(digits) == 0:
            raise RegraftError(
                f"'{word}' in --lengths '{text}' is no length: write counts such as 512 or 16k"
            )
        lengths.append(int(digits) * factor)
    return lengths
