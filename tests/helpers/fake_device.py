"""What a linearized model does, run on a device that is not here.

Tensors are fake: they have a shape, a type and a device, and no numbers. An operation on tensors of
two devices raises.

Run: python -m helpers.fake_device FOLDER NAME...

Runs ROWS on the models FOLDER/NAME and prints what went wrong as JSON, "" for nothing. PyTorch's
CPU build has no gradients on a fake "cuda", so the device is one of our own, "gpu". It cannot be
taken back: hence a process of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)
from transformers import DynamicCache, PreTrainedModel

from regraft.core.checkpoint import Checkpoint
from regraft.data.rows import Packed
from regraft.evaluation.perplexity import Candidate, measure
from regraft.plan.fake_tensors import build_fake_model
from regraft.train.align import align_step
from regraft.train.calibrate import calibrate
from regraft.train.distill import distil_step

DEVICE = "gpu"
LENGTH = 21


class Answers(TorchDispatchMode):
    """Answers where a program asks a tensor for its number, which fake ones do not have.

    It also refuses a tensor of the CPU with indices of the device, which fake tensors let pass.
    """

    def __init__(self, answer: bool):
        super().__init__()
        self.answer = answer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            kind = args[0].dtype
            if kind == torch.bool:
                return self.answer
            return 1.0 if kind.is_floating_point else 1
        if func is torch.ops.aten.index.Tensor and args[0].device.type == "cpu":
            assert all(index is None or index.device.type == "cpu" for index in args[1])
        return func(*args, **(kwargs or {}))


def build(folder: Path) -> PreTrainedModel:
    """The model of a folder with fake parameters on the device; call it in a fake mode."""
    with torch.device(DEVICE):
        return build_fake_model(Checkpoint.open(folder))


def ids(length: int = LENGTH) -> Tensor:
    return torch.zeros(2, length, dtype=torch.long, device=DEVICE)


# The rows: each takes a model and its source.


@torch.no_grad()
def cached(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """A prompt, one token, a piece of text."""
    cache = DynamicCache(config=model.config)
    for length in (LENGTH, 1, 5):
        model(input_ids=ids(length), past_key_values=cache, use_cache=True)


@torch.no_grad()
def padded(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    for length, whole in ((LENGTH, LENGTH), (1, LENGTH + 1)):
        options = {"attention_mask": ids(whole), "past_key_values": cache, "use_cache": True}
        model(input_ids=ids(length), **options)


@torch.no_grad()
def packed(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    model(input_ids=ids(), position_ids=ids(), use_cache=False)


def measured(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Perplexity; its windows of text are on the CPU."""
    text, sizes = torch.zeros(1, LENGTH, dtype=torch.long), torch.ones(1, dtype=torch.long)
    candidates = {"model": Candidate(model), "teacher": Candidate(teacher)}
    measure(candidates, text, sizes, teacher="teacher")


def trained(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """The next token, of packed documents and of padded ones."""
    for options in ({"position_ids": ids()}, {"attention_mask": ids()}):
        model(input_ids=ids(), labels=ids(), use_cache=False, **options).loss.backward()


def distilled(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    distil_step(model, teacher, rows(), fast=False)


def aligned(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    align_step(model, teacher, teacher_slots(teacher), rows(), fast=False)


def calibrated(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    batch = ids(), ids(), ids()
    list(calibrate(model.slots(), teacher, teacher_slots(teacher), [batch]))


def rows() -> Packed:
    return Packed(ids(), ids(), torch.zeros(2, dtype=torch.long, device=DEVICE))


def teacher_slots(teacher: PreTrainedModel) -> list[torch.nn.Module]:
    return [layer.self_attn for layer in teacher.model.layers]


ROWS: dict[str, Callable[[PreTrainedModel, PreTrainedModel], None]] = {
    row.__name__: row
    for row in (
        cached,
        padded,
        packed,
        measured,
        trained,
        distilled,
        aligned,
        calibrated,
    )
}
# What is answered to "do all tokens count?" and "is the loss finite?" is yes, but for these.
NO = (padded,)


def misplaced(model: PreTrainedModel) -> None:
    """One mixer adds a tensor that was made without a device."""
    mixer = next(slot.mixer for slot in model.slots() if hasattr(slot, "mixer"))
    mixer.register_forward_hook(
        lambda module, args, output: (output[0] + torch.ones(output[0].shape), output[1])
    )


def empty_strided(size: Any, stride: Any, dtype: Any = None, **options: Any) -> Tensor:
    return torch._C._acc.create_empty_tensor(size, dtype or torch.float32)


def register_device() -> torch.library.Library:
    """A device without kernels, for fake tensors with gradients; it stays for good."""

    class Backend(_DummyBackendModule):
        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

    _setup_privateuseone_for_python_backend(DEVICE, Backend())
    # What `torch.tensor(numbers, device=..)` calls.
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", lambda source, target, *rest: target, "PrivateUse1")
    return library


def problem(run: Callable[..., None], *arguments: Any) -> str:
    """What a run raises, with the place of it; "" for nothing."""
    try:
        with Answers(run not in NO):
            run(*arguments)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [line for line in place if "site-packages" not in line.filename][-1]
        return f"{type(error).__name__}: {error} ({ours.filename}:{ours.lineno})"
    return ""


def main(folder: str, *names: str) -> None:
    kept = register_device()
    found = {}
    with FakeTensorMode():
        teacher = build(Path(folder) / "stock")
        for name in names:
            model = build(Path(folder) / name)
            for row, run in ROWS.items():
                found[f"{name}-{row}"] = problem(run, model, teacher)
            misplaced(model)
            found[f"{name}-misplaced"] = problem(cached, model, teacher)
    print(json.dumps(found))
    del kept


if __name__ == "__main__":
    main(*sys.argv[1:])
