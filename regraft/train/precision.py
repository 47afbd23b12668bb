"""Whether a stage computes in bfloat16 or in float32."""

from __future__ import annotations

import time
from functools import cache

import torch

from .. import distributed
from .stage import Stage

SIDE = 512  # of the square matrices that are multiplied
TRIES = 8
MUCH_FASTER = 0.75  # bfloat16 must take less than this share of float32's time


def use_bfloat16(stage: Stage, device: torch.device) -> bool:
    """Whether a stage runs under bfloat16 autocast; `auto` is decided by the first process.

    Under torchrun every process must call it.
    """
    if stage.precision != "auto":
        return stage.precision == "bfloat16"
    return distributed.broadcast(bfloat16_is_faster(device.type))


@cache
def bfloat16_is_faster(device: str) -> bool:
    """Whether this machine multiplies bfloat16 matrices clearly faster than float32.

    Takes a few milliseconds on a CPU, many of which only emulate bfloat16; other devices are
    taken to be faster.
    """
    if device != "cpu":
        return True

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(SIDE, SIDE, dtype=dtype)
        tries = []
        for _ in range(TRIES):
            begin = time.perf_counter()
            matrix @ matrix
            tries.append(time.perf_counter() - begin)
        # The best try: others share the machine, and the first one warms up.
        times[dtype] = min(tries)
    return times[torch.bfloat16] < MUCH_FASTER * times[torch.float32]
