"""Memory that a training step takes, from a model's config alone: its code run on fake tensors.

PyTorch's fake tensors run every operation of the loop's losses, forward and backward, on shapes
only; what would be alive is added up. One layer of every kind is measured, so that depth costs
nothing, and a batch of one and of two rows tells what grows with the rows.
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
from ..modeling.layer_kinds import layer_kinds
from ..modeling.mixer_slot import RowLayout
from ..modeling.modeling_regraft import RegraftForCausalLM
from ..modeling.text_part import run_text_part
from ..train.calibrate import output_error
from ..train.gradient_checkpointing import set_gradient_checkpointing
from ..train.hooks import LayerRecord, record_layers
from ..train.kl import head_kl
from ..train.layer_subset import layer_stack
from ..train.optimizer import parameter_groups
from ..train.stage import Stage
from .fake_tensors import LiveMemoryCounter, build_fake_model, keep_only_layers
from .memory_model import BatchBytes, LayerMemory, StepMemory

Kind = Literal["align", "distil", "next"]
FLOAT32_BYTES = 4  # of a weight, a gradient and each of Adam's moments
SHORT_LENGTH = 512  # tokens; linear mixers are measured on rows of this length at most


@dataclass(frozen=True)
class MemoryPeaks:
    """Bytes alive in a forward and a backward pass.

    Attributes:
        kept: after the forward pass.
        forward: at its worst moment.
        peak: at the worst moment of both.
    """

    kept: float
    forward: float
    peak: float


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of a layer for one batch; fields as of `LayerMemory`."""

    kept: float
    forward: float
    working: float


def measure_step_memory(
    student: Checkpoint,
    teacher: Checkpoint | None,
    kind: Kind,
    length: int,
    bf16_autocast: bool,
    gradient_checkpointing: bool,
    ce: float = 0.0,
) -> StepMemory:
    """Memory of one step of a stage.

    Args:
        student: the model that is trained.
        teacher: the model that `align` and `distil` imitate.
        kind: of the stage.
        length: tokens of a row.
        bf16_autocast: whether products are in bfloat16.
        gradient_checkpointing: whether layers are computed again in the backward pass.
        ce: weight of next-token cross-entropy in `distil`.
    """
    with FakeTensorMode():
        simulation = StepSimulation(
            student, teacher, kind, length, bf16_autocast, gradient_checkpointing, ce
        )
        return simulation.measure()


class StepSimulation:
    """A training step on fake tensors; it lives inside a FakeTensorMode."""

    def __init__(
        self,
        student: Checkpoint,
        teacher: Checkpoint | None,
        kind: Kind,
        length: int,
        bf16_autocast: bool,
        gradient_checkpointing: bool,
        ce: float,
    ):
        """Build student and teacher; arguments as of `measure_step_memory`."""
        self.kind, self.length, self.bf16_autocast, self.ce = kind, length, bf16_autocast, ce
        self.model = build_fake_model(student)
        self.layer_kinds = layer_kinds(student)
        # The stage says which weights learn: the others get no gradient.
        parameter_groups(self.model, Stage(kind, length, length, ce=ce))
        set_gradient_checkpointing(self.model, gradient_checkpointing)

        self.teacher: PreTrainedModel | None = None
        self.slots: list[nn.Module] = []
        if teacher is not None:
            self.teacher = build_fake_model(teacher).requires_grad_(False)
            if kind == "align":
                self.slots = modeling.slots(self.teacher, teacher)

    def measure(self) -> StepMemory:
        """Measure a layer of every kind and what is outside the layers."""
        inside, rest = split_parameters(self.model)
        by_kind = {kind: self.measure_layer(kind) for kind in dict.fromkeys(self.layer_kinds)}
        layers = [
            LayerMemory(*count_weights(parameters), *by_kind[kind])
            for parameters, kind in zip(inside, self.layer_kinds, strict=True)
        ]

        around = measure_batch_bytes(
            lambda rows: self.measure_layers([], lambda: self.compute_hidden(rows)).kept
        )
        ends = BatchBytes()
        if self.kind != "align":
            ends = measure_batch_bytes(
                lambda rows: self.measure_layers([], lambda: self.compute_loss(rows)).peak
            )

        # Autograd adds a tied weight's two gradients: for a moment both are there.
        head = self.model.get_output_embeddings().weight
        is_tied = head is self.model.get_input_embeddings().weight
        head_gradient = FLOAT32_BYTES * head.numel() * head.requires_grad

        teacher = teacher_rest = 0
        if self.teacher is not None:
            teacher_rest = count_weights(split_parameters(self.teacher)[1])[0]
            teacher = count_weights(list(self.teacher.parameters()))[0] - teacher_rest
        return StepMemory(
            tuple(layers),
            *count_weights(rest),
            around,
            ends,
            head=head_gradient,
            tied=head_gradient * is_tied,
            teacher=teacher,
            teacher_rest=teacher_rest,
        )

    def measure_layer(self, kind: str) -> tuple[BatchBytes, BatchBytes, BatchBytes]:
        """(kept, forward, working) of a layer of this kind; see `LayerMemory`."""
        layers = [index for index, name in enumerate(self.layer_kinds) if name == kind][:2]

        # `align` trains each mixer by itself on the teacher's input: nothing is kept for later.
        if self.kind == "align":
            if kind == "softmax":
                return BatchBytes(), BatchBytes(), BatchBytes()
            working = measure_batch_bytes(lambda rows: self.measure_alignment(layers[0], rows))
            return BatchBytes(), BatchBytes(), working

        from_rows = BatchBytes.from_measurements
        if kind == "softmax" or self.length <= SHORT_LENGTH:
            one, two = (self.measure_last_layer(layers, rows, self.length) for rows in (1, 2))
            return (
                from_rows(one.kept, two.kept),
                from_rows(one.forward, two.forward),
                from_rows(one.working, two.working),
            )

        # What linear mixers take grows evenly with the tokens, so that two short rows tell what a
        # long one takes; to simulate all its chunks would be slow.
        half, whole = (
            self.measure_last_layer(layers, 1, length)
            for length in (SHORT_LENGTH // 2, SHORT_LENGTH)
        )

        def extend(at_half: float, at_whole: float) -> BatchBytes:
            growth = from_rows(at_half, at_whole)
            return BatchBytes(growth.fixed, growth.each * 2 * self.length / SHORT_LENGTH)

        return (
            extend(half.kept, whole.kept),
            extend(half.forward, whole.forward),
            extend(half.working, whole.working),
        )

    def measure_last_layer(self, layers: list[int], rows: int, length: int) -> LayerBytes:
        """Bytes of the last of one or two layers of one kind.

        The difference that the last one makes leaves out what all of them share, such as a mask
        that each keeps for its backward pass.
        """
        seen = [
            self.measure_layers(layers[:count], lambda: self.compute_hidden(rows, length))
            for count in range(len(layers) + 1)
        ]
        kept = seen[-1].kept - seen[-2].kept
        forward = max(0.0, seen[-1].forward - seen[-2].forward - kept)
        return LayerBytes(kept, forward, seen[1].peak - seen[1].kept)

    def measure_layers(self, layers: Collection[int], compute: Callable[[], Tensor]) -> MemoryPeaks:
        """Memory of forward and backward with only some layers in place.

        The embedding's gradient is left out: the forecast counts it apart (`StepMemory.tied`).

        Args:
            layers: those that are in place.
            compute: the forward pass.
        """
        cut = self.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.detach().requires_grad_()
        )

        with (
            keep_only_layers(self.model, layers),
            LiveMemoryCounter(self.resident_tensors()) as alive,
        ):
            # Between the two passes alive is just what backward needs.
            value = compute()
            kept, forward = alive.now, alive.peak
            value.backward(torch.ones_like(value))

        cut.remove()
        self.model.zero_grad(set_to_none=True)
        return MemoryPeaks(kept, forward, alive.peak)

    def compute_hidden(
        self, rows: int, length: int | None = None, model: PreTrainedModel | None = None
    ) -> Tensor:
        """The decoder's output, (rows, length, hidden); see `train.objectives.last_hidden`.

        Args:
            rows: of the batch, which hold several documents each.
            length: tokens of a row; the stage's if None.
            model: whose decoder runs; the student if None.
        """
        model, length = model or self.model, length or self.length
        ids, positions, segments = (torch.zeros(rows, length, dtype=torch.long) for _ in range(3))
        linear = isinstance(model, RegraftForCausalLM)
        kwargs = {"rows": RowLayout(segments=segments)} if linear else {}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16_autocast):
            hidden: Tensor = run_text_part(model, positions, input_ids=ids, **kwargs)[0]
        return hidden.float()

    def compute_loss(self, rows: int) -> Tensor:
        """The loss as the training loop computes it, without the teacher's layers."""
        head = self.model.get_output_embeddings()
        labels = torch.zeros(rows, self.length - 1, dtype=torch.long)
        if self.kind == "next":
            logits = softcap_logits(self.model, head(self.compute_hidden(rows)[:, :-1]))
            return mean_cross_entropy(logits, labels)

        assert self.teacher is not None
        teacher_hidden = self.teacher.get_input_embeddings().weight.shape[1]
        target = torch.zeros(rows, self.length, teacher_hidden)
        student = self.compute_hidden(rows)
        teacher_head = self.teacher.get_output_embeddings()
        loss = head_kl(student, head, target, teacher_head, self.bf16_autocast)
        if self.ce:
            loss = loss + self.ce * mean_cross_entropy(head(student[:, :-1]), labels)
        return loss

    def measure_alignment(self, layer: int, rows: int) -> float:
        """Bytes at the worst moment of aligning one mixer.

        The teacher's forward pass up to it is included: the loop trains the mixer from a hook in
        that pass, so both are alive.
        """
        assert self.teacher is not None
        mixer = self.model.slots()[layer].mixer
        segments = torch.zeros(rows, self.length, dtype=torch.long)

        def backpropagate(index: int, record: LayerRecord) -> None:
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=self.bf16_autocast)
            with torch.enable_grad(), autocast:
                value = output_error(mixer, record, record.mixer_context(segments))
            value.backward()

        with (
            record_layers(self.slots, [layer], backpropagate),
            LiveMemoryCounter(self.resident_tensors()) as alive,
            keep_only_layers(self.teacher, [layer]),
            torch.no_grad(),
        ):
            self.compute_hidden(rows, model=self.teacher)
        self.model.zero_grad(set_to_none=True)
        return alive.peak

    def resident_tensors(self) -> list[Tensor]:
        """Parameters and buffers of both models, which are there before the step."""
        models = [model for model in (self.model, self.teacher) if model is not None]
        return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def measure_batch_bytes(measure: Callable[[int], float]) -> BatchBytes:
    """Bytes by rows, from a measure that is called for one and for two rows."""
    return BatchBytes.from_measurements(measure(1), measure(2))


def split_parameters(
    model: PreTrainedModel,
) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """(parameters of every layer, parameters outside the layers)."""
    layers = [list(module.parameters()) for module in layer_stack(model)]
    inside = {id(parameter) for parameters in layers for parameter in parameters}
    return layers, [parameter for parameter in model.parameters() if id(parameter) not in inside]


def count_weights(parameters: list[nn.Parameter]) -> tuple[int, int]:
    """(numbers, those of them that learn)."""
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def softcap_logits(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Logits as Gemma 2 caps them; others' stay as they are."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over tokens; logits: (rows, length, vocab), labels: (rows, length)."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
