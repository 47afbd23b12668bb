"""Stands for torchvision where vLLM imports it: its Qwen3.5 loads code for pictures that no test
runs, and the package itself wants the torch that it was built for.
"""

from __future__ import annotations

from typing import Any

__version__ = "0"


class _Anything(type):
    """A class whose every attribute is another one."""

    def __getattr__(cls, name: str) -> Any:
        return _make(name)


def _make(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything(name, (), {})


def __getattr__(name: str) -> Any:
    return _make(name)
