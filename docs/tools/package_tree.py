"""The annotated tree of the repository: every folder and file with the first sentence of its
docstring.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOWN = ("regraft", "benchmarks", "docs/tools", "tests")


def read_purpose(file: Path) -> str:
    """The first sentence of a file's docstring, on one line."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split())
    return first.split(". ")[0].rstrip(".")


def list_modules(folder: Path) -> list[Path]:
    """A folder's own Python files, without `__init__.py`."""
    return sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")


def list_folders(folder: Path) -> list[Path]:
    """Subfolders that hold Python files."""
    return sorted(
        child
        for child in folder.iterdir()
        if child.is_dir() and child.name != "__pycache__" and any(child.rglob("*.py"))
    )


def list_tree(folder: Path, depth: int = 0) -> list[str]:
    """The lines of a folder: its files, then its subfolders."""
    init = folder / "__init__.py"
    purpose = read_purpose(init) if init.is_file() else ""
    lines = [format_line(folder.name + "/", purpose, depth)]
    lines += [
        format_line(file.name, read_purpose(file), depth + 1) for file in list_modules(folder)
    ]
    for child in list_folders(folder):
        lines += list_tree(child, depth + 1)
    return lines


def format_line(name: str, purpose: str, depth: int) -> str:
    """One line of the tree."""
    return f"{'    ' * depth}- `{name}`{': ' * bool(purpose)}{escape(purpose)}"


def escape(text: str) -> str:
    """Markdown's signs outside of code."""
    parts = text.split("`")
    parts[::2] = [
        part.replace("*", "\\*").replace("_", "\\_").replace("<", "\\<") for part in parts[::2]
    ]
    return "`".join(parts)


def tree_page() -> str:
    """The page of the site."""
    blocks = [
        "# The tree",
        (
            "Every folder and file with the first sentence of its docstring, read while this page"
            " is built. A folder's line is that of its `__init__.py`."
        ),
    ]
    for name in SHOWN:
        blocks += [f"## {name}", "\n".join(list_tree(ROOT / name))]
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    print(tree_page())
