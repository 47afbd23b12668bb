"""A model as a config and lazy tensors.

Opening reads headers only, steps compute nothing, and saving computes one tensor after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RegraftError, explain_errors
from ..io import gguf, hub, output, safetensors, shard_writer
from ..io.adapted import adapted_path, find_base, read_adapted
from ..io.files import sha256, write_json
from ..io.finite import cast_finite
from ..io.foreign_weights import check_foreign_folder
from ..io.quantized.schemes import describe_step
from ..io.shard_writer import ExtraFile
from . import lineage, undo
from .adapter import merge_adapter
from .anatomy import Anatomy, Config, Key, Part, find_anatomy, read_as_auto
from .axes import Signature
from .config_checks import explain_config_errors
from .fused import fused_index, output_first, read_fused
from .lazy import LazyTensor, Provenance
from .model_files import check_model_files, read_model_config
from .model_tensors import UNTIED_STEP, read_model_tensors
from .side_files import copy_side_files, drop_missing_code, find_side_files

__all__ = ["Checkpoint", "Holds", "LazyTensor", "Provenance", "with_older_keys"]

Holds = Literal["weights", "exp_avg", "exp_avg_sq"]
SHARD = 500_000_000  # bytes in a file of weights


@dataclass(frozen=True)
class Checkpoint:
    """A config and its tensors by (role, layer), immutable.

    The layer is None outside the stack. `tensors[key]` is a tensor as stored;
    `checkpoint[role, layer]` has its outputs first and also finds maps inside fused tensors.
    """

    # What was opened: a model directory or a GGUF file.
    origin: Path
    # The content of config.json.
    config: dict[str, Any]
    # The table of its family.
    anatomy: Anatomy
    # Axis sizes of the config.
    sizes: dict[str, int]
    # Tensors as stored.
    tensors: dict[Key, LazyTensor]
    # Their names in the model's state dict.
    names: dict[Key, str]
    # The directory that was opened; None for a GGUF file that is not converted yet (see `path`).
    folder: Path | None
    # Tensors of the files that are no parameters: name -> why they are dropped.
    dropped: dict[str, str] = field(default_factory=dict)
    # Steps that led here from the pretrained model, as in lineage.json (see `lineage.StepEntry`).
    history: tuple[dict[str, Any], ...] = ()
    # Whether values come from this process (training), so that no fingerprint of files and steps
    # identifies them.
    in_memory: bool = False
    # What the tensors are: the weights, or one of Adam's moments under the weights' names.
    holds: Holds = "weights"
    # Whether NaN and infinity are read and written; else they are refused.
    allow_nonfinite: bool = False
    # Whether its files do not hold the weights as they are, but what they are computed from.
    is_computed: bool = False
    # Whether Python files beside the weights are copied to outputs (see `side_files`).
    copy_code: bool = False
    # What changes files beside the weights: called with the directory that is being written.
    file_changes: tuple[Callable[[Path], None], ...] = ()

    @classmethod
    def open(
        cls,
        path: str | Path,
        allow_nonfinite: bool = False,
        variant: str | None = None,
        adapter: str | Path | None = None,
    ) -> Checkpoint:
        """Open a model directory, a GGUF file or a model on the hub, reading headers only.

        Where a head is stored beside the embedding that the config ties it to, both are read; of a
        model on the hub that is not in the cache their first numbers.

        Args:
            path: the directory or file, or the file of a variant in a directory (see
                `safetensors.variant_file`). Where there is none: the name on the hub, ORG/MODEL or
                ORG/MODEL@REVISION, of which weights are fetched when they are read.
            allow_nonfinite: whether values that are NaN or infinite are read and written.
            variant: of the weights in a directory, such as "fp16".
            adapter: folder of a PEFT adapter that is merged into the model.

        RegraftError when a file is missing or damaged, when the family is unknown, or when config
        and tensors do not belong together.
        """
        if hub.names_model(path):
            path = hub.fetch(path, weights=variant is not None, variant=variant)
        if adapter is not None:
            path = adapted_path(safetensors.variant_file(path, variant), adapter)
        if known := read_adapted(path):
            base = cls.open(known["base"], allow_nonfinite)
            return replace(merge_adapter(base, Path(known["adapter"])), origin=Path(path))
        origin = Path(safetensors.variant_file(path, variant))
        if not origin.exists():
            raise RegraftError(
                f"no model at '{path}': give a Hugging Face model directory, a GGUF file or a name "
                "on the hub, ORG/MODEL"
            )

        if safetensors.variant_of(origin):
            return _open_folder(origin, origin.parent, allow_nonfinite)
        file = gguf.find_gguf_file(origin)
        folder = gguf.find_converted(file) if file else origin
        if folder is not None:
            return _open_folder(file or origin, folder, allow_nonfinite)
        assert file is not None
        return _open_gguf(file, allow_nonfinite)

    @property
    def path(self) -> Path:
        """The directory with all files; a GGUF file is converted first, once, and weights on the
        hub are fetched.
        """
        if self.folder is None:
            return gguf.convert_once(find_base(self.origin))
        if not self.variant and (snapshot := hub.lacks_weights(self.folder)):
            hub.fetch_weights(snapshot)
        return self.folder

    @property
    def variant(self) -> str | None:
        """The variant of the weights, such as "fp16"; None for the usual ones."""
        return safetensors.variant_of(find_base(self.origin))

    @property
    def weights(self) -> Path:
        """What `safetensors.weight_files` takes: the directory, or a variant's file in it."""
        return find_base(self.origin) if self.variant else self.path

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.sizes["depth"]

    def __getitem__(self, key: tuple[str, int | None]) -> LazyTensor:
        """A tensor with its outputs first; of a fused tensor the map that the role names.

        RegraftError, listing the roles, when there is none.
        """
        role, layer = key
        placed = self.anatomy.place(self.config)

        if key in self.tensors:
            lazy, part = self.tensors[key], placed[key].part
            if part.stored == "out in" or part.axes.kind != "map":
                return lazy
            return replace(
                lazy, shape=lazy.shape[::-1], read=lambda: output_first(lazy.read(), part)
            )

        # Not stored under its own role: look inside the fused tensors of the layer.
        for (fused_role, fused_layer), fused in placed.items():
            index = fused_index(role, fused.part, fused_role)
            if fused_layer == layer and index is not None:
                whole = self.tensors[fused_role, fused_layer]
                return _open_fused(whole, fused.part, index, self.sizes)

        roles = ", ".join(sorted({role for role, _ in self.tensors}))
        raise RegraftError(
            f"{self.anatomy.family} has no '{role}' in layer {layer}: use one of {roles}"
        )

    def part(self, role: str) -> Part | None:
        """The part that holds a role, alone or fused with others; None when there is none."""
        for name, part in self.anatomy.parts.items():
            if name == role or fused_index(role, part, name) is not None:
                return part
        return None

    def signature(self, role: str) -> Signature:
        """The signature of `checkpoint[role, layer]`; RegraftError when there is no such role."""
        part = self.part(role)
        if part is None:
            raise RegraftError(
                f"{self.anatomy.family} has no part '{role}': "
                f"use one of {', '.join(self.anatomy.parts)}"
            )
        base = role.rpartition(".")[0]
        return part.axes.piece(part.fused.index(base)) if base in part.fused else part.axes

    def with_values(self, values: Mapping[str, Tensor], step: dict[str, Any]) -> Checkpoint:
        """The same model with other values and one more step in its history.

        Args:
            values: a state dict with every tensor, such as that of the trained model.
            step: the step that made the values (see `lineage.StepEntry`).

        RegraftError when a tensor is missing or has another shape.
        """
        tensors = dict(self.tensors)
        for key, name in self.names.items():
            if name not in values or tuple(values[name].shape) != tensors[key].shape:
                got = tuple(values[name].shape) if name in values else "nothing"
                raise RegraftError(
                    f"new value of '{name}' is {got}, expected {tensors[key].shape}: "
                    "pass the model's state dict"
                )
            # A function makes the reader: a lambda here would see the last name of the loop.
            read = _constant_reader(values[name], tensors[key].dtype, name)
            tensors[key] = replace(tensors[key], read=read)

        return replace(self, tensors=tensors, history=(*self.history, step), in_memory=True)

    def with_readers(
        self, reads: Mapping[str, Callable[[], Tensor]], step: dict[str, Any]
    ) -> Checkpoint:
        """Like `with_values` for some tensors, whose values are read when they are saved.

        Args:
            reads: functions that return the new value, by the tensor's name.
            step: the step that made the values (see `lineage.StepEntry`).

        RegraftError when the model has no tensor of such a name.
        """
        keys = {name: key for key, name in self.names.items()}
        if unknown := sorted(set(reads) - set(keys)):
            raise RegraftError(
                f"'{self.origin}' has no tensor '{unknown[0]}': pass names that it has"
            )

        tensors = dict(self.tensors)
        for name, read in reads.items():
            lazy = tensors[keys[name]]
            tensors[keys[name]] = replace(lazy, read=_cast_reader(read, lazy.dtype, name))

        return replace(self, tensors=tensors, history=(*self.history, step), in_memory=True)

    def verify(self) -> None:
        """Compare files with the hashes in lineage.json, where it has any.

        RegraftError names the first file that is missing or damaged.
        """
        if self.folder is not None:
            lineage.verify(self.path)

    def save(
        self,
        path: str | Path,
        overwrite: bool = False,
        shard_bytes: int = SHARD,
        extra_files: Mapping[str, ExtraFile] | None = None,
        request: Any = None,
        prove_opens: Callable[[Path], None] | None = None,
    ) -> None:
        """Write a model directory, whole or not at all: weights, config, lineage.json, model card,
        and the files beside the source's weights (see `side_files`).

        Tensors are computed and written one after the other. After Ctrl-C or a kill the same call
        resumes after the last file that was finished.

        Args:
            path: the directory to write.
            overwrite: whether it may replace an output of regraft that holds no other files.
            shard_bytes: size limit of a file of weights; one tensor may exceed it.
            extra_files: further files of the directory, by name.
            request: what the command was asked for, so that a later call can see that it is done.
            prove_opens: called with the complete directory before it is put in place; when it
                raises, nothing is.

        RegraftError when `path` exists and not `overwrite`, or when the disk is full.
        """
        extra_files = extra_files or {}
        output.check_apart(path, [("source", self.origin)])
        side_files = find_side_files(self.path, self.sizes["hidden"], self.copy_code)

        with (
            ThreadPoolExecutor(1) as background,  # hashes the source meanwhile
            shard_writer.new_directory(
                Path(path),
                overwrite,
                self._start_fingerprint(shard_bytes, extra_files, background),
                request,
            ) as partial,
        ):
            folder = partial.path
            filed = self.anatomy.name_in_file
            tensors = {filed(self.names[key]): lazy for key, lazy in self.tensors.items()}
            shard_writer.write_weights(partial, tensors, shard_bytes, self.allow_nonfinite)

            for name, extra_file in extra_files.items():
                extra_file.write(folder / name)
            self.anatomy.write_extras(str(folder), self.config)
            left_out = copy_side_files(side_files, self.path, folder)
            config = drop_missing_code(
                with_older_keys(self.config), lambda name: (folder / name).is_file()
            )
            write_json(folder / "config.json", config)
            for change in self.file_changes:
                change(folder)
            (folder / "README.md").write_text(lineage.format_model_card(self), encoding="utf-8")
            undo.write_undo(self, folder, side_files.copied)

            # Last, since it records the other files. Shards were hashed while they were written.
            small = {
                name: sha256(folder / name)
                for name in (safetensors.INDEX, undo.FILE, "config.json")
                if (folder / name).exists()
            }
            write_json(
                folder / lineage.FILE, lineage.build_lineage(self, partial.done | small, left_out)
            )
            if prove_opens is not None:
                prove_opens(folder)

    def _start_fingerprint(
        self,
        shard_bytes: int,
        extra_files: Mapping[str, ExtraFile],
        background: ThreadPoolExecutor,
    ) -> Callable[[], str] | None:
        """A function that waits for the fingerprint; None for values that have none."""
        if self.in_memory:
            return None
        extra = {name: one.identity for name, one in extra_files.items()}
        return background.submit(lineage.fingerprint, self, shard_bytes, extra).result


def with_older_keys(config: Config) -> dict[str, Any]:
    """The config with the keys that older readers look for; keys it has itself stay."""
    with explain_errors("cannot write the config for older readers", "fix config.json"):
        return find_anatomy(config).add_older_keys(config)


def _open_folder(origin: Path, folder: Path, allow_nonfinite: bool) -> Checkpoint:
    """A model directory.

    Args:
        origin: the GGUF file it was converted from, the file of a variant, or the directory.
        folder: the directory.
        allow_nonfinite: see `Checkpoint.open`.
    """
    check_foreign_folder(folder)
    check_model_files(folder)
    config = read_model_config(folder)
    quantization = config.pop("quantization_config", None)
    made = [describe_step(quantization, folder)] if quantization else []
    with explain_config_errors(folder / "config.json"):
        config = read_as_auto(config)
        anatomy = find_anatomy(config)
        sizes = anatomy.solve(config)
    weights = origin if safetensors.variant_of(origin) else folder
    stored = read_model_tensors(weights, anatomy, config, allow_nonfinite, quantization)
    placed = anatomy.place(stored.config)
    stored.check_names(folder, anatomy, placed.values())

    known = lineage.read_lineage(folder)
    # A pretrained model has no lineage.json: all of its tensors are copied from itself.
    provenances = {
        name: Provenance(kind, tuple(sources), note)
        for name, (kind, sources, note) in known.get("tensors", {}).items()
    }
    history = (*known.get("steps", ()), *made, *([UNTIED_STEP] if stored.untied else []))

    return Checkpoint(
        origin,
        stored.config,
        anatomy,
        sizes,
        {key: stored.open(parameter, folder, provenances) for key, parameter in placed.items()},
        {key: parameter.name for key, parameter in placed.items()},
        folder,
        known.get("dropped", {}) | stored.dropped,
        history,
        allow_nonfinite=allow_nonfinite,
        is_computed=bool(made),
    )


def _open_gguf(file: Path, allow_nonfinite: bool) -> Checkpoint:
    """A GGUF file from its header alone.

    Shapes come from the config. Values come from a conversion of the whole file, which runs when
    the first of them is read.
    """
    config = gguf.read_config(file)
    with explain_config_errors(file):
        anatomy = find_anatomy(config)
        placed = anatomy.place(config)
    gguf.check_size(file, sum(math.prod(parameter.shape) for parameter in placed.values()))

    def build_reader(key: Key) -> Callable[[], Tensor]:
        def read() -> Tensor:
            return _open_folder(file, gguf.convert_once(file), allow_nonfinite).tensors[key].read()

        return read

    # The conversion writes float32, whatever the file's quantisation.
    tensors = {
        key: LazyTensor(
            parameter.shape,
            torch.float32,
            Provenance("copied", (parameter.name,)),
            build_reader(key),
        )
        for key, parameter in placed.items()
    }
    names = {key: parameter.name for key, parameter in placed.items()}
    return Checkpoint(
        file,
        config,
        anatomy,
        anatomy.solve(config),
        tensors,
        names,
        None,
        history=(gguf.STEP,),
        allow_nonfinite=allow_nonfinite,
    )


def _open_fused(lazy: LazyTensor, part: Part, index: int, sizes: Mapping[str, int]) -> LazyTensor:
    """One of the maps in a fused tensor, output first."""
    return LazyTensor(
        part.axes.piece(index).shape(sizes),
        lazy.dtype,
        replace(lazy.provenance, note=f"piece {index} of {len(part.fused)}"),
        lambda: read_fused(lazy.read(), part, index, sizes),
    )


def _constant_reader(value: Tensor, dtype: torch.dtype, name: str) -> Callable[[], Tensor]:
    """A reader that returns a value it was given."""
    return lambda: cast_finite(value.detach().to("cpu"), dtype, name)


def _cast_reader(read: Callable[[], Tensor], dtype: torch.dtype, name: str) -> Callable[[], Tensor]:
    """A reader that returns the value of another in a given dtype."""
    return lambda: cast_finite(read(), dtype, name)
