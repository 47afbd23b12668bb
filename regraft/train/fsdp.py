"""A model over several processes: FSDP2 shards it layer by layer, weights are read straight into the shards."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import PreTrainedModel

from .. import distributed, modeling
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..modeling.meta import buffers
from .align import mixers
from .fsdp_forward import PLACE, Whole, settle
from .layer_subset import stack


def mesh(hybrid: bool = False) -> DeviceMesh:
    """All processes in a row; `hybrid`: machines by the processes of each, a whole model on every machine."""
    kind, count = distributed.device().type, distributed.world()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if not hybrid:
        return init_device_mesh(kind, (count,), mesh_dim_names=("shard",))
    if count % here:
        raise RegraftError(f"{count} processes are not the same number on every machine ({here} here): shard over all")
    return init_device_mesh(kind, (count // here, here), mesh_dim_names=("replicate", "shard"))


def spread(model: PreTrainedModel, over: DeviceMesh, layerwise: bool = False) -> PreTrainedModel:
    """Shard every layer of a model, and the rest as one more unit; its parameters become DTensors.

    `layerwise`: mixers are units of their own, as stages need that run them without the model around them.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is added in place here
    for mixer in mixers(model).values() if layerwise else ():
        fully_shard(mixer, mesh=over)
        register_fsdp_forward_method(mixer, "matrix")
    for layer in stack(model):
        fully_shard(layer, mesh=over)
    vars(model)[PLACE] = whole = Whole(model)
    fully_shard(whole, mesh=over)
    return model


def over_all(model: PreTrainedModel, layerwise: bool = False) -> PreTrainedModel:
    """A whole model that every process has, sharded over them where they compute; alone, whole."""
    model = model.to(distributed.device())
    if distributed.world() == 1:
        return model
    whole = vars(spread(model, mesh(), layerwise))[PLACE]
    whole(lambda: None)  # the first forward makes this module the root of all shards
    settle(model)
    return model


def load(checkpoint: Checkpoint, over: DeviceMesh | None, layerwise: bool = False) -> PreTrainedModel:
    """The float32 model of a checkpoint; over a mesh each process reads only its shards, one tensor after the other."""
    if over is None:
        return modeling.materialize(checkpoint)
    model = modeling.outline(checkpoint)
    tables = [(module, name, value) for module, name, value in buffers(model)]
    whole = vars(spread(model, over, layerwise))[PLACE]
    whole.to_empty(device=distributed.device())
    for module, name, value in tables:
        setattr(module, name, value.to(distributed.device()))
    fill(model, checkpoint)
    whole(lambda: None)  # the first forward makes this module the root of all shards
    settle(model)
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Each parameter's shard from the checkpoint.

    Names that the class stores otherwise than its files do (fused experts) are made from the whole model in memory.
    """
    lazy = {checkpoint.names[key]: lazy for key, lazy in checkpoint.tensors.items()}
    named = dict(model.named_parameters())
    other: Mapping[str, Tensor] = {}
    if any(name not in lazy or lazy[name].shape != tuple(p.shape) for name, p in named.items()):
        other = dict(modeling.materialize(checkpoint).named_parameters())
    for name, parameter in named.items():
        value = other[name] if other else lazy[name].read()
        part(parameter).copy_(shard(value, parameter))


def part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole `value` that this process holds of `like`; FSDP cuts as `torch.chunk` does."""
    if not isinstance(like, DTensor):
        return value
    place = like.device_mesh.get_coordinate()
    assert place is not None
    for dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            pieces = value.chunk(like.device_mesh.size(dim), placement.dim)
            mine = place[dim]
            value = pieces[mine] if mine < len(pieces) else value.narrow(placement.dim, 0, 0)
    return value


def laid(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, which every process has, laid out over them like another tensor."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    mine = shard(value, like).to(like.device).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(mine, like.device_mesh, like.placements, shape=value.shape, stride=value.stride())


def everywhere(value: Tensor, like: Tensor) -> Tensor:
    """A value over the processes of another tensor, the whole of it in each: summed up where they hold parts of it."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    whole = [Replicate()] * like.device_mesh.ndim
    if isinstance(value, DTensor):
        return value.redistribute(placements=whole)
    return DTensor.from_local(value.to(like.device), like.device_mesh, whole)


def complete(tensor: Tensor) -> Tensor:
    """The whole of a tensor, in every process; all of them must call it."""
    whole = tensor.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict in the first process's memory, empty in the others; all must call it."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        whole = complete(value)
        if distributed.first():
            found[name] = whole.cpu()
    return found
