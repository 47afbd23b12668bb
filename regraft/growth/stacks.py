"""The depths of a model with one stack of layers, or with an encoder and a decoder."""

from __future__ import annotations

from ..core.anatomy import Anatomy
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError

ENCODER, DECODER = "encoder_depth", "depth"  # the axes that count their layers


def has_two_stacks(anatomy: Anatomy) -> bool:
    """Whether a family has an encoder in front of a decoder."""
    return any(part.stack == ENCODER for part in anatomy.parts.values())


def resolve_depths(
    source: Checkpoint, layers: int | None, encoder: int | None, decoder: int | None
) -> dict[str, int]:
    """The layers of every stack of the target, by the axis that counts them.

    RegraftError when nothing is requested, or a stack that the model does not have, or one number
    for two stacks that differ.

    Args:
        source: the model that grows.
        layers: of every stack.
        encoder: of the encoder alone.
        decoder: of the decoder alone.
    """
    sizes, family = source.sizes, source.anatomy.family
    if layers is None and encoder is None and decoder is None:
        raise RegraftError(f"{family} has {source.layers} layers: say how many it grows to")
    if not has_two_stacks(source.anatomy):
        if layers is None or encoder is not None or decoder is not None:
            raise RegraftError(
                f"{family} has one stack of {source.layers} layers: use --layers, without "
                "--encoder-layers and --decoder-layers"
            )
        return {DECODER: layers}

    if layers is not None and (encoder is not None or decoder is not None):
        raise RegraftError(
            f"--layers {layers} is for both stacks of {family}: leave it out, or --encoder-layers "
            "and --decoder-layers"
        )
    if layers is not None and sizes[ENCODER] != sizes[DECODER]:
        raise RegraftError(
            f"'{source.origin}' has {sizes[ENCODER]} encoder and {sizes[DECODER]} decoder layers: "
            f"say which with --encoder-layers, --decoder-layers or both, not --layers {layers}"
        )
    return {
        ENCODER: layers or encoder or sizes[ENCODER],
        DECODER: layers or decoder or sizes[DECODER],
    }


def refuse_two_stacks(source: Checkpoint, what: str) -> None:
    """RegraftError when a model has an encoder and a decoder, which `what` cannot grow."""
    if has_two_stacks(source.anatomy):
        raise RegraftError(
            f"{what} knows models with one stack of layers, not {source.anatomy.family}'s encoder "
            "and decoder: leave it out"
        )
