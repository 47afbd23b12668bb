"""Memory of a training step by layers, as it grows with the rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchBytes:
    """Bytes that grow with the rows of a batch: `fixed + each * rows`."""

    fixed: float = 0.0
    each: float = 0.0

    def __call__(self, rows: int) -> float:
        """Bytes for so many rows."""
        return self.fixed + self.each * rows

    @classmethod
    def from_measurements(cls, one: float, two: float) -> BatchBytes:
        """From the bytes that one row and two rows take."""
        each = max(0.0, two - one)
        return cls(one - each, each)


@dataclass(frozen=True)
class LayerMemory:
    """One layer's part of a step.

    Attributes:
        weights: numbers that it holds.
        trainable: those of them that learn.
        kept: bytes that it keeps from the forward pass to its backward pass.
        forward: bytes beside `kept` at the worst moment of its forward pass.
        working: bytes beside what is kept at the worst moment of its backward pass.
    """

    weights: int
    trainable: int
    kept: BatchBytes
    forward: BatchBytes
    working: BatchBytes


@dataclass(frozen=True)
class StepMemory:
    """A model's step, by layers.

    Attributes:
        layers: in order.
        rest: weights outside the layers.
        rest_trainable: those of them that learn.
        around: bytes kept by what is not a layer, such as the embedding's output.
        ends: bytes at the worst moment of embedding, norm, head and loss.
        head: bytes of the head's gradient.
        tied: bytes of the embedding's gradient, where it comes beside the head's: tied weights.
        teacher: weights of the teacher's layers; 0 without one.
        teacher_rest: its weights outside the layers.
    """

    layers: tuple[LayerMemory, ...]
    rest: int
    rest_trainable: int
    around: BatchBytes
    ends: BatchBytes
    head: int
    tied: int
    teacher: int = 0
    teacher_rest: int = 0

    @property
    def weight_count(self) -> int:
        """All weights of the student."""
        return self.rest + sum(layer.weights for layer in self.layers)

    @property
    def trainable_count(self) -> int:
        """Those of the student's weights that learn."""
        return self.rest_trainable + sum(layer.trainable for layer in self.layers)
