"""The processes that torchrun started, and what they tell each other; one process is rank 0 of 1
and tells nobody.
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
COLLECTIVE_TIMEOUT = timedelta(
    days=1
)  # the first process may measure or write for hours while the others wait


def rank() -> int:
    """Number of this process among all, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank0() -> bool:
    """Whether this is the process that speaks and writes for all."""
    return rank() == 0


def device() -> torch.device:
    """Where this process trains: its own accelerator, or the processor."""
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
    """The first process's value, in all of them."""
    import torch.distributed as dist

    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value: T) -> list[T]:
    """Everybody's value, by rank."""
    import torch.distributed as dist

    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def on_rank0(act: Callable[[], T]) -> T:
    """What the first process gets from `act` while the others wait, in all of them; or what it
    raises, in all.
    """
    if world_size() == 1:
        return act()
    found: list[Any] = [None, None]
    if is_rank0():
        try:
            found[0] = act()
        except Exception as error:
            found[1] = error
    value, failure = broadcast(found)
    if failure is not None:
        raise failure
    return value


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over all processes."""
    import torch.distributed as dist

    for tensor in tensors if world_size() > 1 else ():
        dist.all_reduce(tensor)


@contextmanager
def init_distributed() -> Iterator[None]:
    """Inside, the processes of a torchrun know each other: gloo on processors, NCCL beside it on
    accelerators.

    Without torchrun nothing happens. A process whose launcher dies gets SIGTERM (on Linux).
    RegraftError when the processes cannot meet.
    """
    import torch
    import torch.distributed as dist

    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        yield
        return
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise RegraftError(
                f"process {local} of this machine has no accelerator, there are"
                f" {torch.cuda.device_count()}: start at most that many with --nproc-per-node"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    terminate_with_parent()
    try:
        store, mine, count = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
    except dist.DistError as error:
        raise RegraftError(
            f"process {os.environ.get('RANK')} found no launcher within {RENDEZVOUS_TIMEOUT}"
            f" ({str(error).splitlines()[0]}): start all processes again"
        ) from error
    store.set_timeout(COLLECTIVE_TIMEOUT)
    dist.init_process_group(
        backend, store=store, rank=mine, world_size=count, timeout=COLLECTIVE_TIMEOUT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
