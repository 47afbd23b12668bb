"""What a model architecture of llama.cpp holds, and how the one for a stock class is found.

The facts come from llama.cpp's loader of each architecture (src/models in its source, as in
llama-cpp-python 0.3.36), which refuses files with tensors it does not read.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...core.anatomy import Config
    from ...core.checkpoint import Checkpoint
    from .tensors import GGUFTensor

from torch import Tensor

ENGINE = "0.3.36"  # release of llama-cpp-python that results are compared with


@dataclass(frozen=True)
class GGUFArchitecture:
    """An architecture of llama.cpp, for stock classes that compute the same, or for a target.

    Attributes:
        name: as in the file's `general.architecture`.
        families: the model types that it holds.
        names: member of `gguf.MODEL_ARCH` whose table names the tensors.
        activations: names that transformers has for what it computes in the MLP.
        biases: roles of maps that may have a bias, separated by spaces.
        needed: those of them that must have one; zeros are written where a model has none.
        zero: those of them that it does not have, and that are left out where they are zero.
        split: roles of packed tensors whose maps it has apart.
        packed: those of them that it reads row by row as the class does; of others the maps are
            one below the other.
        reads: config keys, beyond those of sizes and norms, whose values the file holds.
        ropes: the `rope_type`s that it computes.
        interleaved: whether it rotates neighbours, not a head's first half with the second.
        partial: whether it can rotate a part of a head.
        square: whether heads times head_dim must be hidden_size.
        windows: whether layers may slide, all by one width.
        hybrid: whether some layers have a state in the place of softmax attention.
        own_head: whether the head is stored where it is tied to the embedding.
        tied: whether the head must be the embedding.
        renamed: role -> name in the file, where gguf's table has none.
        scale: config of transformers -> factor that it puts on the scores; None: dim^-0.5.
        store: (role, tensor, sizes) -> the tensor as the file has it.
        keys: config of transformers -> further metadata, without the architecture's prefix.
        find_misfits: config of transformers -> what else does not fit, a line each.
        find_notes: config of transformers -> what it computes a little differently, a line each.
        find_metadata: config of regraft -> all metadata, where no class of transformers computes
            the same; None: a stock class's.
        build_tensors: the same for tensors.
    """

    name: str
    families: tuple[str, ...]
    names: str
    activations: tuple[str, ...] = ("silu", "swish")
    biases: str = ""
    needed: str = ""
    zero: str = ""
    split: str = ""
    packed: str = ""
    reads: tuple[str, ...] = ()
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    interleaved: bool = False
    partial: bool = False
    square: bool = False
    windows: bool = False
    hybrid: bool = False
    own_head: bool = False
    tied: bool = False
    renamed: dict[str, str] = field(default_factory=dict)
    scale: Callable[[Any], float] | None = None
    store: Callable[[str, Tensor, Mapping[str, int]], Tensor] = lambda role, value, sizes: value
    keys: Callable[[Any], dict[str, Any]] = lambda stock: {}
    find_misfits: Callable[[Any], list[str]] = lambda stock: []
    find_notes: Callable[[Any], list[str]] = lambda stock: []
    find_metadata: Callable[[Config], dict[str, Any]] | None = None
    build_tensors: Callable[[Checkpoint], list[GGUFTensor]] | None = None


# llama.cpp has one GELU, the tanh approximation in half precision, for all that go by the name.
GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu")


def list_architectures() -> list[GGUFArchitecture]:
    """Every architecture: the files of `export/gguf/architectures`."""
    package = importlib.import_module("regraft.export.gguf.architectures")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}").architecture for name in names]


def find_architecture(family: str) -> GGUFArchitecture | None:
    """The architecture that holds a model type; None when llama.cpp has none."""
    found = [one for one in list_architectures() if family in one.families]
    return found[0] if found else None
