"""beartype for the shapes in signatures. It costs a millisecond for each function, which is paid
once for those that other functions make again at each call.
"""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

from beartype import beartype

_known: dict[tuple[str, str, str], Any] = {}


def typechecked(function: Any) -> Any:
    """A function that checks its arguments and its value.

    jaxtyping gives functions without a body, so that two of one name and signature are the same.
    """
    if not isinstance(function, FunctionType) or "<locals>" not in function.__qualname__:
        return beartype(function)
    key = (function.__module__, function.__qualname__, str(inspect.signature(function)))
    if key not in _known:
        _known[key] = beartype(function)
    return _known[key]
