"""What an input is, by content: a run that is resumed, and a cache, must meet the same input again.

An identity says nothing of paths and times: a model that was moved or copied is the same model, and
another model at the old path is another one. What is small is hashed whole: configs, tokenizers,
weights of up to `WHOLE` bytes in all. Of more weights the headers are hashed, and blocks at fixed
places, of every tensor at least one and at most `SPACING` bytes apart. A model of 140 GB takes 35
thousand blocks, which is seconds.

What sampling can miss: a file of the same size in which only bytes outside the blocks differ, such
as a few numbers set by hand. Training, fine-tuning, merging or converting changes nearly every
number and is seen. Where lineage.json records the sha256 of the weights, that is compared as well.

Within a process a hash is remembered as long as the file's size, times and inode stay.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RegraftError
from . import adapted, gguf, hub, safetensors
from .files import read_json, read_json_if_exists, sha256, write_json
from .request import RECORDED, SAMPLED, Identity, find_changed_input

WHOLE = 1 << 28  # bytes of weights that are hashed whole
SPACING = 1 << 22  # bytes between two sampled blocks of larger ones
BLOCK = 1 << 14  # bytes of a sampled block
MOST_BLOCKS = 1 << 12  # of one tensor, or of one file without tensors
TOKENIZER = (  # patterns of a tokenizer's files in a model's folder
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
)


def identify_model(path: str | Path) -> Identity:
    """The identity of a model: config, weights and tokenizer of a directory, or a GGUF file. A
    model on the hub is fetched first.

    RegraftError when there is no such model or a file of weights is damaged.
    """
    if known := adapted.read_adapted(path):
        adapter = Path(known["adapter"]) / adapted.WEIGHTS
        return {**identify_model(known["base"]), "adapter": identify_file(adapter)}
    folder = hub.fetch(path) if hub.names_model(path) else Path(path)
    if not folder.exists():
        raise RegraftError(
            f"no model at '{path}': give a Hugging Face model directory, a GGUF file or a name on"
            " the hub, ORG/MODEL"
        )
    weights = safetensors.weight_files(folder) if safetensors.variant_of(folder) else None
    if weights is None and (file := gguf.find_gguf_file(folder)):
        return {"GGUF file": sha256(file)}  # opening it needs this hash too

    folder = folder if weights is None else folder.parent
    small = [folder / "config.json"]
    small += [file for pattern in TOKENIZER for file in folder.glob(pattern) if file.is_file()]
    weights = weights or safetensors.weight_files(folder)
    total = sum(file.stat().st_size for file in weights)
    # Shards may lie on a disk that answers slowly but many requests at a time.
    with ThreadPoolExecutor(8) as workers:
        hashes = workers.map(lambda file: identify_file(file, WHOLE - total), weights)

    found = {file.name: sha256(file) for file in sorted(set(small)) if file.is_file()}
    found |= {file.name: digest for file, digest in zip(weights, hashes, strict=True)}
    recorded = _recorded_hashes(folder)
    return found | {
        f"{file.name}{RECORDED}": str(recorded[file.name])
        for file in weights
        if file.name in recorded
    }


def identify_file(file: Path, spare: int | None = None) -> str:
    """The hash of a file: of all its bytes, or of sampled blocks of a large one.

    Args:
        file: of any kind; of safetensors every tensor is sampled.
        spare: sample when it is negative. None: when the file has more than `WHOLE` bytes.

    RegraftError when the file cannot be read.
    """
    try:
        facts = file.stat()
        if (WHOLE - facts.st_size if spare is None else spare) >= 0:
            return sha256(file)
        times = (facts.st_mtime_ns, facts.st_ctime_ns)
        return SAMPLED + _sample(file.resolve(), facts.st_size, times, facts.st_ino)
    except OSError as error:
        raise RegraftError(f"cannot read '{file}' ({error.strerror}): check the file") from error


def identify_files(files: Iterable[Path]) -> Identity:
    """The identity of several files in order, whatever they are called."""
    return {f"file {number}": identify_file(file) for number, file in enumerate(files, 1)}


def keep_inputs(file: Path, inputs: Mapping[str, Identity], what: str) -> None:
    """Compare inputs with those in a file, and add what it does not have yet.

    Args:
        file: JSON of the identities of all inputs so far.
        inputs: the identity of each input.
        what: whose inputs these are, for the error.

    RegraftError when an input is another one.
    """
    before = read_json_if_exists(file, dict[str, Identity]) or {}
    if change := find_changed_input(before, inputs):
        raise RegraftError(
            f"{what} began with another input ({change}): give the same input, or another output"
        )
    if not set(inputs) <= set(before):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {**before, **inputs})


def _recorded_hashes(folder: Path) -> Mapping[str, Any]:
    """Hashes that lineage.json records; none when there is no such file or it has another form."""
    file = folder / "lineage.json"
    recorded = read_json(file).get("files") if file.is_file() else None
    return recorded if isinstance(recorded, dict) else {}


@lru_cache(maxsize=4096)
def _sample(file: Path, size: int, times: tuple[int, int], inode: int) -> str:
    """The hash of a file's header and sampled blocks; all arguments but the first say whether the
    file is still the one that was sampled.
    """
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as stream:
        if file.suffix == ".safetensors":
            safetensors.read_header(file)  # refuses a damaged one
            start = 8 + int.from_bytes(stream.read(8), "little")
            header = stream.read(start - 8)
            digest.update(header)
            rows = json.loads(header)
            rows.pop("__metadata__", None)
            for name, row in sorted(rows.items()):
                begin, end = row["data_offsets"]
                _sample_span(stream, start + begin, start + end, name, digest)
        else:
            # Both ends, where formats have their tables; then blocks in between.
            _sample_span(stream, 0, min(size, BLOCK), "", digest)
            _sample_span(stream, max(0, size - BLOCK), size, "", digest)
            _sample_span(stream, 0, size, "", digest)
    return digest.hexdigest()


def _sample_span(stream: BinaryIO, begin: int, end: int, name: str, digest: hashlib._Hash) -> None:
    """Hash one block of each of the equal parts of a span, at a place that follows from its name.

    Args:
        stream: the file.
        begin: first byte of the span.
        end: the byte behind it.
        name: of the tensor; other tensors are sampled at other places.
        digest: gets the blocks.
    """
    count = min(MOST_BLOCKS, 1 + (end - begin) // SPACING)
    for part in range(count):
        first = begin + (end - begin) * part // count
        room = begin + (end - begin) * (part + 1) // count - first - BLOCK
        seed = hashlib.sha256(f"{name} {part}".encode()).digest()[:8]
        offset = int.from_bytes(seed, "little") % (room + 1) if room > 0 else 0
        digest.update(os.pread(stream.fileno(), min(BLOCK, end - first), first + offset))
