"""A model for decoding whose linear layers have int8 weights."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn
from transformers import PreTrainedModel
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
    """Store the weights of a model's linear layers as int8, in place; the head's stay as they are.

    Args:
        model: in float32, for decoding. transformers refuses to save or train it afterwards.

    Raises RegraftError for a model that is not on a processor.
    """
    if model.device.type != "cpu":
        raise RegraftError(
            f"int8 weights are for decoding on a processor, the model is on {model.device.type}: "
            "use --dtype bfloat16"
        )
    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            # Layers of other classes, adapters among them, compute more than this product.
            if type(layer) is nn.Linear and layer is not head:
                setattr(parent, name, Int8Linear.of(layer))
    model.hf_quantizer = Int8Quantizer()
