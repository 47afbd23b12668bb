"""A text for comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    words = "the law of the land is that a wider model is the same model".split()
    lines = (" ".join(words[i % 13 :] + words[: i % 7]) for i in range(120))
    file.write_text("\n\n\n".join(lines), encoding="utf-8")
    return file
