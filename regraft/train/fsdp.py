"""A model over several processes: FSDP2 shards it by layers, each process reads its own shards."""

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
from .fsdp_forward import WRAPPER_KEY, ForwardWrapper, reshard_model, run_in_forward
from .layer_subset import layer_stack


def build_mesh(hybrid: bool = False) -> DeviceMesh:
    """The mesh of all processes that a model is sharded over.

    RegraftError for a hybrid mesh when the machines have different numbers of processes.

    Args:
        hybrid: shard within each machine and replicate the model over the machines (HSDP).
    """
    kind, count = distributed.device().type, distributed.world_size()
    # torchrun sets it. Without, all processes are taken to be on one machine.
    per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    if not hybrid:
        return init_device_mesh(kind, (count,), mesh_dim_names=("shard",))

    if count % per_machine:
        raise RegraftError(
            f"{count} processes are not the same number on every machine ({per_machine} here): "
            "shard over all"
        )
    shape = (count // per_machine, per_machine)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def shard_model(
    model: PreTrainedModel, over: DeviceMesh, layerwise: bool = False
) -> PreTrainedModel:
    """Shard every layer of a model, and the rest as one more unit; parameters become DTensors.

    Args:
        model: the model, which is changed in place.
        over: the mesh, see `build_mesh`.
        layerwise: shard mixers as units of their own, as the stages need that run a mixer without
            the model around it.
    """
    # FSDP2 warns that views must not be changed in place; nothing here does.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")

    # From the inside out: a unit takes the parameters that no unit inside it has.
    for mixer in mixers_by_layer(model).values() if layerwise else ():
        fully_shard(mixer, mesh=over)
        register_fsdp_forward_method(mixer, "matrix")
    for layer in layer_stack(model):
        fully_shard(layer, mesh=over)
    wrapper = ForwardWrapper(model)
    fully_shard(wrapper, mesh=over)

    vars(model)[WRAPPER_KEY] = wrapper
    return model


def shard_over_all(model: PreTrainedModel, layerwise: bool = False) -> PreTrainedModel:
    """Move a model that every process holds to its device, and shard it when there are several."""
    model = model.to(distributed.device())
    if distributed.world_size() == 1:
        return model
    set_fsdp_root(shard_model(model, build_mesh(), layerwise))
    return model


def set_fsdp_root(model: PreTrainedModel) -> None:
    """Make the wrapper of a sharded model the root of all its units.

    FSDP takes the first module that runs a forward pass for the root. A layer must not be it.
    """
    run_in_forward(model, lambda: None)
    reshard_model(model)


def load_sharded(
    checkpoint: Checkpoint, over: DeviceMesh | None, layerwise: bool = False
) -> PreTrainedModel:
    """Load the float32 model of a checkpoint.

    Over a mesh, each process keeps only its shards and reads one tensor after the other, so the
    whole model is never in memory.
    """
    if over is None:
        return modeling.materialize(checkpoint)

    model = modeling.build_meta_model(checkpoint)
    # `to_empty` below overwrites the buffers (rotary tables), which no checkpoint stores.
    buffers = list(iter_buffers(model))
    wrapper = vars(shard_model(model, over, layerwise))[WRAPPER_KEY]
    wrapper.to_empty(device=distributed.device())
    for module, name, value in buffers:
        setattr(module, name, value.to(distributed.device()))

    load_shards(model, checkpoint)
    set_fsdp_root(model)
    return model


@torch.no_grad()
def load_shards(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Fill each parameter's shard from the checkpoint."""
    stored = {checkpoint.names[key]: lazy for key, lazy in checkpoint.tensors.items()}
    named = dict(model.named_parameters())

    def is_stored(name: str, parameter: nn.Parameter) -> bool:
        return name in stored and stored[name].shape == tuple(parameter.shape)

    # Some classes hold tensors that their files store in pieces (fused experts). Then the whole
    # model is built in memory, where transformers joins the pieces.
    whole: Mapping[str, Tensor] = {}
    if not all(is_stored(name, parameter) for name, parameter in named.items()):
        whole = dict(modeling.materialize(checkpoint).named_parameters())

    for name, parameter in named.items():
        value = whole[name] if whole else stored[name].read()
        local_part(parameter).copy_(shard_like(value, parameter))


def local_part(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's shard of `value`, cut as FSDP has cut `like`, which has the same shape."""
    if not isinstance(like, DTensor):
        return value
    coordinate = like.device_mesh.get_coordinate()
    assert coordinate is not None

    for dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            # FSDP cuts as `torch.chunk` does, which may give fewer chunks than processes: the
            # last processes then hold nothing.
            chunks = value.chunk(like.device_mesh.size(dim), placement.dim)
            index = coordinate[dim]
            value = chunks[index] if index < len(chunks) else value.narrow(placement.dim, 0, 0)
    return value


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """A value that every process holds whole, sharded like another tensor of the same shape."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    shard = shard_like(value, like).to(like.device).clone(memory_format=torch.contiguous_format)
    # The shape must be given: from_local assumes that all shards are of equal size.
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, shape=value.shape, stride=value.stride()
    )


def replicate_like(value: Tensor, like: Tensor) -> Tensor:
    """A value on the mesh of another tensor, whole in each process.

    A DTensor whose processes hold partial sums becomes their sum.
    """
    if not isinstance(like, DTensor):
        return value.to(like.device)
    replicated = [Replicate()] * like.device_mesh.ndim
    if isinstance(value, DTensor):
        return value.redistribute(placements=replicated)
    return DTensor.from_local(value.to(like.device), like.device_mesh, replicated)


def gather_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process; all processes must call it."""
    whole = tensor.detach()
    return whole.full_tensor() if isinstance(whole, DTensor) else whole


def gather_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict, on the CPU of the first process; empty in the others.

    All processes must call it.
    """
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        whole = gather_tensor(value)
        if distributed.is_rank0():
            found[name] = whole.cpu()
    return found
