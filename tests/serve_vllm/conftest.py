"""Figures of the tests, printed at the end."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    for report in reports:
        for engine, figures in getattr(report, "user_properties", ()):
            terminalreporter.write_line(f"{engine} | {figures}")
