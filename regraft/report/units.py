"""Numbers as people read them."""

from __future__ import annotations

from typing import Any

from ..progress import format_seconds

FLOP_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))


def format_number(value: Any) -> str:
    """A number for reading: 4 significant digits, thousands separated, an em dash for nothing."""
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_bytes(count: int | None) -> str:
    """Bytes in MiB, from one GiB on in GiB."""
    if count is None:
        return "—"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.4g} MiB"


def format_flops(count: float) -> str:
    """FLOPs in the largest unit of which there is one at least."""
    for size, unit in FLOP_UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f} FLOP"


def format_speed(value: float | None, extrapolated: bool) -> str:
    """Tokens per second; ~ before what follows from shorter contexts."""
    return f"{'~' if extrapolated else ''}{format_number(value)}"


def format_duration(seconds: float) -> str:
    """Seconds below a minute with a tenth, else as minutes or hours."""
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)
