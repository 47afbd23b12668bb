"""How fast this machine multiplies matrices, and how much of that a training step makes use of."""

from __future__ import annotations

import time
from functools import cache

import torch

from .. import distributed

MEASURE_SECONDS = 0.2  # seconds of measuring
MATRIX_SIDE = {"cpu": 1024}  # of the square matrices; what is not a processor has 8192


def measure_peak_flops(device: torch.device, fast: bool) -> float:
    """FLOP/s of the best matrix product, bfloat16 if `fast`, else float32, summed over the processes of a torchrun.

    Measured once in a process for each number of threads; every process must call it.
    """
    return sum(distributed.all_gather(measure_matmul_flops(device, fast, torch.get_num_threads())))


@cache
def measure_matmul_flops(device: torch.device, fast: bool, threads: int) -> float:
    """FLOP/s of this process' fastest square matrix product within a fraction of a second."""
    side = MATRIX_SIDE.get(device.type, 8192)
    one = torch.ones(side, side, dtype=torch.bfloat16 if fast else torch.float32, device=device)
    out, best, begun = one @ one, float("inf"), time.perf_counter()
    while time.perf_counter() - begun < MEASURE_SECONDS:
        synchronize(device)
        tick = time.perf_counter()
        torch.mm(one, one, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - tick)
    return 2 * side**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compute_throughput(tokens: int, flops: int, seconds: float, best: float) -> dict[str, float]:
    """Speed of a step: tokens (or images) and FLOPs a second, and their share of the measured peak `best`."""
    seconds = max(seconds, 1e-9)
    found = {"tokens_per_second": tokens / seconds, "flops_per_second": flops / seconds}
    found["peak_share"] = flops / seconds / best
    return {name: float(f"{value:.4g}") for name, value in found.items()}
