"""Sizes and counts as people write them on a command line: 4GB, 1.5B, 64k.

Letters mean powers of ten, as in the flags of other trainers: k is 1,000, M is 10^6, B is 10^9.
There is one exception. Context lengths are usually powers of two, so `parse_context_length` reads
1k as 1,024.
"""

from __future__ import annotations

import re

from ..errors import RegraftError

NUMBER = r"(?P<number>[0-9]*\.?[0-9]+(?:e[0-9]+)?)"  # 200000, 1.5, .5, 1e9
BYTE_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
COUNT_UNITS = BYTE_UNITS | {"B": 10**9}
CONTEXT_UNITS = {"": 1, "K": 1024}


def parse_bytes(text: str, name: str = "size") -> int:
    """A size in bytes: "4GB", "1.5 MB", "500M" or "1000"; units are powers of ten.

    Args:
        text: the size. The final B may be left out; case does not matter.
        name: what the size is of, for the error message.

    RegraftError when it is no size. Zero is one: the caller says whether it makes sense.
    """
    found = re.fullmatch(rf"{NUMBER} *(?P<unit>[KMGT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise RegraftError(f"{name} is '{text}': give a size in bytes such as 4GB, 80GB or 512MB")
    return int(float(found["number"]) * BYTE_UNITS[found["unit"].upper()])


def parse_count(text: str, name: str = "count") -> int:
    """A count of tokens or the like: "1B", "1.5M", "64k", "1e9" or "200000"; powers of ten.

    Args:
        text: the count. G means the same as B, T is 10^12. A further B is ignored ("64MB"); case
            does not matter.
        name: what is counted, for the error message.

    RegraftError when it is no count. Zero is one: the caller says whether it makes sense.
    """
    found = re.fullmatch(rf"{NUMBER} *(?P<unit>[KMGBT]?)B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise RegraftError(f"{name} is '{text}': give a count such as 200000, 64k, 2M or 1B")
    return int(float(found["number"]) * COUNT_UNITS[found["unit"].upper()])


def parse_context_length(text: str, name: str = "length") -> int:
    """A context length in tokens: "512" or "16k", where 1k is 1,024.

    Args:
        text: the length, a whole number; case does not matter.
        name: what the length is of, for the error message.

    RegraftError when it is no whole number above zero.
    """
    found = re.fullmatch(r"(?P<number>[0-9]+) *(?P<unit>K?)", text.strip(), re.IGNORECASE)
    if found is None or int(found["number"]) == 0:
        raise RegraftError(
            f"{name} is '{text}', which is no length: give tokens such as 512 or 16k (16,384)"
        )
    return int(found["number"]) * CONTEXT_UNITS[found["unit"].upper()]
