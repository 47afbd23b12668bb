"""Channels of layers with a state or a convolution, in classes that fix them to the hidden size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shapes import Law, parse_name

if TYPE_CHECKING:
    from .draft import Draft


def find_scope(draft: Draft, template: str) -> str:
    """The module with a convolution over time that a tensor is in; empty without."""
    for name, module in draft.names.by_name.items():
        scope = parse_name(f"{name}.x").module.rpartition(".")[0]
        if type(module).__name__ == "Conv1d" and template.startswith(f"{scope}."):
            return scope
    return ""


def writes_stream(template: str) -> bool:
    """Whether a matrix of such a module gives the module's output, by its name."""
    return template.rpartition(".")[0].endswith((".out_proj", ".linear_out"))


def find_inner(draft: Draft) -> Law | None:
    """The number of channels, a whole number of times the hidden size; None where it has a key of
    its own, or there are no such layers.
    """
    hidden = str(draft.keys["hidden"])
    for template, laws in draft.laws.laws.items():
        if len(laws) == 2 and writes_stream(template) and find_scope(draft, template):
            law = laws[1]
            if law and len(law) == 1 and dict(next(iter(law))).get(hidden) == 1:
                return law
    return None


def divide_by_hidden(draft: Draft, law: Law) -> Law:
    """A size that has the hidden size as a factor, without it."""
    hidden = str(draft.keys["hidden"])
    ((monomial, factor),) = law.items()
    return {tuple(pair for pair in monomial if pair[0] != hidden): factor}


def count_inner(law: Law | None, inner: Law) -> tuple[int, Law]:
    """(how often a dimension has all channels, what is left of it)."""
    ((monomial, factor),) = inner.items()
    times = (law or {}).get(monomial, 0.0) / factor
    if times != round(times) or times < 1:
        return 0, dict(law or {})
    return round(times), {key: value for key, value in (law or {}).items() if key != monomial}
