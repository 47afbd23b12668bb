"""Writing an export, whole or not at all, once it is proven equal."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, TypedDict

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..io.identity import TOKENIZER
from ..io.output import read_marker
from ..modeling.loading import random_inputs
from ..modeling.reopen import prove_opens
from .equality import Equality, compare_exported, compare_models, row_length
from .gguf import engine, quantize, read_back
from .gguf import model as gguf_model
from .gguf.engine import EngineEquality
from .gguf.fit import find_notes
from .gguf.model import GGUFModel
from .step import Export
from .target import find_target, list_targets


class GGUFEquality(TypedDict):
    """What was compared of a GGUF file."""

    file: str
    tensors: int  # all of them, read back
    rounding: float | None  # see `compare_quantized`; None: every bit is as it was to be
    difference: float | None  # of the logits as transformers loads it; None: it cannot


class Proof(TypedDict, total=False):
    """Everything that was compared."""

    stock: Equality
    gguf: list[GGUFEquality]
    engine: EngineEquality


def list_misfits(checkpoint: Checkpoint) -> dict[str, list[str]]:
    """By target, what of a model it cannot hold; an empty list where it holds it."""
    found = {name: find_target(name).find_misfits(checkpoint.config) for name in list_targets()}
    if not has_tokenizer(checkpoint):
        missing = "it has no tokenizer, which a GGUF file holds: put tokenizer.json there"
        for name, misfits in found.items():
            if not misfits and find_target(name).prepare is not None:
                found[name] = [missing]
    return found


def list_notes(checkpoint: Checkpoint, for_llama_cpp: bool) -> list[str]:
    """What a user should know of an export beyond what it is.

    Args:
        checkpoint: what is exported.
        for_llama_cpp: whether a GGUF file is among what is written.
    """
    notes = [
        f"'{checkpoint.origin}' has no tokenizer, so the export has none: put tokenizer.json there"
    ]
    found = [] if has_tokenizer(checkpoint) else notes
    target = find_target("gguf")
    if not for_llama_cpp or target.find_misfits(checkpoint.config):
        return found
    return [*found, *find_notes(target.build_config(checkpoint.config))]


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether there are files of a tokenizer beside the weights."""
    return any(file for pattern in TOKENIZER for file in checkpoint.path.glob(pattern))


def check_finished(checkpoint: Checkpoint) -> None:
    """RegraftError for the output of a run of regraft that is not finished."""
    marker = read_marker(checkpoint.folder) if checkpoint.folder else None
    if marker is not None and not marker.complete:
        raise RegraftError(
            f"'{checkpoint.origin}' is an unfinished {marker.kind}: run its command again, which "
            "goes on, then export it"
        )


def write_export(
    checkpoint: Checkpoint,
    to: str,
    out: str | Path,
    check: bool = True,
    quantization: str | None = None,
    check_engine: bool = False,
    **options: Any,
) -> Proof:
    """Write a model in a target's form; what was compared, nothing without `check`.

    Args:
        checkpoint: as opened.
        to: name of the target.
        out: the directory to write.
        check: whether the result is compared with the model in plain transformers before it is put
            in place.
        quantization: of a GGUF file that is written too; None: none is.
        check_engine: whether llama.cpp runs the result beside transformers.
        options: `overwrite` and `request` of `Checkpoint.save`.

    RegraftError when the target cannot hold the model, when it is unfinished, when the two differ,
    and as of `Checkpoint.save`.
    """
    check_finished(checkpoint)
    if quantization:
        quantize.check_kind(quantization)
    if check_engine:
        engine.import_engine()
    made, target = Export(to)(checkpoint), find_target(to)
    proof: Proof = {}

    if target.prepare is not None:
        checkpoint.verify()  # as `Checkpoint.save` does
        model = target.prepare(made)
        kinds = [model.dtype, *([quantization] if quantization else [])]

        def prove_gguf(folder: Path) -> None:
            if check and made.config["model_type"] != checkpoint.config["model_type"]:
                proof["stock"] = compare_stock(checkpoint, made)
            if check:
                proof["gguf"] = check_files(folder, model, kinds)
            if check_engine:
                proof["engine"] = run_engine(model)

        gguf_model.write_directory(model, out, kinds, prove=prove_gguf, **options)
        return proof

    beside = prepare_gguf(checkpoint) if quantization or check_engine else None

    def prove(folder: Path) -> None:
        prove_opens(folder)
        if check:
            own = modeling.load_stored(checkpoint)
            proof["stock"] = compare_exported(own, checkpoint, folder, target.code)
        if check and beside is not None and quantization:
            if beside.checkpoint.config["model_type"] != made.config["model_type"]:
                compare_stock(checkpoint, beside.checkpoint)
            proof["gguf"] = check_files(folder, beside, [quantization])
        if check_engine:
            assert beside is not None
            proof["engine"] = run_engine(beside)

    extra = {}
    if beside is not None and quantization:
        extra = {gguf_model.file_name(quantization): beside.as_extra_file(quantization)}
    made.save(out, prove_opens=prove, extra_files=extra, **options)
    return proof


def prepare_gguf(checkpoint: Checkpoint) -> GGUFModel:
    """A model in a stock class that llama.cpp holds; RegraftError when it holds none, without a
    tokenizer and without the package gguf.
    """
    target = find_target("gguf")
    target.check_holds(checkpoint)
    return GGUFModel.of(target.convert(checkpoint))


def explain_no_gguf(checkpoint: Checkpoint) -> str | None:
    """Why no GGUF file can be written of a model; None when it can."""
    try:
        prepare_gguf(checkpoint)
    except RegraftError as error:
        return str(error)
    return None


def compare_stock(checkpoint: Checkpoint, made: Checkpoint) -> Equality:
    """Compare a model with the stock class that is written as GGUF in its place."""
    own, stock = modeling.load_stored(checkpoint), modeling.materialize(made)
    return compare_models(own, stock, checkpoint)


def check_files(folder: Path, model: GGUFModel, kinds: list[str]) -> list[GGUFEquality]:
    """Read files back: all tensors, and logits where transformers reads the architecture."""
    return [check_file(folder / gguf_model.file_name(kind), model, kind) for kind in kinds]


def check_file(file: Path, model: GGUFModel, kind: str) -> GGUFEquality:
    """Read one file back."""
    count, own = len(model.tensors), kind == model.dtype
    found: GGUFEquality = {
        "file": file.name,
        "tensors": count,
        "rounding": None,
        "difference": None,
    }
    if own or kind == "q8_0":
        read_back.compare_tensors(file, model.tensors, None if own else kind.upper())
    else:  # quantised by llama.cpp
        found["rounding"] = read_back.compare_quantized(file, model.tensors)
    if own and read_back.is_read_alike(file, model.checkpoint):
        ids = random_inputs(model.checkpoint, length=row_length(model.checkpoint))["input_ids"]
        stock = modeling.materialize(model.checkpoint)
        found["difference"] = read_back.compare_logits(file, stock, ids)
    return found


def run_engine(model: GGUFModel) -> EngineEquality:
    """Run llama.cpp on the model in float32, beside the class that it was written from."""
    length = max(engine.TOKENS, row_length(model.checkpoint))
    ids = random_inputs(model.checkpoint, length=length)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / gguf_model.file_name("f32")
        model.write(file, "f32")
        stock = modeling.materialize(model.checkpoint)
        bound = engine.ROUNDED if find_notes(model.checkpoint.config) else engine.BOUND
        return engine.compare_engine(file, stock, ids, bound)
