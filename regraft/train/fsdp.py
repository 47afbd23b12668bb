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
from ..modeling.meta import iter_buffers
from .align import mixers_by_layer
from .fsdp_forward import WRAPPER_KEY, ForwardWrapper, reshard_model
from .layer_subset import layer_stack


def build_mesh(hybrid: bool = False) -> DeviceMesh:
    """All processes in a row; `hybrid`: machines by the processes of each, a whole model on every machine."""
    kind, count = distributed.device().type, distributed.world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if not hybrid:
        return init_device_mesh(kind, (count,), mesh_dim_names=("shard",))
    if count % here:
        raise RegraftError(
            f"{count} processes are not the same number on every machine ({here} here): shard over all"
        )
    return init_device_mesh(kind, (count // here, here), mesh_dim_names=("replicate", "shard"))


def shard_model(
    model: PreTrainedModel, over: DeviceMesh, layerwise: bool = False
) -> PreTrainedModel:
    """Shard every layer of a model, and the rest as one more unit; its parameters become DTensors.

    `layerwise`: mixers are units of their own, as stages need that run them without the model around them.
    """
    warnings.filterwarnings(
        "ignore", "FSDP2-wrapped module .* returned a view"
    )  # nothing is added in place here
    for mixer in mixers_by_layer(model).values() if layerwise else ():
        fully_shard(mixer, mesh=over)
        register_fsdp_forward_method(mixer, "matrix")
    for layer in layer_stack(model):
        fully_shard(layer, mesh=over)
    vars(model)[WRAPPER_KEY] = whole = ForwardWrapper(model)
    fully_shard(whole, mesh=over)
    return model


def shard_over_all(model: PreTrainedModel, layerwise: bool = False) -> PreTrainedModel:
    """A whole model that every process has, sharded over them where they compute; alone, whole."""
    model = model.to(distributed.device())
    if distributed.world_size() == 1:
        return model
    whole = vars(shard_model(model, build_mesh(), layerwise))[WRAPPER_KEY]
    whole(lambda: None)  # the first forward makes this module the root of all shards
    reshard_model(model)
    return model


def load_sharded(
    checkpoint: Checkpoint, over: DeviceMesh | None, layerwise: bool = False
) -> PreTrainedModel:
    """The float32 model of a checkpoint; over a mesh each process reads only its shards, one tensor after the other."""
    if over is None:
        return modeling.materialize(checkpoint)
    model = modeling.build_meta_model(checkpoint)
    tables = [(module, name, value) for module, name, value in iter_buffers(model)]
    whole = vars(shard_model(model, over, layerwise))[WRAPPER_KEY]
    whole.to_empty(device=distributed.device())
    for module, name, value in tables:
        setattr(module, name, value.to(distributed.device()))
    load_shards(model, checkpoint)
    whole(lambda: None)  # the first forward makes this module the root of all shards
    reshard_model(model)
    return model


@torch.no_grad()
def load_shards(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
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
        local_part(parameter).copy_(shard_like(value, parameter))


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
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


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole value, which every process has, laid out over them like another tensor."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    mine = shard_like(value, like).to(like.device).clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(
        mine, like.device_mesh, like.placements, shape=value.shape, stride=value.stride()
    )


def replicate_like(value: Tensor, like: Tensor) -> Tensor:
    """A value over the processes of another tensor, the whole of it in each: summed up where they hold parts of it."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    whole = [Replicate()] * like.device_mesh.ndim
    if isinstance(value, DTensor):
        return value.redistribute(placements=whole)
    return DTensor.from_local(value.to(like.device), like.device_mesh, whole)


def gather_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor, in every process; all of them must call it."""
    whole = tensor.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def gather_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict in the first process's memory, empty in the others; all must call it."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        whole = gather_tensor(value)
        if distributed.is_rank0():
            found[name] = whole.cpu()
    return found
