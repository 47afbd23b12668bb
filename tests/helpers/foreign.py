"""Folders of other people's files, the commands that write beside, into or over them, and what of
the files must be as it was.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.faults import Finished, ForkServer
from helpers.kill import make_inputs

MODEL_FILES = ("config.json", "model.safetensors", "README.md", "lineage.json", "tokenizer.json")


@dataclass
class Case:
    """A folder of somebody's files and what a command is told about it.

    Every file below `root` is somebody's, but for `owned`.

    Attributes:
        root: has everything.
        out: the output as it is given on the command line, `place/o` by default.
        cwd: the current folder.
        source: the model that is read.
        data: the text that is read.
        teacher_cache: folder of `--teacher-cache`.
        cache: folder of `--cache`.
        scratch: folder of `--scratch`.
        moments: file of `--optimizer-state`.
        recipe: of `run`.
        comparison: of `compare`.
        owned: files that regraft wrote and nobody has changed.
    """

    root: Path
    out: str = ""
    cwd: Path = Path()
    source: str = ""
    data: str = ""
    teacher_cache: str = ""
    cache: str = ""
    scratch: str = ""
    moments: str = ""
    recipe: str = ""
    comparison: str = ""
    owned: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        inputs, place = self.root / "in", self.root / "place"
        place.mkdir(exist_ok=True)
        (self.root / "tmp").mkdir(exist_ok=True)
        self.cwd = place
        self.out = str(place / "o")
        self.source = str(inputs / "source")
        self.data = str(inputs / "text.txt")
        self.teacher_cache = str(place / "teacher")
        self.cache = str(place / "tokens")
        self.scratch = str(place / "scratch")
        self.moments = str(inputs / "moments.safetensors")
        self.recipe = str(inputs / "recipe.yaml")
        self.comparison = str(inputs / "comparison.yaml")

    @property
    def place(self) -> Path:
        """Where the output is by default."""
        return self.root / "place"

    @property
    def o(self) -> Path:
        """The default output."""
        return self.place / "o"

    def write(self, *names: str, under: Path | None = None) -> None:
        """Files with a text of their own, by path below the output's folder or another one."""
        for name in names:
            file = (under or self.o) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"mine: {name}\n")

    def model(self, folder: Path | None = None) -> Path:
        """A finished model that regraft wrote, at the output by default."""
        folder = folder or self.o
        shutil.copytree(self.root / "in" / "grown", folder, symlinks=True)
        self.owned |= {path for path in folder.rglob("*") if not path.is_dir()}
        return folder


# The verbs. `{..}` is a field of the case.
SIZES = "--data {data} --tokens 64 --length 32 --batch 1"
COMMANDS = {
    "grow": "grow {source} {out} --layers 3",
    "grow --overwrite": "grow {source} {out} --layers 3 --overwrite",
    "grow --optimizer-state": "grow {source} {out} --layers 3 --optimizer-state {moments}",
    "grow --optimizer-state --overwrite": (
        "grow {source} {out} --layers 3 --optimizer-state {moments} --overwrite"
    ),
    "grow LiGO --overwrite": (
        "grow {source} {out} --layers 3 --width-init ligo --data {data} --overwrite"
        ' --fit {"steps":1,"batch":1,"length":16}'
    ),
    "linearize": "linearize {source} {out} --keep 0 --window 16",
    "linearize --overwrite": "linearize {source} {out} --keep 0 --window 16 --overwrite",
    "linearize --tokens": (
        "linearize {source} {out} --method supra --cache {cache} --data {data} --tokens 64"
        " --length 32"
    ),
    "linearize --tokens --overwrite": (
        "linearize {source} {out} --method supra --data {data} --tokens 64 --length 32 --overwrite"
    ),
    "linearize --tokens --overwrite, no data": (
        "linearize {source} {out} --method supra --data {data}.gone --tokens 64 --overwrite"
    ),
    "train": f"train {{source}} {{out}} --stage next {SIZES}",
    "train --keep-moments --cache": (
        f"train {{source}} {{out}} --stage next {SIZES} --keep-moments --cache {{cache}}"
    ),
    "train --moments": f"train {{source}} {{out}} --stage next {SIZES} --moments {{moments}}",
    "train --teacher-cache": (
        f"train {{linear}} {{out}} --teacher {{source}} {SIZES} --teacher-cache {{teacher_cache}}"
    ),
    "train --stream": (
        f"train {{linear}} {{out}} --teacher {{source}} --stage align --stream {SIZES}"
    ),
    "train --stream --scratch": (
        f"train {{linear}} {{out}} --teacher {{source}} --stage align --stream {SIZES}"
        " --scratch {scratch} --calibration 32"
    ),
    "run": "run {recipe} {out}",
    "compare": "compare {comparison} {out}",
    "eval --plot": "eval {source} --data {data} --windows 1 --length 32 --positions --plot",
    "bench --plot": "bench {source} --lengths 8 --steps 1 --plot",
    "demo": "demo {out}",
}


def words_of(line: str, case: Case) -> list[str]:
    """A command line for a case."""
    values = {name: str(value) for name, value in vars(case).items()}
    values["linear"] = str(case.root / "in" / "linear")
    words = []
    for word in line.split():
        for name, value in values.items():
            word = word.replace(f"{{{name}}}", value)
        words.append(word)
    return words


Facts = tuple[str, int, int, bytes]


def facts(path: Path) -> Facts:
    """Kind, mode, modification time and contents of a file; of a folder without its time."""
    found = path.lstat()
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        return "link", 0, found.st_mtime_ns, os.fsencode(os.readlink(path))
    if stat.S_ISDIR(found.st_mode):
        return "folder", mode, 0, b""
    if stat.S_ISREG(found.st_mode):
        return "file", mode, found.st_mtime_ns, path.read_bytes()
    return "special", mode, found.st_mtime_ns, b""


def survey(root: Path) -> dict[Path, Facts]:
    """The facts of all that is below a folder, links not followed."""
    found: dict[Path, Facts] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            found[Path(folder) / name] = facts(Path(folder) / name)
    return found


@dataclass
class World:
    """What the cases are made from, and the server that runs the commands."""

    folder: Path
    server: ForkServer

    def case(self, fill: Callable[[Case], None]) -> Case:
        """A folder, made anew at the same place and filled with somebody's files."""
        root = self.folder / "root"
        if root.exists():
            for path in root.rglob("*"):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o755)
            shutil.rmtree(root)
        root.mkdir()
        shutil.copytree(self.folder / "in", root / "in", symlinks=True)
        for file in (root / "in").glob("*.yaml"):
            file.write_text(file.read_text().replace(str(self.folder / "in"), str(root / "in")))
        case = Case(root)
        fill(case)
        return case

    def try_command(self, case: Case, line: str) -> list[str]:
        """Run a command; what is wrong then."""
        before = survey(case.root)
        if "{data}" in line:  # what is read may not be replaced, whoever wrote it
            case.owned.discard(Path(case.data))
        try:
            made = self.server.run(
                words_of(line, case),
                case.root,
                cwd=case.cwd,
                env={"TMPDIR": str(case.root / "tmp"), "PIP_NO_INDEX": "1"},
                seconds=40,
            )
        except TimeoutError:
            return ["it hangs"]
        problems = check_manners(made) + check_files(case, before, made)
        if made.code == 0:  # a second command may replace what this one wrote
            case.owned |= {path for path in survey(case.root) if path not in before}
        return problems


def check_manners(made: Finished) -> list[str]:
    """Done, or refused in one line."""
    if "Traceback" in made.err:
        return [f"a traceback: {made.said}"]
    if made.code not in (0, 2):
        return [f"exit {made.code}: {made.said}"]
    if made.code == 2 and not made.said.startswith("regraft: "):
        return [f"exit 2 without a line: {made.said}"]
    return []


def check_files(case: Case, before: dict[Path, Facts], made: Finished) -> list[str]:
    """Nothing of what others wrote is gone or changed; a refused command leaves nothing."""
    after = survey(case.root)
    problems = []
    owned_folders = {parent for path in case.owned for parent in path.parents}
    foreign = {parent for path in before if path not in case.owned for parent in path.parents}
    for path, was in before.items():
        if path in case.owned or (path in owned_folders and path not in foreign):
            continue
        name = path.relative_to(case.root)
        if path not in after:
            problems.append(f"gone: {name}")
        elif after[path] != was:
            kinds = ("kind", "mode", "time", "bytes")
            parts = [k for k, a, b in zip(kinds, was, after[path], strict=True) if a != b]
            problems.append(f"changed: {name} ({', '.join(parts)})")
    if made.code == 2:
        left = sorted(str(path.relative_to(case.root)) for path in set(after) - set(before))
        if left:
            problems.append(f"refused ({made.said[:100]}), and leaves {left[:4]}")
    return problems


def make_world(folder: Path, server: ForkServer) -> World:
    """The world of the cases, in a folder."""
    inputs = folder / "in"
    make_inputs(inputs, server)
    grow = ["grow", str(inputs / "source"), str(inputs / "grown"), "--ffn", "60"]
    made = server.run(grow, inputs)
    assert made.code == 0, made.err
    return World(folder, server)
