"""A griffe extension: docstrings that the package fills in when it is imported.

The steps of growth have `{operators}` and the like in their docstrings, which a decorator fills
from the tables of operators. mkdocstrings reads source files without running them, so such
docstrings are taken from the imported object.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

PLACEHOLDER = re.compile(r"\{[a-z_]+\}")


class RuntimeDocstrings(griffe.Extension):
    """Replaces docstrings that hold a placeholder by those of the running object."""

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Called for every class that griffe has read."""
        if cls.docstring and PLACEHOLDER.search(cls.docstring.value):
            text = inspect.getdoc(griffe.dynamic_import(cls.path)) or ""
            if not PLACEHOLDER.search(text):
                cls.docstring.value = text
