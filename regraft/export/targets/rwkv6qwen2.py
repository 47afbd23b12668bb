"""GGUF files for llama.cpp's rwkv6qwen2: Llama-shaped, every layer RWKV-6 in RADLADS' form.

No class of transformers computes this architecture, so the result is GGUF files alone, which
`--check-engine` compares with regraft's own model.
"""

from __future__ import annotations

from typing import Any

from ...core.anatomy import Config, find_anatomy
from ...core.checkpoint import Checkpoint
from ...mixers.attention import Attention
from ...mixers.rwkv6 import Rwkv6
from ..conversion import find_unread_keys, has_mlp_biases, mixers_of, name_mixer
from ..gguf.architectures.rwkv6qwen2 import architecture, attention_of
from ..gguf.model import GGUFModel
from ..llama_shape import find_differences
from ..target import ExportTarget

FLAG = "linearize with --for rwkv6qwen2"
# RADLADS' RWKV-6 with token shift and without rotary positions.
OPTIONS = {
    "rotary": False,
    "norm": "none",
    "gate": "sigmoid",
    "bonus": False,
    "balance": True,
    "grouped": True,
}


def find_misfits(config: Config) -> list[str]:
    """What the architecture cannot hold; nothing when it holds the model."""
    anatomy = find_anatomy(config)
    host, host_config = anatomy.host(config), anatomy.host_config(config)
    if found := find_differences(host_config, host):
        return found
    if has_mlp_biases(config):
        return ["its MLP has biases (mlp_bias), which the architecture has not"]
    return find_layer_misfits(config) + find_unread_keys(host_config)


def find_layer_misfits(config: Config) -> list[str]:
    """The first layer that is not RWKV-6 in the architecture's form."""
    specs = mixers_of(config)
    for layer, spec in enumerate(specs):
        if spec is None:
            return [f"layer {layer} has softmax attention, here all are linear: {FLAG} --keep none"]
        if spec["name"] != Rwkv6.name:
            return [f"layer {layer} has the mixer {name_mixer(spec)}: {FLAG}"]
        options = Rwkv6.parse(spec)
        found = find_option_misfits(options) + find_shape_misfits(attention_of(config, layer))
        if found:
            return [f"layer {layer}: {one}" for one in found]
    if len({Rwkv6.parse(spec).grouped for spec in specs if spec}) > 1:
        return ["some layers are grouped and some are not, the architecture has one number of keys"]
    return []


def find_option_misfits(options: Any) -> list[str]:
    """Options of the mixer that the architecture does not compute, in a line."""
    found = []
    if options.rotary:
        found.append("queries and keys are rotated (rotary), here nothing is")
    if options.norm != "none":
        found.append(f"its outputs have a norm ({options.norm}), here they have none")
    if options.gate == "silu":
        found.append("its gate is silu, here it is sigmoid or none")
    if options.bonus:
        found.append("it has a bonus, with which the engine asks for a norm too")
    if not options.balance and options.decay == "dynamic":
        found.append(
            "keys are not multiplied by one minus decay (balance), which can be taken out again"
            " only of a static decay"
        )
    return [f"{', '.join(found)}: {FLAG}"] if found else []


def find_shape_misfits(attention: Attention) -> list[str]:
    """What of the source's attention the architecture does not have."""
    found, inner = [], attention.heads * attention.dim
    if attention.o_bias:
        found.append("its o_proj has a bias (attention_bias), which the architecture has not")
    if attention.qk_norm is not None:
        found.append("it has norms of queries and keys, which the architecture has not")
    if inner != attention.hidden:
        found.append(
            f"its heads are {inner} wide together and hidden_size is {attention.hidden}, in"
            " llama.cpp they are equal: grow --hidden or --heads first"
        )
    return found


def prepare(checkpoint: Checkpoint) -> GGUFModel:
    """The model ready to be written; RegraftError as of `GGUFModel.of`."""
    return GGUFModel.of(checkpoint, architecture)


target = ExportTarget(
    name="rwkv6qwen2",
    loads="llama.cpp, such as llama-server -m OUT/FILE.gguf",
    find_misfits=find_misfits,
    convert=lambda checkpoint: checkpoint,
    remix={"mixer": "rwkv6", "window": 0, "keep": "none", "options": OPTIONS},
    prepare=prepare,
    method="aligned",
)
