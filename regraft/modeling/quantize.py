"""A model for decoding whose linear layers have int8 weights."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from ..errors import RegraftError
from ..mixers.int8 import Int8Linear


class Int8Quantizer(HfQuantizer):
    """What transformers asks about such a model: it is neither saved nor trained."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(quant_method="regraft's int8 for decoding"))

    def is_serializable(self) -> bool:
        """No: the files hold the model as it was."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No."""
        return False


def quantize_linears(model: PreTrainedModel) -> None:
    """Store the weights of a model's linear layers as int8, in place.

    The head's stay as they are, and so do those of experts that lie in one tensor.

    Args:
        model: in float32, for decoding. transformers refuses to save or train it afterwards.

    Raises RegraftError for a model that is not on a processor or has no such layers.
    """
    if model.device.type != "cpu":
        raise RegraftError(
            f"int8 weights are for decoding on a processor, the model is on {model.device.type}: "
            "use --dtype bfloat16"
        )
    head, changed = model.get_output_embeddings(), 0
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Layers of other classes, adapters among them, compute more than this product.
            if type(layer) in (nn.Linear, Conv1D) and layer is not head:
                setattr(parent, name, Int8Linear.of(layer))
                changed += 1
    if not changed:
        raise RegraftError(
            f"a {type(model).__name__} has no linear layer beside its head to store as int8: use "
            "--dtype bfloat16"
        )
    model.hf_quantizer = Int8Quantizer()
