"""Text of several kinds for trials of linearization on real models: novels, non-fiction,
encyclopedia, documentation.

Files are text (.txt, .txt.xz) whose works are set apart by two blank lines, or .jsonl; of each a
part of about --characters, in pieces of some 8,000 characters that end with a paragraph, drawn with
a fixed seed. Run: python benchmarks/training_text.py OUT.jsonl FILE[:CHARACTERS] ...
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from pathlib import Path

PIECE = 8000


def works(file: Path) -> list[str]:
    """The documents of a file."""
    opened = (
        lzma.open(file, "rt", encoding="utf-8")
        if file.suffix == ".xz"
        else file.open(encoding="utf-8")
    )
    with opened as text:
        if ".jsonl" in file.suffixes:
            return [json.loads(line)["text"] for line in text]
        return text.read().split("\n\n\n")


def pieces(work: str) -> list[str]:
    """A document cut behind paragraphs."""
    found, held = [], ""
    for line in work.strip().split("\n"):
        held += line + "\n"
        if len(held) > PIECE:
            found, held = [*found, held.strip()], ""
    return [*found, held.strip()] if held.strip() else found


def part(file: Path, characters: int | None, draw: random.Random) -> list[str]:
    """Pieces of a file, in random order, until there are so many characters."""
    found = [piece for work in works(file) for piece in pieces(work)]
    draw.shuffle(found)
    count, size = 0, 0
    while count < len(found) and (characters is None or size <= characters):
        size, count = size + len(found[count]), count + 1
    return found[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", metavar="FILE[:CHARACTERS]")
    options = parser.parse_args()
    draw, documents = random.Random(0), []
    for word in options.files:
        name, _, characters = word.partition(":")
        documents += part(Path(name), int(characters) if characters else None, draw)
    draw.shuffle(documents)
    with options.out.open("w", encoding="utf-8") as out:
        for document in documents:
            out.write(json.dumps({"text": document}) + "\n")
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main()
