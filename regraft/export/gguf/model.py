"""A model that is ready to be written as GGUF files, and a directory of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...core.anatomy import find_anatomy
from ...core.checkpoint import Checkpoint
from ...core.lineage import CARD, FILE, build_lineage, format_model_card
from ...io import shard_writer
from ...io.files import sha256, write_json
from ...io.shard_writer import ExtraFile
from ...mixers.remix import needs_bos
from . import quantize
from .architecture import ENGINE, GGUFArchitecture, find_architecture
from .fit import find_metadata
from .tensors import GGUFTensor, build_tensors, check_left_out
from .vocabulary import choose_name, read_vocabulary
from .writer import DTYPES, import_gguf, write_file


@dataclass(frozen=True)
class GGUFModel:
    """A model, its architecture in llama.cpp and its tokenizer."""

    checkpoint: Checkpoint
    architecture: GGUFArchitecture
    vocabulary: dict[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint, architecture: GGUFArchitecture | None = None) -> GGUFModel:
        """Get a model that fits ready.

        Args:
            checkpoint: the model.
            architecture: of llama.cpp; None: the one for its stock class.

        RegraftError without the package gguf, without a tokenizer that llama.cpp has, or with a
        bias that llama.cpp does not have.
        """
        import_gguf()
        family = find_anatomy(checkpoint.config).family
        architecture = architecture or find_architecture(family)
        assert architecture is not None
        check_left_out(checkpoint, architecture)
        vocabulary = read_vocabulary(checkpoint.path, checkpoint.sizes["vocab"])
        if needs_bos(checkpoint):
            vocabulary["tokenizer.ggml.add_bos_token"] = True
        return cls(checkpoint, architecture, vocabulary)

    @cached_property
    def tensors(self) -> list[GGUFTensor]:
        """The tensors as llama.cpp stores them."""
        if self.architecture.build_tensors is not None:
            return self.architecture.build_tensors(self.checkpoint)
        return build_tensors(self.checkpoint, self.architecture)

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's keys without the architecture's prefix."""
        config = self.checkpoint.config
        if self.architecture.find_metadata is not None:
            return self.architecture.find_metadata(config)
        return find_metadata(config, self.architecture)

    @property
    def dtype(self) -> str:
        """Name of the dtype of the model's matrices, such as "f32"."""
        embed = self.checkpoint.tensors["embed.weight", None]
        return DTYPES.get(embed.dtype, "F32").lower()

    def write(self, file: Path, kind: str) -> None:
        """Write one file.

        Args:
            file: to write.
            kind: "f32", "f16" or "bf16", or a quantisation.
        """
        if kind == "q4_k_m":
            whole = file.with_name(f"{file.name}.part")
            self.write(whole, "f32")
            quantize.quantize_k(whole, file)
            whole.unlink()
            return
        name = choose_name(self.checkpoint.origin.resolve().name, self.vocabulary)
        stored = None if kind == self.dtype else kind.upper()
        arch = self.architecture.name
        write_file(file, arch, name, self.metadata, self.vocabulary, self.tensors, stored)

    def as_extra_file(self, kind: str) -> ExtraFile:
        """A file that is written beside a model's other files."""
        return ExtraFile({"gguf": kind, "version": 1}, lambda path: self.write(path, kind))


def file_name(kind: str) -> str:
    """The name of a file of a kind."""
    return f"model-{kind}.gguf"


def write_directory(
    model: GGUFModel,
    out: str | Path,
    kinds: list[str],
    overwrite: bool = False,
    request: Any = None,
    prove: Callable[[Path], None] | None = None,
) -> None:
    """Write a directory of GGUF files, whole or not at all, with lineage.json and a model card.

    Args:
        model: ready to be written.
        out: the directory.
        kinds: of the files.
        overwrite: whether it may replace an output of regraft that holds no other files.
        request: what the command was asked for, so that a later call can see that it is done.
        prove: called with the complete directory before it is put in place; when it raises,
            nothing is.
    """
    with shard_writer.new_directory(Path(out), overwrite, None, request) as partial:
        folder = partial.path
        for kind in kinds:
            model.write(folder / file_name(kind), kind)
        card = format_model_card(model.checkpoint, transformers=False)
        text = card.replace("## Papers", f"{describe_use(model, kinds)}\n## Papers")
        (folder / CARD).write_text(text, encoding="utf-8")
        hashes = {file_name(kind): sha256(folder / file_name(kind)) for kind in kinds}
        write_json(folder / FILE, build_lineage(model.checkpoint, hashes, {}))
        if prove is not None:
            prove(folder)


def describe_use(model: GGUFModel, kinds: list[str]) -> str:
    """Which engine runs the files."""
    return (
        f"## Engine\n\nllama.cpp with the architecture `{model.architecture.name}`, proven with"
        f" llama-cpp-python {ENGINE}: `llama-server -m {file_name(kinds[-1])}`.\n"
    )
