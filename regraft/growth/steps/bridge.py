"""Bridge: the same model as another family, whose class can hold what this one cannot."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.checkpoint import Checkpoint
from ...core.step import step_entry
from .. import class_conversion


@dataclass(frozen=True)
class Bridge:
    """Write a checkpoint as family `to` (None: the one its table names), with the same sizes: Llama
    (arXiv 2302.13971) as Mistral (arXiv 2310.06825), GPT-NeoX (arXiv 2204.06745) as Phi (arXiv
    2306.11644) when its residual is parallel and as StarCoder2 (arXiv 2402.19173) when it is
    sequential.

    Mistral does not want hidden to be a multiple of the heads; Phi and StarCoder2 leave heads,
    head_dim and hidden free of each other. Phi's one norm feeds attention and MLP, so gains and
    biases of the two go into the maps behind them.

    Preserves: the logits; bit for bit as Mistral, up to rounding to the stored dtype as Phi, and as
    StarCoder2 up to the rounding of its rotary frequencies where only a part of each head turns (a
    type that transformers 4 refuses).
    Refuses: families and configs without a bridge, with the list of those that have one; rotary
    types that the target cannot turn a part of a head by.
    """

    to: str | None = None

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint of the other family."""
        to = class_conversion.find_target_family(source, self.to)
        converted = class_conversion.convert_to_family(source, to)
        return replace(converted, history=(*source.history, step_entry(Bridge(to))))
