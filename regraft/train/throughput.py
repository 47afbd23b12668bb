"""How fast this machine multiplies matrices, and how much of that a training step uses."""

from __future__ import annotations

import time
from functools import cache

import torch

from .. import distributed
from .records import Throughput

MEASURE_SECONDS = 0.2
# Side of the square matrices that are multiplied. Accelerators need larger ones to reach their
# best speed.
CPU_SIDE, ACCELERATOR_SIDE = 1024, 8192


def measure_peak_flops(device: torch.device, fast: bool) -> float:
    """Measure the FLOP/s of the best matrix product, summed over all processes.

    It is measured once in a process for each number of threads. Every process must call it.

    Args:
        device: where this process computes.
        fast: multiply bfloat16 matrices instead of float32.
    """
    return sum(distributed.all_gather(measure_matmul_flops(device, fast, torch.get_num_threads())))


@cache
def measure_matmul_flops(device: torch.device, fast: bool, threads: int) -> float:
    """FLOP/s of this process's fastest square matrix product in `MEASURE_SECONDS`.

    `threads` only distinguishes the remembered results.
    """
    side = CPU_SIDE if device.type == "cpu" else ACCELERATOR_SIDE
    one = torch.ones(side, side, dtype=torch.bfloat16 if fast else torch.float32, device=device)
    # The first product also warms up the libraries, so it is not measured.
    out, best, begin = one @ one, float("inf"), time.perf_counter()

    while time.perf_counter() - begin < MEASURE_SECONDS:
        synchronize(device)
        tick = time.perf_counter()
        torch.mm(one, one, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - tick)
    return 2 * side**3 / best


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished all work it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def compute_throughput(tokens: int, flops: int, seconds: float, best: float) -> Throughput:
    """Compute the speed of a step, rounded to four digits.

    Args:
        tokens: tokens of the step, or images.
        flops: FLOPs of the step over all processes.
        seconds: what the step took.
        best: the measured peak in FLOP/s, see `measure_peak_flops`.
    """
    seconds = max(seconds, 1e-9)
    return {
        "tokens_per_second": round_to_four_digits(tokens / seconds),
        "flops_per_second": round_to_four_digits(flops / seconds),
        "peak_share": round_to_four_digits(flops / seconds / best),
    }


def round_to_four_digits(value: float) -> float:
    """A number with four significant digits."""
    return float(f"{value:.4g}")
