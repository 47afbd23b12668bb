"""Kills commands on tiny models at every change of the file system, and fills the disk there.

python benchmarks/kill_everywhere.py FOLDER [--only grow,run] [--every 1] [--faults kill,space]

Every command runs undisturbed once. Then, for each change N of the file system that it made
(creating, writing, flushing, renaming, removing ..), it is run in a fresh folder and ended with
SIGKILL before change N (`kill`), in the middle of write N (`torn`), or from change N on the disk has
no space (`space`) or no inodes (`inodes`); then the same command is run again. It must end with
exit 0, with the files and bytes of the undisturbed run and no others; in between, nothing that is
unfinished may look finished, and what --overwrite replaces is whole until the new output is. Prints
a table, then what went wrong, by kind. FOLDER/results.jsonl keeps what is done: the same command
goes on.

tests/helpers/kill.py has the commands; a C compiler is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from helpers.faults import KINDS, NO_INODES, NO_SPACE, WRITE  # noqa: E402
from helpers.kill import COMMANDS, Trial, begin_trial, fork_server  # noqa: E402

FAULTS: dict[str, tuple[int, Callable[[Trial, int], list[str]]]] = {
    "kill": (sum(KINDS), lambda trial, at: trial.kill_at(at)),
    "torn": (WRITE, lambda trial, at: trial.kill_at(at, torn=True)),
    "space": (NO_SPACE, lambda trial, at: trial.fail_at(at, NO_SPACE, torn=True)),
    "inodes": (NO_INODES, lambda trial, at: trial.fail_at(at, NO_INODES)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=",".join(COMMANDS), help="commands, by commas")
    parser.add_argument("--every", type=int, default=1, help="try every so many changes")
    parser.add_argument("--last", type=int, default=12, help="the last changes are all tried")
    parser.add_argument("--faults", default=",".join(FAULTS))
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(row["command"], row["fault"], row["at"]) for row in rows}

    names = [name.strip() for name in given.only.split(",") if name.strip() in COMMANDS]
    with fork_server(folder) as server, file.open("a") as stream:
        if server.library is None:
            sys.exit("no C compiler: install cc")
        for name in names:
            begin = time.monotonic()
            trial = begin_trial(name, folder, server)
            for fault in given.faults.split(","):
                kinds, attempt = FAULTS[fault]
                points = [
                    number
                    for number, change in enumerate(trial.changes, 1)
                    if change.kind & kinds
                    and (number % given.every == 0 or number > len(trial.changes) - given.last)
                ]
                for at in points:
                    if (name, fault, at) in done:
                        continue
                    problems = attempt(trial, at)
                    row = {
                        "command": name,
                        "fault": fault,
                        "at": at,
                        "changes": len(trial.changes),
                        "change": str(trial.changes[at - 1]),
                        "problems": problems,
                    }
                    rows.append(row)
                    stream.write(json.dumps(row) + "\n")
                    stream.flush()
            print(f"{name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print_table(rows)
    sys.exit(any(row["problems"] for row in rows))


def print_table(rows: list[dict]) -> None:
    """Counts by command and fault, then the problems by kind."""
    print(f"{'command':40} {'fault':8} {'changes':>8} {'tried':>6} {'equal':>6} {'failed':>6}")
    for name, fault in dict.fromkeys((row["command"], row["fault"]) for row in rows):
        mine = [row for row in rows if (row["command"], row["fault"]) == (name, fault)]
        bad = sum(bool(row["problems"]) for row in mine)
        changes = mine[-1]["changes"]
        print(f"{name:40} {fault:8} {changes:8} {len(mine):6} {len(mine) - bad:6} {bad:6}")

    kinds: Counter[tuple[str, str, str]] = Counter()
    examples: dict[tuple[str, str, str], dict] = {}
    for row in rows:
        for problem in row["problems"]:
            kind = (row["command"], row["fault"], re.sub(r"[0-9a-f]{6,}|\d+", "N", problem))
            kinds[kind] += 1
            examples.setdefault(kind, row)
    for kind, count in kinds.most_common():
        row = examples[kind]
        print(f"\n{kind[0]}, {kind[1]}, {count} times, first at {row['at']} ({row['change']}):")
        print(f"  {kind[2]}")


if __name__ == "__main__":
    main()
