"""The processes that torchrun started, and how they exchange values.

Without torchrun every function works too: the one process is rank 0 of 1. torch is imported by the
functions that need it, so that `regraft --help` loads none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import RegraftError
from .io.linux import terminate_with_parent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # processes of one launcher start together
COLLECTIVE_TIMEOUT = timedelta(days=1)  # rank 0 may evaluate or write for hours, the others wait


def rank() -> int:
    """Number of this process among all, counted from 0."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    """Whether this is the process that prints and writes files for all."""
    return rank() == 0


def device() -> torch.device:
    """Where this process trains: its own GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def barrier() -> None:
    """Wait until every process is here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def broadcast(value: T) -> T:
    """Rank 0's value, in all processes; anything that can be pickled."""
    import torch.distributed as dist

    if world_size() == 1:
        return value
    values: list[Any] = [value]  # overwritten in place
    dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather(value: T) -> list[T]:
    """The values of all processes in order of rank, in all of them."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_rank0(act: Callable[[], T]) -> T:
    """Run a function on rank 0 alone and return its value in all processes.

    The others wait. When it raises an exception, it is raised in all of them, since they would
    otherwise wait for each other for ever.
    """
    if world_size() == 1:
        return act()

    result: list[Any] = [None, None]  # value, exception
    if is_rank0():
        try:
            result[0] = act()
        except Exception as error:
            result[1] = error
    value, failure = broadcast(result)
    if failure is not None:
        raise failure
    return value


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    import torch.distributed as dist

    for tensor in tensors if world_size() > 1 else ():
        dist.all_reduce(tensor)


@contextmanager
def init_distributed() -> Iterator[None]:
    """Connects the processes that torchrun started, while the block runs.

    They talk over gloo, and between GPUs over NCCL. Without torchrun nothing happens. A process
    whose launcher dies gets SIGTERM (on Linux). RegraftError when the processes do not find each
    other, or when there are more of them than GPUs.
    """
    import torch
    import torch.distributed as dist

    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return

    # The device comes first: NCCL binds a process to the GPU that is current when it starts.
    _select_gpu()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    terminate_with_parent()

    # Two timeouts: processes that start together meet within minutes, while later ones may wait for
    # hours. `init_process_group` has only one, so the rendezvous is done by hand.
    try:
        store, rank_here, count = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except dist.DistError as error:
        raise RegraftError(
            f"process {os.environ.get('RANK')} found no launcher within {RENDEZVOUS_TIMEOUT} "
            f"({str(error).splitlines()[0]}): start all processes again"
        ) from error
    store.set_timeout(COLLECTIVE_TIMEOUT)

    dist.init_process_group(
        backend, store=store, rank=rank_here, world_size=count, timeout=COLLECTIVE_TIMEOUT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def _select_gpu() -> None:
    """Make this process's GPU the current one; RegraftError when the machine has too few."""
    import torch

    if not torch.cuda.is_available():
        return
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise RegraftError(
            f"process {local} of this machine has no accelerator, "
            f"there are {torch.cuda.device_count()}: "
            "start at most that many with --nproc-per-node"
        )
    torch.cuda.set_device(local)
