"""Files beside the weights: all of a model's folder travels to what is made from it, except what is
of a kind below. What stays behind is named with the reason.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io import hub, safetensors
from ..io.files import check_inside, parse_json, read_json, write_json
from ..io.identity import TOKENIZER
from ..io.output import MARKER
from . import lineage, undo
from .anatomy import find_anatomy, read_as_auto
from .sentence_transformers import find_module_weights, resize_modules

# Patterns of files that are refused, not left out, when they lead out of the folder.
SIDE_FILES = (
    *TOKENIZER,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)
OWN = {"config.json", lineage.FILE, undo.FILE, MARKER, safetensors.INDEX}  # written anew
SOURCE_CARD = "README.source.md"  # what the card of the source becomes

# Limits of what travels: bytes of a file and of all, files of a subfolder, levels of folders.
FILE_BYTES, ALL_BYTES, FOLDER_FILES, LEVELS = 256_000_000, 1_000_000_000, 1000, 4

# Folders, and then files, that stay behind: regular expression of the name -> why.
FOLDERS = {
    r"\..*|__\w+__": "hidden, or a cache",
    r"checkpoint-\d+|global_step\d+|runs|logs|wandb|tensorboard|mlruns|trackio": "of a training",
    r"original|onnx|openvino|coreml|gguf|tflite": "the model in another format",
}
CODE = r".*\.(py|pyc|pyd|pyx|ipynb|so(\.\d+)*|dll|dylib|exe|sh|bat|ps1|lua|js|rb|pl|cu|cc|cpp|c|h)"
FILES = {
    r"\..*": "hidden",
    # A run of regraft leaves these, and a further run would take them for its own.
    r"(metrics\.jsonl|optimizer\.safetensors|(track|time|plan|baselines|bench|ledger|eval|samples|"
    r"report)\.json|recipe\.yaml|report\.html)": "of a run of regraft",
    r"(optimizer|scheduler|scaler|rng_state|training_args)[^.]*\.(pth?|bin|safetensors)": (
        "of a training"
    ),
    r"trainer_state\.json": "of a training",
    r"(.*\.(safetensors|bin|h5|msgpack|pth?)\.index.*|openvino_model.*)\.\w+": "of other weights",
    r".*\.(safetensors|bin|pth?|ckpt|h5|hdf5|keras|msgpack|onnx(_data)?|gguf|ggml|ot|pb|tflite|"
    r"mlmodel|params|nemo|distcp|engine)": "weights",
    r".*\.(pkl|pickle|dill|joblib|npy|npz)": "a pickle, which can hold code",
    CODE: "code",
}
# How names of data and text end. Whatever ends in another way may be code or a pickle. The numbers
# are versions: tokenizer.model.v3, LICENSE-2.0.
DATA_NAME = re.compile(
    r"(LICEN[CS]E|NOTICE|COPYING|AUTHORS|CITATION)[^.]*"
    r"|.*\.(jsonl?|txt|model|jinja2?|tiktoken|vocab|spm|bpe|dict|md|rst|tex|pdf|apache|mit|bsd"
    r"|csv|tsv|ya?ml|toml|xml|cff|bib|cfg|ini|png|jpe?g|gif|webp|svg|wav|mp3|flac|mp4|parquet)"
    r"|.*\.v?\d+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SideFiles:
    """What becomes of the files beside a model's weights, by path in its folder.

    Attributes:
        copied: files that travel.
        left_out: files and folders that stay behind -> why.
        rewritten: new content of those of `copied` that are JSON and change.
        notes: what a person should know of the changes.
    """

    copied: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    rewritten: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_side_files(folder: Path, hidden: int, copy_code: bool = False) -> SideFiles:
    """What becomes of the files beside the weights in a model's directory.

    Args:
        folder: of the source.
        hidden: hidden size of what is made from it.
        copy_code: whether Python files travel; they are never run. They also do where they came
            along to this folder by the same wish.

    RegraftError for a file of SIDE_FILES that is no regular file of the folder, and for a module of
    sentence-transformers that cannot come along.
    """
    config = read_json(folder / "config.json")
    copy_code = copy_code or lineage.copied_code(folder)
    needed = find_module_weights(folder)
    # The code of a linearized model is written anew, and the card of regraft's own output.
    own = OWN | set(hub.list_weights(folder))  # those on the hub too
    own |= {file.name for file in folder.glob("*.py") if config.get("model_type") == "regraft"}
    own |= {lineage.CARD} if (folder / lineage.FILE).exists() else set()

    sizes: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for path, reason in walk(folder, folder):
        name = path.relative_to(folder).as_posix()
        if name in own:
            continue
        if reason == CODE and copy_code and path.suffix == ".py" or name in needed:
            reason = None
        if reason is None:
            sizes[name] = path.stat().st_size
        else:
            left_out[name] = FILES.get(reason, reason)

    # Small files first: what is over the limits is the largest.
    total = 0
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        total += sizes[name]
        if name not in needed and (sizes[name] > FILE_BYTES or total > ALL_BYTES):
            total -= sizes[name]
            limit = FILE_BYTES if sizes[name] > FILE_BYTES else ALL_BYTES
            left_out[name] = f"large: {sizes[name]:,} bytes, the limit is {limit:,}"
    copied = tuple(sorted(set(sizes) - set(left_out)))
    return describe_changes(folder, config, hidden, copied, dict(sorted(left_out.items())))


def describe_changes(
    folder: Path,
    config: Mapping[str, Any],
    hidden: int,
    copied: tuple[str, ...],
    left_out: dict[str, str],
) -> SideFiles:
    """The same with what changes in the files that travel: widths, and names of code.

    Args:
        folder: of the source.
        config: its config.json.
        hidden: hidden size of what is made from it.
        copied: files that travel.
        left_out: files that stay behind.
    """
    read = read_as_auto(config)
    rewritten = resize_modules(folder, find_anatomy(read).solve(read)["hidden"], hidden)
    notes = [f"{name} gets the width {hidden}" for name in rewritten]

    # A linearized model's own auto_map names code that is written with it.
    cut = ["config.json"] if config.get("model_type") != "regraft" else []
    cut = [name for name in cut if drop_missing_code(config, copied.__contains__) != config]
    for name in copied:
        value = read_auto_map(folder / name)
        changed = drop_missing_code(value, copied.__contains__)
        if changed != value:
            rewritten[name] = changed
            cut.append(name)
    if cut:
        notes.append(
            f"auto_map of {', '.join(cut)} is left out, since the code that it names is not copied:"
            " --copy-code takes it along, unread"
        )
    return SideFiles(copied, left_out, rewritten, tuple(notes))


def walk(folder: Path, top: Path) -> Iterator[tuple[Path, str | None]]:
    """(path, why it stays behind) of every file below a folder, and of folders that are left out
    whole. None: it travels; CODE for code.

    Args:
        folder: where to begin.
        top: the model's directory.
    """
    entries = sorted(
        itertools.islice(folder.iterdir(), None if folder == top else FOLDER_FILES + 1)
    )
    if folder != top and len(entries) > FOLDER_FILES:
        yield folder, f"holds more than {FOLDER_FILES:,} files"
        return
    for path in entries:
        if not path.is_dir():
            yield path, find_file_reason(path, top)
        elif reason := find_folder_reason(path, top):
            yield path, reason
        else:
            yield from walk(path, top)


def find_folder_reason(path: Path, top: Path) -> str | None:
    """Why a folder stays behind; None when its files are looked at."""
    if path.is_symlink():
        return "a link to a folder"
    if not os.access(path, os.R_OK | os.X_OK):
        return "may not be read"
    if len(path.relative_to(top).parts) > LEVELS:
        return f"deeper than {LEVELS} folders"
    matches = (why for name, why in FOLDERS.items() if re.fullmatch(name, path.name))
    return next(matches, None)


def find_file_reason(path: Path, top: Path) -> str | None:
    """Why a file stays behind; None when it travels, CODE for code.

    RegraftError for a file of SIDE_FILES that is no regular file of the model's directory.
    """
    for pattern, why in FILES.items():
        if re.fullmatch(pattern, path.name, re.IGNORECASE):
            return CODE if pattern == CODE else why
    if not DATA_NAME.fullmatch(path.name):
        return "of an unknown kind, which may be code"
    try:
        check_inside(top, path)
    except RegraftError:
        if path.parent == top and any(path.match(pattern) for pattern in SIDE_FILES):
            raise
        return "no regular file of this folder"
    return None if os.access(path, os.R_OK) else "may not be read"


def read_auto_map(file: Path) -> Any:
    """The content of a JSON file that names code; None for any other file."""
    if file.suffix != ".json" or b'"auto_map"' not in (data := file.read_bytes()):
        return None
    try:
        return parse_json(data, f"'{file}'", "fetch it again")
    except RegraftError:  # nothing can read it
        return None


def drop_missing_code(value: Any, has_file: Callable[[str], bool]) -> Any:
    """A JSON value without the entries of `auto_map` that name code which is not there.

    Args:
        value: the value.
        has_file: whether a file of a name, such as `modeling_x.py`, is there.
    """
    if isinstance(value, list):
        return [drop_missing_code(item, has_file) for item in value]
    if not isinstance(value, dict):
        return value

    def is_there(reference: Any) -> bool:
        if isinstance(reference, list):  # a slow and a fast tokenizer
            return all(is_there(item) for item in reference if item is not None)
        return isinstance(reference, str) and has_file(f"{reference.rpartition('.')[0]}.py")

    kept = {key: drop_missing_code(item, has_file) for key, item in value.items()}
    if isinstance(value.get("auto_map"), dict):
        there = {key: item for key, item in value["auto_map"].items() if is_there(item)}
        kept = {key: item for key, item in kept.items() if key != "auto_map"}
        kept |= {"auto_map": there} if there else {}
    return kept


def copy_side_files(found: SideFiles, folder: Path, out: Path) -> dict[str, str]:
    """Copy what travels into a directory that is being written; returns what was left out.

    Args:
        found: what `find_side_files` says of `folder`.
        folder: of the source.
        out: the directory, which has the other files already.
    """
    left_out = dict(found.left_out)
    for name in found.copied:
        target = out / (SOURCE_CARD if name == lineage.CARD else name)
        if target.exists():
            left_out[name] = "regraft writes a file of this name"
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if name in found.rewritten:
            write_json(target, found.rewritten[name])
        else:
            shutil.copyfile(folder / name, target)
    return left_out
