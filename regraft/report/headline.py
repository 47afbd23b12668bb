"""What a person sees first of a run: how much of the teacher is left, how fast, how small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation.baselines import TEACHER, ZERO_TOKEN
from .units import format_bytes, format_number


@dataclass(frozen=True)
class Headline:
    """A number large enough to read first, and what it is."""

    value: str
    words: str


def headlines(numbers: Mapping[str, Any]) -> list[Headline]:
    """The headlines of a run.

    Args:
        numbers: what `html.collect` gives.
    """
    return [*_quality(numbers.get("eval") or {}), *_speed(numbers.get("bench") or {})]


def _quality(evaluation: Mapping[str, Any]) -> Iterator[Headline]:
    rows = evaluation.get("baselines", {})
    own, teacher = evaluation.get("perplexity"), rows.get(TEACHER, {}).get("perplexity")
    if not own or not teacher:
        return
    # Perplexity is the inverse of the mean likelihood of a token.
    words = f"of the teacher's likelihood per token (perplexity {own:.4g}, teacher {teacher:.4g})"
    yield Headline(f"{teacher / own:.1%}", words)

    untrained = {name: rows[name].get("perplexity") for name in ZERO_TOKEN if name in rows}
    best = min((value, name) for name, value in untrained.items() if value) if untrained else None
    if best:
        value, name = best
        share = (value - own) / (value - teacher) if value > teacher else 0.0
        if share > 0:
            yield Headline(f"{share:.0%}", f"of the gap closed that '{name}' leaves ({value:.4g})")
        else:
            yield Headline("behind", f"'{name}', which costs no training ({value:.4g})")


def _speed(models: Mapping[str, Any]) -> Iterator[Headline]:
    teacher, student = models.get("teacher") or [], models.get("student") or []
    if not teacher or not student:
        return
    slow, fast = teacher[-1], student[-1]
    context = f"{fast['length']:,} tokens of context"
    if slow.get("decode_tok_s") and fast.get("decode_tok_s"):
        about = "about " if "decode_tok_s" in _guesses(slow) | _guesses(fast) else ""
        yield Headline(
            f"{about}{fast['decode_tok_s'] / slow['decode_tok_s']:.2f}x",
            f"the teacher's writing speed at {context} ({format_number(fast['decode_tok_s'])}"
            f" against {format_number(slow['decode_tok_s'])} tokens/s)",
        )
    if slow.get("state_bytes") and fast.get("state_bytes"):
        yield Headline(
            format_bytes(fast["state_bytes"]),
            f"of state at {context} (the teacher's cache: {format_bytes(slow['state_bytes'])})",
        )


def _guesses(row: Mapping[str, Any]) -> set[str]:
    return set(row.get("extrapolated") or ())
