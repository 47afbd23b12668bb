"""Numbers of a layer that multiply the whole residual stream, found by trying them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .rotation import first_output
from .shapes import Law, list_tensors
from .tiny_model import TinyModel, run

ONE: Law = {(): 1.0}


def multiplies_stream(
    tiny: TinyModel, modules: Mapping[str, Any], name: str, laws: list[Law | None]
) -> bool:
    """Whether a tensor is one number by which all is multiplied that a layer gives.

    With zero in its place the layer gives zeros.

    Args:
        tiny: says what the model reads.
        modules: of an instance of it by name, itself under "".
        name: of the tensor.
        laws: of its dimensions.
    """
    import torch

    layer = re.match(r"(.*?\.\d+)\.", name)
    if layer is None or any(law != ONE for law in laws):
        return False
    tensor = list_tensors(modules[""]).get(name)
    if tensor is None or layer[1] not in modules:
        return False

    given: list[Any] = []
    handle = modules[layer[1]].register_forward_hook(
        lambda module, inputs, result: given.append(first_output(result))
    )
    before = tensor.detach().clone()
    try:
        with torch.no_grad():
            tensor.zero_()
            run(modules[""], tiny)
    finally:
        handle.remove()
        with torch.no_grad():
            tensor.copy_(before)
    return bool(given) and all(torch.is_tensor(one) and not one.any() for one in given)
