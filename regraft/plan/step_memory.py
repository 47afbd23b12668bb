"""Memory that a training step takes, from a model's config alone: its own code run on tensors that have no numbers.

PyTorch's fake tensors run every operation of the loop's losses, forward and backward, on shapes only; what would be
alive is added up. A layer of every kind is run alone, so that depth costs nothing, and a batch of one and of two rows
tell what grows with the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..mixers.base import MixerContext
from ..modeling.modeling_regraft import RegraftForCausalLM
from ..train.calibrate import output_error
from ..train.gradient_checkpointing import set_gradient_checkpointing
from ..train.hooks import LayerRecord, record_layers
from ..train.kl import head_kl
from ..train.layer_subset import layer_stack
from ..train.optimizer import parameter_groups
from ..train.stage import Stage
from .fake_tensors import LiveMemoryCounter, build_fake_model, keep_only_layers
from .plan import layer_kinds

Kind = Literal["align", "distil", "next"]
FLOAT32_BYTES = 4  # bytes of a weight, a gradient and each of Adam's moments
SHORT_LENGTH = (
    512  # tokens; what linear mixers take grows evenly with the tokens, so that short rows tell
)


@dataclass(frozen=True)
class BatchBytes:
    """Bytes that grow with the rows of a batch: `fixed + each * rows`."""

    fixed: float = 0.0
    each: float = 0.0

    def __call__(self, rows: int) -> float:
        """For so many rows."""
        return self.fixed + self.each * rows

    @classmethod
    def from_measurements(cls, one: float, two: float) -> BatchBytes:
        """From what one and what two rows take."""
        each = max(0.0, two - one)
        return cls(one - each, each)


@dataclass(frozen=True)
class LayerMemory:
    """A layer's weights, all and those that learn, and the bytes of its step: `kept` from forward to backward, `held`
    more while the forward pass goes on, `working` beside what is kept at the worst moment of its backward pass.
    """

    weights: int
    learning: int
    kept: BatchBytes
    held: BatchBytes
    working: BatchBytes


@dataclass(frozen=True)
class StepMemory:
    """A model's step: its layers in order, the weights of the rest, all and learning, and the bytes of the rest.

    `around`: kept by what is not a layer, `ends`: the worst moment of embedding, norm, head and loss, `head`: the
    head's gradient, `tied`: the embedding's, where it adds to that. `teacher`, `teacher_rest`: the teacher's weights in
    layers and outside, 0 without one.
    """

    layers: tuple[LayerMemory, ...]
    rest: int
    rest_learning: int
    around: BatchBytes
    ends: BatchBytes
    head: int
    tied: int
    teacher: int = 0
    teacher_rest: int = 0

    @property
    def weight_count(self) -> int:
        """All of the student's."""
        return self.rest + sum(layer.weights for layer in self.layers)

    @property
    def trainable_count(self) -> int:
        """Those of the student's that learn."""
        return self.rest_learning + sum(layer.learning for layer in self.layers)


@dataclass(frozen=True)
class MemoryPeaks:
    """Bytes alive after the forward pass, at its worst moment, and at the worst moment of all."""

    kept: float
    forward: float
    peak: float


def measure_step_memory(
    student: Checkpoint,
    teacher: Checkpoint | None,
    kind: Kind,
    length: int,
    fast: bool,
    recompute: bool,
    ce: float = 0.0,
) -> StepMemory:
    """What a step of a stage takes; `fast`: bfloat16 autocast, `recompute`: gradient checkpointing."""
    with FakeTensorMode():
        return Simulation(student, teacher, kind, length, fast, recompute, ce).measure()


class Simulation:
    """The step on fake tensors; inside a FakeTensorMode."""

    def __init__(
        self, student: Checkpoint, teacher: Checkpoint | None, kind: Kind, length: int, fast: bool, recompute: bool,
        ce: float,
    ):  # fmt: skip
        self.kind, self.length, self.fast, self.ce = kind, length, fast, ce
        self.model, self.kinds = build_fake_model(student), layer_kinds(student)
        parameter_groups(self.model, Stage(kind, length, length, ce=ce))
        self.teacher = (
            build_fake_model(teacher).requires_grad_(False) if teacher is not None else None
        )
        self.slots = (
            modeling.slots(self.teacher, teacher) if teacher is not None and kind == "align" else []
        )
        set_gradient_checkpointing(self.model, recompute)

    def measure(self) -> StepMemory:
        """Everything measured."""
        modules = list(layer_stack(self.model))
        inside = {id(p) for module in modules for p in module.parameters()}
        rest = [p for p in self.model.parameters() if id(p) not in inside]
        head = self.model.get_output_embeddings().weight
        taught = list(self.teacher.parameters()) if self.teacher is not None else []
        deep = (
            {id(p) for module in layer_stack(self.teacher) for p in module.parameters()}
            if self.teacher is not None
            else ()
        )
        known = {kind: self.measure_layer(kind) for kind in dict.fromkeys(self.kinds)}
        placed = zip(modules, self.kinds, strict=True)
        layers = [
            LayerMemory(*count_weights(list(module.parameters())), *known[kind])
            for module, kind in placed
        ]
        around = self.measure_batch_bytes(
            lambda rows: self.measure_layers([], rows, self.compute_hidden).kept
        )
        ends = (
            self.measure_batch_bytes(
                lambda rows: self.measure_layers([], rows, self.compute_loss).peak
            )
            if self.kind != "align"
            else BatchBytes()
        )
        grad = FLOAT32_BYTES * head.numel() * head.requires_grad
        tied = grad * (head is self.model.get_input_embeddings().weight)
        return StepMemory(
            tuple(layers), *count_weights(rest), around, ends, grad, tied,
            sum(p.numel() for p in taught if id(p) in deep), sum(p.numel() for p in taught if id(p) not in deep),
        )  # fmt: skip

    def measure_layer(self, kind: str) -> tuple[BatchBytes, BatchBytes, BatchBytes]:
        """(kept, held, working) of a layer of this kind."""
        some = [at for at, name in enumerate(self.kinds) if name == kind][:2]
        if self.kind == "align":
            worst = (
                self.measure_batch_bytes(lambda rows: self.measure_alignment(some[0], rows))
                if kind != "softmax"
                else BatchBytes()
            )
            return BatchBytes(), BatchBytes(), worst
        length = self.length
        if kind == "softmax" or length <= SHORT_LENGTH:
            seen = [self.measure_last_layer(some, rows) for rows in (1, 2)]
            return tuple(BatchBytes.from_measurements(*pair) for pair in zip(*seen, strict=True))  # type: ignore[return-value]
        seen = []
        for self.length in (SHORT_LENGTH // 2, SHORT_LENGTH):
            seen.append(self.measure_last_layer(some, 1))
        self.length = length
        halves = [BatchBytes.from_measurements(*pair) for pair in zip(*seen, strict=True)]
        return tuple(
            BatchBytes(half.fixed, half.each * 2 * length / SHORT_LENGTH) for half in halves
        )  # type: ignore[return-value]

    def measure_last_layer(self, some: list[int], rows: int) -> tuple[float, float, float]:
        """(kept, held, working) of the last of one or two layers of one kind."""
        seen = [
            self.measure_layers(some[:number], rows, self.compute_hidden)
            for number in range(len(some) + 1)
        ]
        kept = seen[-1].kept - seen[-2].kept
        return (
            kept,
            max(0.0, seen[-1].forward - seen[-2].forward - kept),
            seen[1].peak - seen[1].kept,
        )

    def measure_batch_bytes(self, measure: Callable[[int], float]) -> BatchBytes:
        """A measure for one and for two rows."""
        return BatchBytes.from_measurements(measure(1), measure(2))

    def measure_layers(
        self, layers: Collection[int], rows: int, act: Callable[[int], Tensor]
    ) -> MemoryPeaks:
        """Forward and backward of `act` with only these layers in their places, the embedding's gradient left out."""
        cut = self.model.get_input_embeddings().register_forward_hook(
            lambda *given: given[-1].detach().requires_grad_()
        )
        with (
            keep_only_layers(self.model, layers),
            LiveMemoryCounter(self.resident_tensors()) as alive,
        ):
            value = act(rows)
            kept, forward = alive.now, alive.peak
            value.backward(torch.ones_like(value))
        cut.remove()
        seen = MemoryPeaks(kept, forward, alive.peak)
        self.model.zero_grad(set_to_none=True)
        return seen

    def compute_hidden(self, rows: int, model: PreTrainedModel | None = None) -> Tensor:
        """The decoder's output, (rows, length, hidden), of rows that hold several documents; see `last_hidden`."""
        one = model or self.model
        ids, places, segments = (torch.zeros(rows, self.length, dtype=torch.long) for _ in range(3))
        linear = isinstance(one, RegraftForCausalLM)
        given = {"mixing": MixerContext(None, None, segments)} if linear else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.fast):
            found: Tensor = one.get_decoder()(
                input_ids=ids, position_ids=places, use_cache=False, **given
            )[0]
        return found.float()

    def compute_loss(self, rows: int) -> Tensor:
        """The loss as the loop has it, without the teacher's layers."""
        head = self.model.get_output_embeddings()
        labels = torch.zeros(rows, self.length - 1, dtype=torch.long)
        if self.kind == "next":
            return mean_cross_entropy(
                softcap_logits(self.model, head(self.compute_hidden(rows)[:, :-1])), labels
            )
        assert self.teacher is not None
        target = torch.zeros(rows, self.length, self.teacher.get_input_embeddings().weight.shape[1])
        student = self.compute_hidden(rows)
        loss = head_kl(student, head, target, self.teacher.get_output_embeddings(), self.fast)
        return (
            loss + self.ce * mean_cross_entropy(head(student[:, :-1]), labels) if self.ce else loss
        )

    def measure_alignment(self, layer: int, rows: int) -> float:
        """The worst moment of aligning one mixer, the teacher's forward pass up to it included."""
        assert self.teacher is not None
        mixer, segments = (
            self.model.slots()[layer].mixer,
            torch.zeros(rows, self.length, dtype=torch.long),
        )

        def backpropagate(at: int, record: LayerRecord) -> None:
            with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.fast):
                value = output_error(mixer, record, record.mixer_context(segments))
            value.backward()

        with (
            record_layers(self.slots, [layer], backpropagate),
            LiveMemoryCounter(self.resident_tensors()) as alive,
            keep_only_layers(self.teacher, [layer]),
        ):
            with torch.no_grad():
                self.compute_hidden(rows, self.teacher)
        self.model.zero_grad(set_to_none=True)
        return alive.peak

    def resident_tensors(self) -> list[Tensor]:
        """What is there before the step."""
        models = [model for model in (self.model, self.teacher) if model is not None]
        return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def count_weights(parameters: list[nn.Parameter]) -> tuple[int, int]:
    """(numbers, those of them that learn)."""
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def softcap_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Logits as a family caps them."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over tokens."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
