"""Commands on tiny models that are killed, or run out of disk, at any change of the file system,
and what must be true afterwards.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.comparison import TINY
from helpers.faults import FAIL, KILL, UNDISTURBED, Change, Fault, Finished, ForkServer
from helpers.tiny import save_model, write_text

# Keys of JSON objects that hold a time, a speed or a memory.
CLOCK = re.compile("second|peak_share|phases|created|^time$")
# Files whose bytes must be those of the undisturbed run; of others the name must be.
EXACT = re.compile(
    r"\.safetensors$|^config\.json$|tokenizer|generation_config|\.py$|\.index\.json$|chat_template"
)
ROWS = ("metrics.jsonl", "lineage.json", "eval.json", "compare.json", "done.json", "ledger.json")
# Names with a hash of a time or with random letters: files of a teacher cache, folders of a cache
# of tokens.
RANDOM_NAME = re.compile(r"/[0-9a-f]{32}-[0-9a-f]{8}(?=\.safetensors$)|(?<=-)[0-9a-f]{16}(?=/|$)")
MODEL = ("model.safetensors", "config.json", "lineage.json")  # of a finished model


@dataclass(frozen=True)
class Command:
    """A command line whose output is `place/out` of a root that has the inputs.

    Attributes:
        words: behind `regraft`; `{in}` is the folder of inputs, `{out}` the output.
        before: command lines run before, such as one that makes the output to overwrite.
        shared: folders that keep rows for other runs, whose files may be split in another way.
    """

    words: str
    before: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()

    @property
    def measures(self) -> bool:
        """Whether more files follow when its model is there."""
        return self.words.startswith("run ")

    @property
    def overwrites(self) -> bool:
        """Whether it replaces an output."""
        return "--overwrite" in self.words


TRAIN = "--data {in}/text.txt --tokens 192 --length 32 --batch 2 --save-seconds 0"
LINEARIZE = "--keep 0 --window 16 --sinks 2"
METHOD = "linearize {in}/source {out} --method supra --data {in}/text.txt --tokens 128 --length 32"
OLD = "grow {in}/source {out} --ffn 60"

COMMANDS: dict[str, Command] = {
    "grow": Command("grow {in}/source {out} --hidden 45 --layers 3"),
    "grow with moments": Command(
        "grow {in}/source {out} --layers 3 --optimizer-state {in}/moments.safetensors"
    ),
    "grow with LiGO": Command(
        "grow {in}/source {out} --layers 3 --width-init ligo --data {in}/text.txt"
        ' --fit {"steps":3,"batch":2,"length":32}'
    ),
    "grow over a model": Command("grow {in}/source {out} --layers 3 --overwrite", (OLD,)),
    "grow with moments over a model": Command(
        "grow {in}/source {out} --layers 3 --optimizer-state {in}/moments.safetensors --overwrite",
        (OLD + " --optimizer-state {in}/moments.safetensors",),
    ),
    "linearize": Command(f"linearize {{in}}/source {{out}} {LINEARIZE}"),
    "linearize over a model": Command(
        f"linearize {{in}}/source {{out}} {LINEARIZE} --overwrite", (OLD,)
    ),
    "linearize with measured layers": Command(
        "linearize {in}/source {out} --keep restore:1 --data {in}/text.txt"
    ),
    "linearize and train": Command(METHOD),
    "linearize and train over a model": Command(METHOD + " --overwrite", (OLD,)),
    "train next": Command(f"train {{in}}/source {{out}} --stage next {TRAIN} --keep-moments"),
    "train with moments and held-out text": Command(
        f"train {{in}}/source {{out}} --stage next {TRAIN} --moments {{in}}/moments.safetensors"
        " --heldout {in}/heldout.txt --every 1 --cache {place}/tokens",
        shared=("place/tokens",),
    ),
    "train align": Command(
        f"train {{in}}/linear {{out}} --teacher {{in}}/source --stage align {TRAIN}"
    ),
    "train distil with a teacher cache": Command(
        f"train {{in}}/linear {{out}} --teacher {{in}}/source --stage distil {TRAIN}"
        " --teacher-cache {place}/teacher",
        shared=("place/teacher",),
    ),
    "train layer by layer": Command(
        "train {in}/linear {out} --teacher {in}/source --stage align --stream --data {in}/text.txt"
        " --tokens 128 --length 32 --batch 2 --calibration 64"
    ),
    "run": Command("run {in}/recipe.yaml {out}"),
    "compare": Command("compare {in}/comparison.yaml {out}", shared=("place/out/data/tokens",)),
}


def make_inputs(folder: Path, server: ForkServer) -> None:
    """Models, moments, texts and recipes; what is in the folder is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    save_model(folder / "source", layers=2)
    write_text(folder / "text.txt", documents=3, words=80)
    write_text(folder / "heldout.txt", documents=1, words=60)
    torch.manual_seed(1)
    weights = load_file(folder / "source" / "model.safetensors")
    moments = {f"exp_avg/{name}": 1e-3 * torch.randn_like(one) for name, one in weights.items()}
    moments |= {f"exp_avg_sq/{name}": 1e-6 * torch.rand_like(one) for name, one in weights.items()}
    moments |= {f"step/{name}": torch.tensor(7.0) for name in weights}
    save_file(moments, folder / "moments.safetensors")

    words = f"linearize {folder}/source {folder}/linear {LINEARIZE}".split()
    made = server.run(words, folder)
    assert made.code == 0, made.err
    recipe = {
        "source": str(folder / "source"),
        "train": [{"path": str(folder / "text.txt")}],
        "heldout": str(folder / "heldout.txt"),
        "remix": {"keep": "0", "window": 16, "sinks": 2},
        "calibration": 64,
        "stages": [
            {"kind": "align", "tokens": 64, "length": 32, "batch": 1, "precision": "float32"},
            {"kind": "distil", "tokens": 64, "length": 32, "batch": 1, "precision": "float32"},
        ],
        "measure": {
            "windows": 2,
            "length": 32,
            "bench": [],
            "prompts": ["the"],
            "sample_tokens": 3,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    comparison = TINY | {
        "data": str(folder / "text.txt"),
        "pretrain": {"tokens": 128, "length": 16, "batch": 4},
        "train": {"tokens": 128, "length": 16, "batch": 4},
        "seeds": [0],
        "every": 1,
        "rows": 2,
    }
    (folder / "comparison.yaml").write_text(yaml.safe_dump(comparison))


@dataclass
class Trial:
    """A command in a folder that is made anew for each try.

    Attributes:
        command: what is run.
        root: the folder: `in`, `place` with the output, `tmp` for temporary files.
        template: what `root` is copied from.
        server: runs the command.
        expected: what an undisturbed run leaves, see `read_tree`.
        old: the output that it replaces.
        changes: what an undisturbed run changes.
    """

    command: Command
    root: Path
    template: Path
    server: ForkServer
    expected: dict[str, bytes] = field(default_factory=dict)
    old: dict[str, bytes] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """The output."""
        return self.root / "place" / "out"

    def words(self, line: str) -> list[str]:
        """A command line's words."""
        values = {
            "{in}": str(self.root / "in"),
            "{out}": str(self.out),
            "{place}": str(self.root / "place"),
        }
        words = line.split()
        for key, value in values.items():
            words = [word.replace(key, value) for word in words]
        return words

    def run(self, fault: Fault = UNDISTURBED, line: str = "") -> Finished:
        """Run the command, or another one."""
        return self.server.run(
            self.words(line or self.command.words),
            self.root,
            fault,
            cwd=self.root / "place",
            env={"TMPDIR": str(self.root / "tmp")},
        )

    def reset(self) -> None:
        """Make the folder as it was before the command."""
        if self.root.exists():
            shutil.rmtree(self.root)
        shutil.copytree(self.template, self.root, symlinks=True)

    def prepare(self) -> None:
        """Run what comes before, then the command, undisturbed."""
        shutil.copytree(self.root / "in", self.template / "in", dirs_exist_ok=True)
        (self.template / "place").mkdir()
        (self.template / "tmp").mkdir()
        self.reset()
        for line in self.command.before:
            made = self.run(line=line)
            assert made.code == 0, made.err
        shutil.rmtree(self.template)
        shutil.copytree(self.root, self.template, symlinks=True)
        self.old = read_tree(self.out)

        made = self.run()
        assert made.code == 0, made.err
        self.changes = made.changes
        self.expected = self.read()

    def read(self) -> dict[str, bytes]:
        """What is in the folder; files of shared caches without what is random of their names."""
        tree = read_tree(self.root)
        for folder in self.command.shared:
            for name in [name for name in tree if name.startswith(f"{folder}/")]:
                tree.pop(name)
                tree[RANDOM_NAME.sub("/*", name)] = b""
        return tree

    def check_output(self) -> list[str]:
        """What is wrong with the output after the command has stopped: it is the old one, nothing
        that looks finished, or the new one.
        """
        if self.old:
            found = read_tree(self.out)
            if found == self.old or self.is_finished(found):
                return []
            return [f"the old output is damaged: {difference(found, self.old)}"]
        found = read_tree(self.out)
        if "config.json" not in found or self.is_finished(found):
            return []
        return ["an unfinished output has a config.json: " + difference(found, self.new)]

    @property
    def new(self) -> dict[str, bytes]:
        """What an undisturbed run leaves in the output."""
        prefix = "place/out/"
        return {
            name[len(prefix) :]: data
            for name, data in self.expected.items()
            if name.startswith(prefix)
        }

    def is_finished(self, found: Mapping[str, bytes]) -> bool:
        """Whether an output has all its files as they are in the end, whatever else it has. An
        experiment measures its model when that is finished.
        """
        wanted = self.new
        if self.command.measures:
            wanted = {name: data for name, data in wanted.items() if name in MODEL}
        return all(found.get(name) == data for name, data in wanted.items())

    def check_end(self, made: Finished) -> list[str]:
        """What is wrong after the same command has ended again."""
        if made.code != 0:
            return [f"the same command ends with {made.code}: {made.said}"]
        found = self.read()
        return [] if found == self.expected else [difference(found, self.expected)]

    def kill_at(self, *points: int, torn: bool = False) -> list[str]:
        """Kill the command before a change, run it again, kill that before the next of the changes
        and so on, then run it to its end; what is wrong.
        """
        self.reset()
        problems = []
        for at in points:
            killed = self.run(Fault(KILL, at, torn))
            if killed.code == 0:  # it had fewer changes this time
                return problems + self.check_end(killed)
            if killed.code != -9:
                said = f"to be killed at {at}, it ended with {killed.code}: {killed.said}"
                return [*problems, said]
            problems += self.check_output()
        return problems + self.check_end(self.run())

    def repeat(self) -> list[str]:
        """Run the command again where `prepare` has left it, after its end; what is wrong. It has
        nothing to do, unless it overwrites.
        """
        before = modification_times(self.out)
        problems = self.check_end(self.run())
        if not self.command.overwrites and modification_times(self.out) != before:
            problems.append("the command that has nothing to do writes the model again")
        return problems

    def fail_at(self, at: int, kinds: int, **options: Any) -> list[str]:
        """Let changes fail from `at` on, run the command again without; what is wrong then."""
        self.reset()
        failed = self.run(Fault(FAIL, at, kinds=kinds, **options))
        problems = []
        if failed.code == 0:
            problems = self.check_end(failed)
        elif failed.code != 2 or not failed.said.startswith("regraft: "):
            problems = [f"a full disk ends it with {failed.code}: {failed.said}"]
        if "Traceback" in failed.err:
            problems.append(f"a full disk gives a traceback: {failed.said}")
        return problems + self.check_output() + self.check_end(self.run())


def read_tree(folder: Path) -> dict[str, bytes]:
    """Every file and folder below, by relative path, with what must be equal of it."""
    tree: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")) if folder.is_dir() else []:
        name = str(path.relative_to(folder))
        if path.is_symlink():
            tree[name] = b"link " + str(path.readlink()).encode()
        elif path.is_dir():
            tree[name] = b"folder"
        elif EXACT.search(path.name):
            tree[name] = path.read_bytes()
        elif path.name in ROWS:
            tree[name] = without_clocks(path.read_text())
        else:
            tree[name] = b"file"
    return tree


def modification_times(folder: Path) -> dict[str, int]:
    """When each file of weights in an output was written, by name."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


def without_clocks(text: str) -> bytes:
    """JSON, or a JSON object a line, without what depends on the machine's speed."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(part) for key, part in value.items() if not CLOCK.search(key)}
        return [strip(part) for part in value] if isinstance(value, list) else value

    def parse(part: str) -> Any:
        try:
            return json.loads(part)
        except ValueError:  # cut off by a kill
            return part

    whole = parse(text)
    rows = [whole] if isinstance(whole, dict) else [parse(line) for line in text.splitlines()]
    return json.dumps(strip(rows)).encode()


def difference(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> str:
    """What two trees differ in, in a few words."""
    parts = {
        "left over": sorted(set(found) - set(expected)),
        "missing": sorted(set(expected) - set(found)),
        "other bytes": sorted(
            name for name in set(found) & set(expected) if found[name] != expected[name]
        ),
    }
    return "; ".join(f"{words} {names[:6]}" for words, names in parts.items() if names)


@contextmanager
def fork_server(folder: Path) -> Iterator[ForkServer]:
    """A fork server with its inputs in `folder/in`."""
    with ForkServer(folder / "server") as server:
        make_inputs(folder / "in", server)
        yield server


def begin_trial(name: str, folder: Path, server: ForkServer) -> Trial:
    """A command that has run undisturbed in `folder/root`."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(folder / "in", root / "in")
    # Paths are stored in lineages and recipes: the inputs have to be where they are used.
    for file in (root / "in").glob("*.yaml"):
        file.write_text(file.read_text().replace(str(folder / "in"), str(root / "in")))
    template = Path(tempfile.mkdtemp(prefix="template-", dir=folder))
    trial = Trial(COMMANDS[name], root, template, server)
    trial.prepare()
    return trial


def sample_points(changes: Sequence[Change], kinds: int, last: int, spread: int) -> list[int]:
    """Numbers of changes of some kinds, from 1: the first, the last ones, some between them."""
    points = [number for number, change in enumerate(changes, 1) if change.kind & kinds]
    early = points[:-last] if last else points
    between = [early[step * len(early) // spread] for step in range(min(spread, len(early)))]
    return sorted({*between, *points[len(points) - last :]})
