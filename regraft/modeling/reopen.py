"""A model that was written is opened as its users open it, before it is put in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError, explain_errors
from .loading import random_inputs, silence_transformers
from .meta import model_class

WRITTEN = "what was written cannot be opened"
REMEDY = "nothing was published, report this"
LENGTH = 8  # tokens of the forward pass
# Files are mapped into memory, so a forward pass needs no memory of its own, except where
# transformers joins tensors while it loads (experts): beyond this size such models do not run.
JOINED_BYTES = 4_000_000_000


def save_model(checkpoint: Checkpoint, path: str | Path, **options: Any) -> None:
    """`Checkpoint.save` with `prove_opens`: every verb writes its models with this.

    Args:
        checkpoint: what is written.
        path: the directory to write.
        options: the other arguments of `Checkpoint.save`.

    RegraftError as of `Checkpoint.save`, and when what was written cannot be opened.
    """
    checkpoint.save(path, prove_opens=prove_opens, **options)


def prove_opens(folder: Path) -> None:
    """Open a written model with transformers and run it on eight tokens or one image.

    First on the meta device, from the headers of its files: every tensor must be one of the class
    and the other way round. Then for real, in the dtype of the files, which are mapped into memory.

    Args:
        folder: of the model, complete.

    RegraftError when any of it fails.
    """
    try:
        with explain_errors(WRITTEN, REMEDY), silence_transformers():
            checkpoint = Checkpoint.open(folder, allow_nonfinite=True)
            outline = load_outline(checkpoint)
            if not is_joined(outline) or stored_bytes(checkpoint) <= JOINED_BYTES:
                run_briefly(checkpoint)
    except RegraftError as error:
        if str(error).startswith(WRITTEN):
            raise
        raise RegraftError(f"{WRITTEN} ({error}): {REMEDY}") from error


def load_outline(checkpoint: Checkpoint) -> Any:
    """The model on the meta device; RegraftError when its files hold other tensors than its class.

    Args:
        checkpoint: of the written model.
    """
    kind, config = model_class(checkpoint.config)
    values = {
        checkpoint.anatomy.name_in_file(checkpoint.names[key]): torch.empty(
            lazy.shape, dtype=lazy.dtype, device="meta"
        )
        for key, lazy in checkpoint.tensors.items()
    }
    model, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=values,
        device_map="meta",
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_loading_info(info)
    return model


def check_loading_info(info: Mapping[str, Any]) -> None:
    """RegraftError when transformers found tensors that are too many, missing or of other shapes.

    Args:
        info: what `from_pretrained` returns with `output_loading_info`.
    """
    for kind, found in info.items():
        if found:
            first = sorted(map(str, found))[0]
            raise RegraftError(f"{WRITTEN} ({kind}: {first}, {len(found)} in all): {REMEDY}")


def is_joined(model: Any) -> bool:
    """Whether transformers makes tensors of the model from several in its files."""
    return any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model))


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Size of all weights as stored."""
    return sum(lazy.bytes for lazy in checkpoint.tensors.values())


@torch.no_grad()
def run_briefly(checkpoint: Checkpoint) -> None:
    """Load a written model with `from_pretrained` and run it once.

    Args:
        checkpoint: of the written model.

    RegraftError for tensors that are too many, missing or of other shapes; whatever transformers
    raises when the model cannot be run.
    """
    # PyTorch's products of experts have no float64.
    wide = any(lazy.dtype == torch.float64 for lazy in checkpoint.tensors.values())
    kind, _ = model_class(checkpoint.config)
    model, info = kind.from_pretrained(
        checkpoint.path,
        dtype=torch.float32 if wide else "auto",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    check_loading_info(info)

    # Some encoders count positions from two.
    length = max(1, min(LENGTH, checkpoint.sizes.get("pos", LENGTH + 2) - 2))
    inputs: dict[str, Tensor] = random_inputs(checkpoint, length=length)
    for name, value in inputs.items():
        inputs[name] = value.to(model.dtype) if value.is_floating_point() else value
    model.eval()(**inputs)
