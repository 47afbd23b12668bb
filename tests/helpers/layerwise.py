"""A stage and rows for alignment layer by layer."""

from __future__ import annotations

import math

import torch

from helpers.tiny import tokens
from regraft.data.rows import Packed
from regraft.train.stage import Stage

STAGE = Stage(
    "align", 4 * 64, length=32, batch=2, precision="float32", clip=math.inf, weight_decay=0.1
)


def rows(count: int = 9, length: int = 32) -> Packed:
    """Rows of two documents each."""
    ids = tokens(count, length)
    places = torch.cat((torch.arange(length // 3), torch.arange(length - length // 3)))
    return Packed(ids, places.expand_as(ids), torch.full((count,), length))
