"""A model as config plus promises of tensors: opened from headers, changed without computing, saved
shard by shard.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RegraftError
from ..io import gguf, safetensors, shard_writer
from ..io.files import read_json, sha256, write_json
from . import lineage
from .anatomy import Anatomy, Config, Key, Part, PlacedPart, find_anatomy
from .axes import Signature, product

SIDECARS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "*.model",
    "LICENSE*",
)
Holds = Literal["weights", "exp_avg", "exp_avg_sq"]
SHARD = 500_000_000


@dataclass(frozen=True)
class Provenance:
    """Where numbers come from: `kind` is copied, grown, broadcast, zero or fresh; `sources` are
    tensor names.
    """

    kind: str
    sources: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class LazyTensor:
    """A promise of a tensor: nothing is computed before `read()`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    story: Provenance
    read: Callable[[], Tensor] = field(repr=False)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size when saved."""
        return self.size * self.dtype.itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A config and `{(role, layer): Lazy}`, immutable; layer is None outside the stack.

    `tensors` hold values as stored, `names` their state-dict names; `checkpoint[role, layer]` is in
    output-first order and takes fused parts apart. `holds`: weights, or Adam's moments of them
    under the same names. `origin` is what was opened, `path` the directory with its tokenizer and
    other files.
    """

    origin: Path
    config: dict[str, Any]
    anatomy: Anatomy
    sizes: dict[str, int]
    tensors: dict[Key, LazyTensor]
    names: dict[Key, str]
    folder: Path | None
    dropped: dict[str, str] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    in_memory: bool = False
    holds: Holds = "weights"

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a model directory or a GGUF file, reading headers only. RegraftError when something
        does not fit.
        """
        origin = Path(path)
        if not origin.exists():
            raise RegraftError(
                f"no model at '{path}': give a Hugging Face model directory or a GGUF file"
            )
        file = gguf.find_gguf_file(origin)
        folder = gguf.find_converted(file) if file else origin
        if folder is not None:
            return _open_folder(file or origin, folder)
        assert file is not None
        return _open_gguf(file)

    @property
    def path(self) -> Path:
        """The directory with tokenizer and other files; a GGUF file is converted first, once."""
        return self.folder or gguf.convert_once(self.origin)

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.sizes["depth"]

    def __getitem__(self, key: tuple[str, int | None]) -> LazyTensor:
        """A tensor in output-first order; a fused part gives its piece. RegraftError lists the
        roles there are.
        """
        role, layer = key
        placed = self.anatomy.place(self.config)
        if key in self.tensors:
            lazy, part = self.tensors[key], placed[key].part
            if part.stored == "out in" or part.axes.kind != "map":
                return lazy
            return replace(lazy, shape=lazy.shape[::-1], read=lambda: lazy.read().T)
        for (fused, at), spot in placed.items():
            base, _, ending = role.rpartition(".")
            if at == layer and fused.endswith(f".{ending}") and base in spot.part.fused:
                return _split_fused(
                    self.tensors[fused, at], spot.part, spot.part.fused.index(base), self.sizes
                )
        roles = ", ".join(sorted({role for role, _ in self.tensors}))
        raise RegraftError(
            f"{self.anatomy.family} has no '{role}' in layer {layer}: use one of {roles}"
        )

    def part(self, role: str) -> Part | None:
        """The table's part for a role, fused ones included; None when the family has none."""
        base, _, ending = role.rpartition(".")
        for name, part in self.anatomy.parts.items():
            if name == role or (base in part.fused and name.endswith(f".{ending}")):
                return part
        return None

    def signature(self, role: str) -> Signature:
        """The signature of a role as `checkpoint[role, layer]` gives it."""
        part = self.part(role)
        if part is None:
            raise RegraftError(
                f"{self.anatomy.family} has no part '{role}': use one of"
                f" {', '.join(self.anatomy.parts)}"
            )
        base = role.rpartition(".")[0]
        return part.axes.piece(part.fused.index(base)) if base in part.fused else part.axes

    def with_values(self, values: Mapping[str, Tensor], step: dict[str, Any]) -> Checkpoint:
        """The same model with other values by tensor name (a trained state dict) and one more step
        in its history.
        """
        tensors = dict(self.tensors)
        for key, name in self.names.items():
            if name not in values or tuple(values[name].shape) != tensors[key].shape:
                got = tuple(values[name].shape) if name in values else "nothing"
                raise RegraftError(
                    f"new value of '{name}' is {got}, expected {tensors[key].shape}: pass the"
                    " model's state dict"
                )
            tensors[key] = replace(
                tensors[key], read=_constant_reader(values[name], tensors[key].dtype)
            )
        return replace(self, tensors=tensors, history=(*self.history, step), in_memory=True)

    def with_readers(
        self, reads: Mapping[str, Callable[[], Tensor]], step: dict[str, Any]
    ) -> Checkpoint:
        """Like `replaced`, but only the named tensors have other values, which are read when they
        are saved.
        """
        places = {name: key for key, name in self.names.items()}
        if strange := sorted(set(reads) - set(places)):
            raise RegraftError(
                f"'{self.origin}' has no tensor '{strange[0]}': pass names that it has"
            )
        tensors = dict(self.tensors)
        for name, read in reads.items():
            tensors[places[name]] = replace(
                tensors[places[name]], read=_cast_reader(read, tensors[places[name]].dtype)
            )
        return replace(self, tensors=tensors, history=(*self.history, step), in_memory=True)

    def verify(self) -> None:
        """Compare files with the hashes that lineage.json records, if it does; RegraftError names a
        damaged file.
        """
        if self.folder is not None:
            lineage.verify(self.folder)

    def save(self, path: str | Path, overwrite: bool = False, shard_bytes: int = SHARD) -> None:
        """Write a loadable directory with lineage.json, model card and tokenizer; whole or not at
        all.

        Tensors are computed and written one after the other. After Ctrl-C or a kill the same call
        goes on from the shards that were finished. RegraftError when `path` exists and not
        `overwrite`, or on a full disk.
        """
        sidecars = sorted(
            {file for pattern in SIDECARS for file in self.path.glob(pattern) if file.is_file()}
        )
        with (
            ThreadPoolExecutor(1) as background,  # hashes the source meanwhile
            shard_writer.new_directory(
                Path(path), overwrite, self._start_fingerprint(shard_bytes, background)
            ) as partial,
        ):
            folder = partial.path
            filed = {
                self.anatomy.name_in_file(self.names[key]): lazy
                for key, lazy in self.tensors.items()
            }
            shard_writer.write_weights(partial, filed, shard_bytes)
            for file in sidecars:
                shutil.copyfile(file, folder / file.name)
            write_json(folder / "config.json", with_older_keys(self.config))
            self.anatomy.write_extras(str(folder), self.config)
            (folder / "README.md").write_text(lineage.format_model_card(self), encoding="utf-8")
            index = [folder / safetensors.INDEX] if (folder / safetensors.INDEX).exists() else []
            small = {file.name: sha256(file) for file in [*index, folder / "config.json"]}
            write_json(folder / lineage.FILE, lineage.build_lineage(self, partial.done | small))

    def _start_fingerprint(
        self, shard_bytes: int, background: ThreadPoolExecutor
    ) -> Callable[[], str] | None:
        return (
            None
            if self.in_memory
            else background.submit(lineage.fingerprint, self, shard_bytes).result
        )


def with_older_keys(config: Config) -> dict[str, Any]:
    """The config plus the keys that older readers look for; what it says itself stays."""
    return find_anatomy(config).older(config) | dict(config)


def _open_folder(origin: Path, folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        raise RegraftError(
            f"no config.json in '{folder}': give a Hugging Face model directory or a GGUF file"
        )
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise RegraftError(
            f"'{folder}' is quantised ({config['quantization_config']}): dequantise it first"
        )
    anatomy = find_anatomy(config)
    found: dict[str, safetensors.TensorEntry] = {}
    for name, entry in safetensors.read_entries(folder).items():
        if found.setdefault(anatomy.canonical_name(name), entry) is not entry:
            raise RegraftError(
                f"'{folder}' holds '{anatomy.canonical_name(name)}' under two names, '{name}' too:"
                " remove one"
            )
    placed = anatomy.place(config)
    known = lineage.read_lineage(folder)
    dropped = known.get("dropped", {}) | _find_unclaimed(found, placed, anatomy, config)
    stories = {
        name: Provenance(kind, tuple(sources), note)
        for name, (kind, sources, note) in known.get("tensors", {}).items()
    }
    tensors = {key: _open_tensor(found, spot, folder, stories) for key, spot in placed.items()}
    names = {key: spot.name for key, spot in placed.items()}
    history = tuple(known.get("steps", ()))
    return Checkpoint(
        origin, config, anatomy, anatomy.solve(config), tensors, names, folder, dropped, history
    )


def _open_gguf(file: Path) -> Checkpoint:
    """From the header alone: shapes come from the config, values from the conversion when first
    read.
    """
    config = gguf.read_config(file)
    anatomy = find_anatomy(config)
    placed = anatomy.place(config)
    gguf.check_size(file, sum(math.prod(spot.shape) for spot in placed.values()))

    def build_reader(key: Key) -> Callable[[], Tensor]:
        return lambda: _open_folder(file, gguf.convert_once(file)).tensors[key].read()

    tensors = {
        k: LazyTensor(
            spot.shape, torch.float32, Provenance("copied", (spot.name,)), build_reader(k)
        )
        for k, spot in placed.items()
    }
    names = {key: spot.name for key, spot in placed.items()}
    return Checkpoint(
        file, config, anatomy, anatomy.solve(config), tensors, names, None, history=(gguf.STEP,)
    )


def _find_unclaimed(
    found: Mapping[str, safetensors.TensorEntry],
    placed: Mapping[Key, PlacedPart],
    anatomy: Anatomy,
    config: Config,
) -> dict[str, str]:
    dropped: dict[str, str] = {}
    for name in sorted(set(found) - {spot.name for spot in placed.values()}):
        reason = anatomy.reason_to_drop(name, config)
        if reason is None:
            raise RegraftError(
                f"{anatomy.family} anatomy has no part for parameter '{name}'"
                f" {list(found[name].shape)}: add it to regraft/families/{anatomy.family}.py, or"
                " check that config.json belongs to these weights"
            )
        dropped[name] = reason
    return dropped


def _open_tensor(
    found: Mapping[str, safetensors.TensorEntry],
    spot: PlacedPart,
    folder: Path,
    stories: Mapping[str, Provenance],
) -> LazyTensor:
    entry = found.get(spot.name)
    if entry is None:
        raise RegraftError(
            f"'{folder}' lacks tensor '{spot.name}' of shape {list(spot.shape)}: fetch the model"
            " again"
        )
    if entry.shape != spot.shape:
        raise RegraftError(
            f"tensor '{spot.name}' in '{entry.file}' has shape {list(entry.shape)}, expected"
            f" {list(spot.shape)} ({spot.part.signature}): config.json and weights do not belong"
            " together"
        )
    story = stories.get(spot.name, Provenance("copied", (spot.name,)))
    return LazyTensor(spot.shape, entry.torch_dtype(), story, entry.read)


def _split_fused(lazy: LazyTensor, part: Part, index: int, sizes: Mapping[str, int]) -> LazyTensor:
    """One of several fused maps or biases, output-first."""
    whole, mine = part.axes, part.axes.piece(index)
    shape = mine.shape(sizes)

    def compute() -> Tensor:
        value = lazy.read()
        value = value.T if part.stored == "in out" and whole.kind == "map" else value
        if len(whole.outputs) > 1:
            return value.split([product(axes, sizes) for axes in whole.outputs])[index]
        axes = whole.outputs[0]
        value = value.unflatten(0, [product((axis,), sizes) for axis in axes])
        return value.select(axes.index("three"), index).reshape(shape)

    return LazyTensor(
        shape, lazy.dtype, replace(lazy.story, note=f"piece {index} of {len(part.fused)}"), compute
    )


def _constant_reader(value: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: value.detach().to("cpu", dtype)


def _cast_reader(read: Callable[[], Tensor], dtype: torch.dtype) -> Callable[[], Tensor]:
    return lambda: read().to(dtype)
