"""Runs every verb with every flag that touches the disk in folders of other people's files.

python benchmarks/foreign_files.py FOLDER [--only REGEX] [--verbs REGEX]

Every file that regraft did not write must be there afterwards, with the same bytes, mode and
modification time; the command must have succeeded, or ended with exit 2 and one line, leaving
nothing. Prints a table, then what went wrong. FOLDER/results.jsonl keeps what is done: the same
command goes on. tests/helpers/foreign.py has the folders and the commands.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.faults import ForkServer  # noqa: E402
from helpers.foreign import COMMANDS, make_world  # noqa: E402
from helpers.foreign_folders import FOLDERS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="folders whose name has this pattern")
    parser.add_argument("--verbs", default="", help="commands whose name has this pattern")
    given = parser.parse_args()
    place = given.folder.resolve()
    place.mkdir(parents=True, exist_ok=True)
    file = place / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["folder"], row["verb"]) for row in rows}

    verbs = [name for name in COMMANDS if re.search(given.verbs, name)]
    folders = [name for name in FOLDERS if re.search(given.only, name)]
    with ForkServer(place / "server") as server, file.open("a") as stream:
        world = make_world(place / "world", server)
        for verb in verbs:
            for folder in folders:
                if (folder, verb) in done:
                    continue
                problems = world.try_command(world.case(FOLDERS[folder]), COMMANDS[verb])
                rows.append({"folder": folder, "verb": verb, "problems": problems})
                stream.write(json.dumps(rows[-1]) + "\n")
                stream.flush()

    print(f"{'verb':45} {'folders':>8} {'kept':>6} {'failed':>6}")
    for verb, count in Counter(row["verb"] for row in rows).items():
        bad = sum(bool(row["problems"]) for row in rows if row["verb"] == verb)
        print(f"{verb:45} {count:8} {count - bad:6} {bad:6}")
    for row in rows:
        for problem in row["problems"]:
            print(f"{row['verb']} | {row['folder']} | {problem}")
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main()
