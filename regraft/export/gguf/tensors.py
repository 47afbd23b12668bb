"""A stock model's tensors as llama.cpp stores them: names, order of rows, folded factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ...core.checkpoint import Checkpoint
from ...core.part import Part
from ...core.stock_config import read_stock_config
from ...errors import RegraftError
from .architecture import GGUFArchitecture
from .rotary import compute_frequency_factors

TABLES = ("embed.", "pos.")  # stored row by row as they are
ROTATED = ("attn.q.", "attn.k.")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file: its name, its shape in PyTorch's order, and what reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def build_tensors(checkpoint: Checkpoint, architecture: GGUFArchitecture) -> list[GGUFTensor]:
    """Every tensor of a stock model for an architecture of llama.cpp.

    RegraftError for a tensor that gguf's table has no name for.
    """
    made = [
        GGUFTensor(
            name,
            shape_of(checkpoint, architecture, role, layer),
            dtype_of(checkpoint, role, layer),
            read,
        )
        for role, layer, name, read in iter_parts(checkpoint, architecture)
    ]
    if architecture.own_head:
        made = copy_head(made)
    return [*made, *add_zero_biases(made, checkpoint, architecture), *add_factors(checkpoint)]


def iter_parts(
    checkpoint: Checkpoint, architecture: GGUFArchitecture
) -> Iterator[tuple[str, int | None, str, Callable[[], Tensor]]]:
    """(role, layer, name in the file, what reads it) of a model's parts: experts are one tensor,
    packed maps that the architecture has apart are several.
    """
    anatomy, config = checkpoint.anatomy, checkpoint.config
    full = anatomy.fill_defaults(config)
    names = name_finder(checkpoint, architecture)
    for role, part in anatomy.parts.items():
        base, _, kind = role.rpartition(".")
        if not part.is_present(full) or is_left_out(role, architecture):
            continue
        apart = base in architecture.split.split()
        roles = [f"{name}.{kind}" for name in part.fused] if apart else [role]
        for layer in range(checkpoint.layers) if "{}" in part.name else (None,):
            if part.is_in_layer(full, layer):
                for one in roles:
                    name = names(one, part, layer)
                    yield one, layer, name, reader(checkpoint, architecture, one, layer)


def is_left_out(role: str, architecture: GGUFArchitecture) -> bool:
    """Whether a part is a bias that the architecture does not have."""
    base, _, kind = role.rpartition(".")
    return kind == "bias" and base in architecture.zero.split()


def check_left_out(checkpoint: Checkpoint, architecture: GGUFArchitecture) -> None:
    """RegraftError for a bias that the architecture does not have and that is not zero."""
    for key, lazy in checkpoint.tensors.items():
        if is_left_out(key[0], architecture) and lazy.read().any():
            raise RegraftError(
                f"'{checkpoint.names[key]}' of '{checkpoint.origin}' is not zero and llama.cpp's"
                f" {architecture.name} has no such bias: export it with --to hf or another target"
            )


def name_finder(
    checkpoint: Checkpoint, architecture: GGUFArchitecture
) -> Callable[[str, Part, int | None], str]:
    """Gives a part's name in the file, by gguf's own table."""
    import gguf

    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.names], checkpoint.layers)

    def find(role: str, part: Part, layer: int | None) -> str:
        if role in architecture.renamed:
            return architecture.renamed[role].format(layer)
        merged = part.name.replace(".{e}.", ".")
        name = merged.format(layer, p=checkpoint.anatomy.prefix(checkpoint.config))
        found = table.get_name(checkpoint.anatomy.name_in_file(name), (".weight", ".bias"))
        if found is None:
            raise RegraftError(
                f"gguf's table for {architecture.names} has no name for '{name}': report this"
            )
        return str(found)

    return find


def shape_of(
    checkpoint: Checkpoint, architecture: GGUFArchitecture, role: str, layer: int | None
) -> tuple[int, ...]:
    """The shape as the file has it: outputs first, experts before them."""
    if "{e}" in role:
        return (checkpoint.sizes["expert"], *checkpoint[role.format(e=0), layer].shape)
    shape = model_shape(checkpoint, role, layer)
    return tuple(
        architecture.store(role, torch.empty(shape, device="meta"), checkpoint.sizes).shape
    )


def model_shape(checkpoint: Checkpoint, role: str, layer: int | None) -> tuple[int, ...]:
    """The shape in the model, outputs first."""
    if role not in checkpoint.anatomy.parts:
        return checkpoint[role, layer].shape
    lazy = checkpoint.tensors[role, layer]
    turned = checkpoint.anatomy.parts[role].axes.kind == "map" and not role.startswith(TABLES)
    stored = checkpoint.anatomy.parts[role].stored
    return lazy.shape[::-1] if turned and stored == "in out" else lazy.shape


def dtype_of(checkpoint: Checkpoint, role: str, layer: int | None) -> torch.dtype:
    """The dtype that a part is stored in."""
    key = role.format(e=0), layer
    return (checkpoint.tensors.get(key) or checkpoint[key]).dtype


def reader(
    checkpoint: Checkpoint, architecture: GGUFArchitecture, role: str, layer: int | None
) -> Callable[[], Tensor]:
    """Reads a part, its maps one below the other."""
    part = checkpoint.part(role)
    assert part is not None
    packed = part.fused if role in checkpoint.anatomy.parts else ()
    base, _, kind = role.rpartition(".")
    if base in architecture.packed.split():
        packed = ()

    def one(name: str) -> Tensor:
        value = checkpoint[name, layer].read()
        if part.signature.startswith("1+gain"):
            value = value.float() + 1  # stored minus one
        return adapt(checkpoint, architecture, name, layer, value)

    def read() -> Tensor:
        if "{e}" in role:
            experts = range(checkpoint.sizes["expert"])
            return torch.stack([one(role.format(e=expert)) for expert in experts])
        if packed:
            return torch.cat([one(f"{name}.{kind}") for name in packed])
        if role.startswith(TABLES):
            return checkpoint.tensors[role, layer].read()
        return one(role)

    return lambda: architecture.store(role, read(), checkpoint.sizes)


def adapt(
    checkpoint: Checkpoint,
    architecture: GGUFArchitecture,
    role: str,
    layer: int | None,
    value: Tensor,
) -> Tensor:
    """A map or norm as the architecture computes with it.

    Rows of queries and keys are in the order of its rotation; a factor on the scores that it does
    not have goes into the queries.
    """
    dim = checkpoint.sizes["dim"]
    if role.startswith(ROTATED) and architecture.interleaved:
        halves = value.view(-1, 2, dim // 2, *value.shape[1:])
        value = halves.transpose(1, 2).reshape(value.shape)
    normed = any(one == "attn.q_norm.weight" for one, _ in checkpoint.tensors)
    if role.startswith("attn.q_norm." if normed else "attn.q.") and layer is not None:
        factor = find_factor(checkpoint, architecture, layer)
        value = value if factor == 1 else (value.float() * factor).to(value.dtype)
    return value


def find_factor(checkpoint: Checkpoint, architecture: GGUFArchitecture, layer: int) -> float:
    """The model's factor on the scores by the one that the architecture has."""
    anatomy, config = checkpoint.anatomy, checkpoint.config
    wanted = float(anatomy.attention(config, layer)["scale"])
    if architecture.scale is None:
        own = checkpoint.sizes["dim"] ** -0.5
    else:
        own = architecture.scale(read_stock_config(config, anatomy))
    return 1.0 if abs(wanted - own) <= 1e-7 * abs(own) else wanted / own


def add_zero_biases(
    made: list[GGUFTensor], checkpoint: Checkpoint, architecture: GGUFArchitecture
) -> Iterator[GGUFTensor]:
    """Biases that the architecture must have and the model does not."""
    there = {tensor.name for tensor in made}
    names = name_finder(checkpoint, architecture)
    full = checkpoint.anatomy.fill_defaults(checkpoint.config)
    for role in architecture.needed.split():
        part = checkpoint.anatomy.parts[f"{role}.weight"]
        for layer in range(checkpoint.layers):
            if not part.is_in_layer(full, layer):
                continue
            name = names(f"{role}.weight", part, layer).removesuffix("weight") + "bias"
            if name not in there:
                shape = model_shape(checkpoint, f"{role}.weight", layer)[:1]
                yield GGUFTensor(name, shape, torch.float32, partial(torch.zeros, shape))


def add_factors(checkpoint: Checkpoint) -> Iterator[GGUFTensor]:
    """Factors of rotary frequencies."""
    factors = compute_frequency_factors(read_stock_config(checkpoint.config, checkpoint.anatomy))
    if factors is not None:
        yield GGUFTensor("rope_freqs.weight", tuple(factors.shape), torch.float32, lambda: factors)


def copy_head(made: list[GGUFTensor]) -> list[GGUFTensor]:
    """The tensors with the embedding as the head too, where there is no head."""
    if any(tensor.name == "output.weight" for tensor in made):
        return made
    embed = next(tensor for tensor in made if tensor.name == "token_embd.weight")
    return [*made, replace(embed, name="output.weight")]
