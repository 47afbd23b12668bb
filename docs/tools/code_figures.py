"""Figures of a Python package: how its code is laid out, named and commented. Run: code_figures.py
FOLDER [README]

Definitions, for the .py files below the package's folder:

- top-level modules + folders: .py files in the folder itself without `__init__.py` and
  `__main__.py`, and its subfolders that hold Python files.
- functions of 20 lines or more without a comment, without a blank line (%): of all functions and
  methods whose `def` to last line is at least 20 lines; a comment is a `#` token, a blank line may
  be one of the docstring; both inside the function.
- lines over 100 characters (%): of all lines.
- comment lines (%): lines that hold a `#` token, of all lines.
- functions named by a bare participle (%): names of one word (underscores around it do not count)
  that end in -ed or -ing, or are one of a list of irregular participles such as `made` and `kept`;
  of all functions and methods.
- class names used more than once: names that two or more `class` statements of the package have,
  names with a leading underscore left out.
- README: words between white space, and fences that begin with ```python.
- complexity: 1 + one for each if, elif, for, while, except, comprehension, conditional expression,
  `case`, and each further operand of `and` / `or` (McCabe's count with the decisions inside
  expressions); of a function nested functions count towards both.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONG_FUNCTION, LONG_LINE, COMPLEX = 20, 100, 15
IRREGULAR = frozenset(
    "made told kept drawn written spread given taken held read shown found built run cut put set"
    " grown laid left lost met paid sent said seen sold spoken split stood thought understood worn"
    " won known chosen begun bound brought driven frozen hidden torn thrown gone sought bent".split()
)
DECISIONS = (
    ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.comprehension, ast.IfExp, ast.match_case,
)  # fmt: skip
Function = ast.FunctionDef | ast.AsyncFunctionDef

# This script on commit 3bd0684, the last one before the new layout.
BEFORE = ("40 + 11", "73 / 46", "10.5", "1.0", "18.5", "11", "4,317 / 1", "19")
# Measured once when the layout was planned, by an earlier script with the same aims; nobody
# measured them again.
OTHERS = {
    "equinox": ("22 + 4", "45 / 16", "0.1", "7.5", "0.6", "0", "605 / 2", ""),
    "einops": ("6 + 2", "", "", "5.3", "0", "3", "2,019 / 16", ""),
    "nanochat": ("13 + 0", "5 / 17", "3.3", "17.9", "0", "0", "2,422 / 0", ""),
    "mergekit": ("9 + 9", "57 / 9", "0.3", "3.5", "0.2", "1", "2,541 / 0", ""),
    "litgpt": ("14 + 7", "24 / 6", "4.4", "7.3", "0", "11", "4,069 / 2", ""),
    "httpx": ("16 + 1", "39 / 11", "0", "6.0", "2.2", "0", "716 / 5", ""),
    "attrs": ("12 + 0", "42 / 3", "0.2", "4.9", "1.3", "0", "1,053 / 1", ""),
    "pluggy": ("7 + 0", "", "", "9.0", "0", "0", "", ""),
}
ROWS = (
    "top-level modules + folders",
    "functions >= 20 lines with no comment / no blank line, %",
    "lines over 100 characters, %",
    "comment lines, %",
    "functions named by a bare participle, %",
    "class names used more than once",
    "README words / Python fences",
    "functions of complexity over 15",
)


@dataclass(frozen=True)
class SourceFile:
    """A file of the package, read once.

    Attributes:
        path: where it is.
        lines: its lines.
        tree: its syntax tree.
        comments: numbers of the lines that hold a comment.
    """

    path: Path
    lines: list[str]
    tree: ast.Module
    comments: frozenset[int]

    @classmethod
    def read(cls, path: Path) -> SourceFile:
        """Parse a file."""
        text = path.read_text(encoding="utf-8")
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        comments = frozenset(token.start[0] for token in tokens if token.type == tokenize.COMMENT)
        return cls(path, text.splitlines(), ast.parse(text), comments)

    def functions(self) -> Iterator[Function]:
        """Every function and method."""
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield node


def read_package(folder: Path) -> list[SourceFile]:
    """Every file of a package."""
    return [SourceFile.read(path) for path in sorted(folder.rglob("*.py"))]


def span(node: Function) -> range:
    """Numbers of a function's lines, decorators left out."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def is_bare_participle(name: str) -> bool:
    """Whether a function's name is one participle."""
    word = name.strip("_")
    return "_" not in word and (word.endswith(("ed", "ing")) or word in IRREGULAR)


def complexity(node: ast.AST) -> int:
    """Decisions of a function, plus one."""
    inside = list(ast.walk(node))
    operands = sum(len(one.values) - 1 for one in inside if isinstance(one, ast.BoolOp))
    return 1 + operands + sum(isinstance(one, DECISIONS) for one in inside)


def measure(folder: Path, readme: Path | None) -> tuple[str, ...]:
    """One column of the table, in the order of ROWS."""
    files = read_package(folder)
    modules = sum(not file.name.startswith("__") for file in folder.glob("*.py"))
    folders = sum(any(child.rglob("*.py")) for child in folder.iterdir() if child.is_dir())

    functions = [(file, node) for file in files for node in file.functions()]
    long = [(file, span(node)) for file, node in functions if len(span(node)) >= LONG_FUNCTION]
    uncommented = sum(not file.comments.intersection(lines) for file, lines in long)
    dense = sum(all(file.lines[n - 1].strip() for n in lines) for file, lines in long)

    lines = [line for file in files for line in file.lines]
    comments = sum(len(file.comments) for file in files)
    participles = sum(is_bare_participle(node.name) for _, node in functions)
    classes = Counter(
        node.name
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    text = readme.read_text(encoding="utf-8") if readme else ""
    fences = len(re.findall(r"^```python", text, re.M))

    def share(part: int, whole: int, digits: int = 1) -> str:
        return f"{100 * part / whole:.{digits}f}" if whole else ""

    return (
        f"{modules} + {folders}",
        f"{share(uncommented, len(long), 0)} / {share(dense, len(long), 0)}",
        share(sum(len(line) > LONG_LINE for line in lines), len(lines)),
        share(comments, len(lines)),
        share(participles, len(functions)),
        str(sum(count > 1 for count in classes.values())),
        f"{len(text.split()):,} / {fences}" if readme else "",
        str(sum(complexity(node) > COMPLEX for _, node in functions)),
    )


def list_complex(folder: Path) -> list[tuple[int, str, Path, int]]:
    """(complexity, name, file, line) of functions over the limit, the highest first."""
    found = [
        (complexity(node), node.name, file.path, node.lineno)
        for file in read_package(folder)
        for node in file.functions()
    ]
    return sorted((one for one in found if one[0] > COMPLEX), reverse=True)


def figures_page() -> str:
    """The page of the site: definitions, and the table with the packages that served as models."""
    definitions = (__doc__ or "").split("\n\n", 1)[1].strip()
    now = measure(ROOT / "regraft", ROOT / "README.md")
    columns = {"regraft": now, "before": BEFORE, **OTHERS}
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    for number, row in enumerate(ROWS):
        cells = [column[number] or "-" for column in columns.values()]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return (
        "\n\n".join(
            [
                "# Figures of the code",
                (
                    "How the code of regraft is laid out, named and commented, beside other Python"
                    " packages. The column *regraft* is measured while this page is built (`python"
                    " docs/tools/code_figures.py regraft README.md`); *before* is the same script"
                    " on commit 3bd0684, the last one before the new layout. The other columns are"
                    " quoted: they were measured once, when the layout was planned, by an earlier"
                    " script that was not kept. For regraft that script said 70 / 42 where this one"
                    " says 73 / 46, 1.2 where it says 1.0 and 17.1 where it says 18.5 (of a"
                    " slightly older commit), so small differences between columns mean nothing. A"
                    " dash: not measured."
                ),
                "\n".join(lines),
                "## Definitions",
                definitions,
            ]
        )
        + "\n"
    )


def main() -> None:
    """Print the figures of a package."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("readme", type=Path, nargs="?")
    parser.add_argument("--complex", action="store_true", help="list functions over the limit")
    options = parser.parse_args()
    for row, value in zip(ROWS, measure(options.folder, options.readme), strict=True):
        print(f"{value or '-':>12}  {row}")
    if options.complex:
        for count, name, path, line in list_complex(options.folder):
            print(f"{count:>12}  {name}  {path}:{line}")


if __name__ == "__main__":
    sys.exit(main())
