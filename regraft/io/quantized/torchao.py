"""torchao: int8 and float8 in plain layout, as transformers writes them to safetensors.

A weight `X.weight` is stored as `X._weight_qdata`, `X._weight_scale` and perhaps
`X._weight_zero_point` (torchao's `Int8Tensor`, `IntxUnpackedToInt8Tensor` and `Float8Tensor`). A
block of rows and columns shares a scale, and the weight is (number - zero) * scale. Other layouts,
such as integers packed for the kernels of one device, are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ...errors import RegraftError
from .entry import Found, find_block, spread_scale

# Configs whose weights are in plain layout, and those that only hold others.
CONFIGS = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Int8StaticActivationInt8WeightConfig",
    "Int8DynamicActivationIntxWeightConfig",
    "IntxWeightOnlyConfig",
    "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "Float8StaticActivationFloat8WeightConfig",
)
HOLDERS = ("FqnToConfig", "ModuleFqnToConfig", "Float8MMConfig")
DTYPES = ("I8", "F8_E4M3", "F8_E5M2")
REMEDY = "take the model that it was made from"


def claim(found: Found) -> None:
    """Claim weights with their scales; RegraftError for a layout that is not read."""
    for config in list_configs(found.config.get("quant_type")):
        if config not in CONFIGS + HOLDERS:
            raise RegraftError(
                f"quantization_config has torchao's '{config[:60]}', which is not read (read are "
                f"{', '.join(CONFIGS)}): {REMEDY}"
            )
    for stored in found.names("_qdata"):
        claim_weight(found, stored)
    found.drop(
        ("_act_quant_scale", "_act_quant_zero_point"),
        "scale of activations, which are not quantised here",
    )


def list_configs(quant_type: Any) -> Iterator[str]:
    """Names of torchao's configs in the JSON of one, outermost first."""
    if isinstance(quant_type, str):  # older models
        yield quant_type
    elif isinstance(quant_type, Mapping):
        name = quant_type.get("_type")
        if isinstance(name, str) and name.endswith("Config"):
            yield name
        for value in quant_type.values():
            if isinstance(value, Mapping):
                yield from list_configs(value)


def claim_weight(found: Found, stored: str) -> None:
    """Claim one weight.

    Args:
        found: what the files hold.
        stored: what the names of its pieces begin with, such as "model.norm._weight".
    """
    module, _, parameter = stored.rpartition("._")
    numbers = found.entries[f"{stored}_qdata"]
    if numbers.dtype not in DTYPES:
        raise RegraftError(
            f"'{numbers.name}' is {numbers.dtype}, a packed layout which is not read: {REMEDY}"
        )
    if f"{stored}_act_pre_scale" in found.entries:
        raise RegraftError(
            f"'{stored}_act_pre_scale' scales activations, which is not read: {REMEDY}"
        )
    scale = found.require(f"{stored}_scale", numbers.name)
    block = find_block(scale.shape, numbers.shape)
    pieces = {one: f"{stored}_{one}" for one in ("qdata", "scale", "zero_point")}
    found.add(f"{module}.{parameter}", numbers.shape, pieces, partial(compute, block=block))


def compute(stored: Mapping[str, Tensor], block: tuple[int, int]) -> Tensor:
    """A weight, in float32.

    Args:
        stored: `qdata`, `scale` and perhaps `zero_point`.
        block: rows and columns that share a scale.
    """
    weight = stored["qdata"].float()
    shape = tuple(weight.shape)
    if "zero_point" in stored:
        weight -= spread_scale(stored["zero_point"].float(), shape, block)
    return weight * spread_scale(stored["scale"].float(), shape, block)
