"""A PEFT adapter merged into a model: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732) and DoRA
(arXiv 2402.09353).

A map W, (outputs, inputs), becomes W + s B A with A (rank, inputs), B (outputs, rank) and s = alpha
/ rank, or alpha / sqrt(rank) for rsLoRA. DoRA then scales every row to the length that it stores.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import RegraftError, suggest
from ..io.adapted import WEIGHTS
from ..io.files import check_inside, read_json, sha256
from ..io.foreign_weights import ADAPTER
from ..io.safetensors import TensorEntry, read_header
from .lazy import LazyTensor, Provenance

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

PREFIX = "base_model.model."
PAPER = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
# Endings of an adapter's tensors: what belongs to a map, and to an embedding.
LINEAR = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
# Settings that change what an adapter does in a way that is not merged here.
NOT_MERGED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of a model."""

    # Tensors of the adapter by what they are: A, B, magnitude; or value, which replaces.
    pieces: dict[str, TensorEntry]
    # s; it is unused where a tensor is replaced.
    scale: float = 1.0
    # Whether B A is transposed: the model stores (inputs, outputs), or it is an embedding.
    transposed: bool = False

    def apply(self, weight: Tensor) -> Tensor:
        """The changed tensor, rounded as PEFT's `merge_and_unload` rounds it."""
        if "value" in self.pieces:
            return self.pieces["value"].read().to(weight.dtype)
        # PEFT multiplies in the adapter's dtype, on a processor in float32 for narrow ones.
        first, second = (self.pieces[one].read().float() for one in ("A", "B"))
        change = second @ first
        change = (change.T if self.transposed else change) * self.scale
        if "magnitude" not in self.pieces:
            return weight + change.to(weight.dtype)
        wide = weight.float() + change
        across = 0 if self.transposed else 1
        length = torch.linalg.norm(wide, dim=across).to(weight.dtype)
        factor = self.pieces["magnitude"].read().flatten().float() / length.float()
        return (factor.unsqueeze(across) * wide).to(weight.dtype)


def merge_adapter(model: Checkpoint, folder: Path) -> Checkpoint:
    """A model with an adapter merged into it; nothing is computed before its tensors are read.

    Args:
        model: the base.
        folder: of the adapter.

    RegraftError for an adapter of another kind than LoRA, and for one that changes what the model
    does not have, or not in this shape.
    """
    for name in (ADAPTER, WEIGHTS):
        check_inside(folder, folder / name)
    config = read_json(folder / ADAPTER)
    check_kind(config, folder)
    changes = read_changes(config, folder)
    keys = {name: key for key, name in model.names.items()}
    tensors = dict(model.tensors)
    for name, change in changes.items():
        known = model.anatomy.canonical_name(name)
        if known not in keys:
            near = suggest(known, keys)
            raise RegraftError(
                f"the adapter '{folder}' changes '{name}', which '{model.origin}' does not have: "
                f"{near}give the model that it was trained on"
            )
        tensors[keys[known]] = change_tensor(tensors[keys[known]], change, folder, name)
    step = {
        "step": "MergeAdapter",
        "arguments": {"adapter": folder.name, "sha256": sha256(folder / WEIGHTS)},
        "papers": [PAPER],
    }
    return replace(model, tensors=tensors, history=(*model.history, step), is_computed=True)


def check_kind(config: Mapping[str, Any], folder: Path) -> None:
    """RegraftError for an adapter that is not merged as LoRA is.

    Args:
        config: the content of adapter_config.json.
        folder: of the adapter.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RegraftError(
            f"the adapter '{folder}' is of kind {str(kind)[:40]!r}, which is not merged: merge it "
            "with PEFT's merge_and_unload, then give the merged model"
        )
    if used := [key for key in NOT_MERGED if config.get(key)]:
        raise RegraftError(
            f"the adapter '{folder}' has {used[0]} {config[used[0]]!r:.40}, which is not merged: "
            "merge it with PEFT's merge_and_unload, then give the merged model"
        )


def read_changes(config: Mapping[str, Any], folder: Path) -> dict[str, Change]:
    """What an adapter does, by the names of the base's tensors.

    Args:
        config: the content of adapter_config.json.
        folder: of the adapter.

    RegraftError when a tensor of it is of an unknown kind or lacks the other one.
    """
    stored = {one.name.removeprefix(PREFIX): one for one in read_header(folder / WEIGHTS)}
    changes: dict[str, Change] = {}
    for endings, transposed in ((LINEAR, bool(config.get("fan_in_fan_out"))), (EMBEDDING, True)):
        for module in [
            name.removesuffix(endings[0]) for name in stored if name.endswith(endings[0])
        ]:
            pieces = {
                role: stored.pop(module + ending)
                for role, ending in zip(("A", "B", "magnitude"), endings, strict=False)
                if module + ending in stored
            }
            if "B" not in pieces:
                raise RegraftError(
                    f"the adapter '{folder}' has '{pieces['A'].name}' and no '{endings[1]}' beside "
                    "it: save it again"
                )
            scale = find_scale(config, module, pieces["A"].shape[0])
            changes[f"{module}.weight"] = Change(pieces, scale, transposed)
    if lost := [name for name in stored if ".lora_" in name]:
        raise RegraftError(
            f"the adapter '{folder}' has '{lost[0]}', which is not merged: merge it with PEFT's "
            "merge_and_unload, then give the merged model"
        )
    # Whole tensors: `modules_to_save`, and biases that were trained.
    whole = {
        name.replace(".base_layer.", "."): Change({"value": one}) for name, one in stored.items()
    }
    return changes | whole


def find_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """s of a map.

    Args:
        config: the content of adapter_config.json.
        module: the map's name.
        rank: rows of its A.
    """
    alpha = float(config.get("lora_alpha") or 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = float(value)
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def change_tensor(lazy: LazyTensor, change: Change, folder: Path, name: str) -> LazyTensor:
    """A tensor as the adapter changes it; RegraftError when the shapes do not fit.

    Args:
        lazy: of the base.
        change: what the adapter does.
        folder: of the adapter.
        name: of the tensor.
    """
    shapes = {role: one.shape for role, one in change.pieces.items()}
    made = shapes.get("value")
    if made is None:
        made = (shapes["B"][0], shapes["A"][1])
        made = made[::-1] if change.transposed else made
    if made != lazy.shape:
        raise RegraftError(
            f"the adapter '{folder}' changes '{name}' of shape {list(made)}, the model has "
            f"{list(lazy.shape)}: give the model that it was trained on"
        )
    read: Callable[[], Tensor] = lazy.read
    origin = lazy.provenance
    provenance = Provenance(origin.kind, origin.sources, f"with the adapter '{folder.name}'")
    return replace(lazy, read=lambda: change.apply(read()), provenance=provenance)
