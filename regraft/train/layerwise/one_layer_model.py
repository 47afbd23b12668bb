"""A decoder with the weights of one layer at a time; masks and positions are the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ...core.checkpoint import Checkpoint
from ...errors import RegraftError
from ...modeling.meta import build_meta_model, iter_buffers, silence_transformers
from ...modeling.text_part import run_text_part
from ..hooks import LayerRecord, record_layers
from ..layer_subset import SkippedLayer, layer_stack


class StopForward(Exception):
    """Ends a forward pass at a hook, with the value that was wanted from it.

    PyTorch has no other way to leave a forward pass early. Running it to its end is not possible:
    what comes after the wanted module may have no weights (see `OneLayerModel.load_layer`).
    """

    def __init__(self, value: Any):
        super().__init__()
        self.value = value


class OneLayerModel:
    """A stock decoder on the meta device, in float32 and eval mode, one of whose layers is real.

    On every call the model itself makes masks, rotary tables and positions, while all layers but
    one are skipped. So no model family needs code of its own here. Norms and position tables
    outside the layers are real too; embedding and head are not.

    RegraftError when the checkpoint lacks what a layer needs.

    Attributes:
        model: the transformers model; its layer stack holds `SkippedLayer`s.
        checkpoint: gives the weights.
        device: where the real layer is.
        mapping: how transformers converts the checkpoint's tensors to the model's.
        stack: the model's layer stack.
        layers: its original layers.
        at: number of the layer that has weights.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.model: Any = build_meta_model(checkpoint)
        for module, name, value in iter_buffers(self.model):
            setattr(module, name, value.to(device))
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.mapping = get_model_conversion_mapping(self.model)

        self.stack = layer_stack(self.model)
        self.layers = list(self.stack)
        for number in range(len(self.layers)):
            self.stack[number] = SkippedLayer()
        self.at = 0
        # What stands beside a language model is not run.
        left_out = ("embed", "head", "carried.")
        self.load_weights(None, lambda role: not role.startswith(left_out))

    def load_weights(self, layer: int | None, wanted: Callable[[str], bool]) -> None:
        """Read tensors of the checkpoint into the model, as float32 copies.

        Args:
            layer: the layer they belong to; None for those outside the layers.
            wanted: whether to read the tensor with a role such as `attn.q.weight`.
        """
        checkpoint = self.checkpoint
        values = {
            checkpoint.names[role, at]: lazy.read().to(self.device, torch.float32, copy=True)
            for (role, at), lazy in checkpoint.tensors.items()
            if at == layer and wanted(role)
        }

        # transformers renames and joins tensors as it does for a whole model.
        config = LoadStateDictConfig(
            weight_mapping=self.mapping, dtype=torch.float32, device_map={"": self.device}
        )
        with silence_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, values, config)
        if info.unexpected_keys or info.conversion_errors:
            name = sorted({*info.unexpected_keys, *info.conversion_errors})[0]
            raise RegraftError(
                f"'{checkpoint.path}' holds '{name}', which its model does not take: "
                "stream another model"
            )
        self.model.requires_grad_(False)

    @contextmanager
    def load_layer(self, layer: int, mlp: bool = True) -> Iterator[None]:
        """Inside, this layer has its weights.

        Args:
            layer: number of the layer.
            mlp: False to leave out the MLP, for `record_attention`, which does not run it.
        """
        self.at = layer
        self.stack[layer] = self.layers[layer]

        try:
            self.load_weights(layer, lambda role: mlp or not role.startswith("mlp."))
            needed = self.layers[layer] if mlp else self.attention_module()
            missing = [name for name, weight in needed.named_parameters() if weight.is_meta]
            if missing:
                raise RegraftError(
                    f"'{self.checkpoint.path}' has no '{missing[0]}' for layer {layer}: "
                    "fetch the model again"
                )
            yield
        finally:
            # Also after an error: there are never two layers in memory.
            self.layers[layer].to("meta")
            self.stack[layer] = SkippedLayer()

    def attention_module(self) -> nn.Module:
        """The attention of the layer that has weights."""
        module: nn.Module = self.model.get_submodule(self.checkpoint.anatomy.slot.format(self.at))
        return module

    @torch.no_grad()
    def embed_batches(
        self, input_ids: Tensor, position_ids: Tensor, batch: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """The first layer's input, `batch` rows at a time.

        Args:
            input_ids: (rows, time).
            position_ids: (rows, time).
            batch: rows that are embedded at a time.

        Yields:
            (which rows, their hidden states (batch, time, hidden)).
        """
        # Only the embedding's rows that occur are in memory. Tokens are numbered by them.
        embedding = self.model.get_input_embeddings()
        tokens, numbers = torch.unique(input_ids, return_inverse=True)
        table = self.checkpoint.tensors["embed.weight", None].read()[tokens.cpu()]
        table = table.to(self.device, torch.float32)
        # A padding index would point outside the shorter table.
        embedding.weight, embedding.padding_idx = nn.Parameter(table, requires_grad=False), None

        try:
            for start in range(0, len(input_ids), batch):
                part = slice(start, start + batch)
                hidden = embedding(numbers[part].to(self.device))
                # What the decoder does before its layers (learned positions, scales, norms).
                yield part, self.run_module(self.stack[0], hidden, position_ids[part])
        finally:
            embedding.weight = nn.Parameter(embedding.weight.to("meta"), requires_grad=False)

    @torch.no_grad()
    def run_layer(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """The output of the layer that has weights; `hidden` and output (batch, time, hidden)."""
        layer = self.layers[self.at]
        with replace_layer_input(layer, hidden):
            return self.run_module(layer, hidden, position_ids)

    @torch.no_grad()
    def record_attention(self, hidden: Tensor, position_ids: Tensor) -> LayerRecord:
        """Inputs and outputs of the attention when its layer gets `hidden` (batch, time, hidden).

        Nothing after the attention runs.
        """

        def stop(layer: int, record: LayerRecord) -> None:
            raise StopForward(record)

        with (
            replace_layer_input(self.layers[self.at], hidden),
            record_layers([self.attention_module()], [0], stop),
        ):
            record: LayerRecord = self.run_decoder(hidden, position_ids)
        return record

    def run_module(self, module: nn.Module, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """The output of one module of the stack; nothing after it runs."""

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise StopForward(output if torch.is_tensor(output) else output[0])

        handle = module.register_forward_hook(stop)
        try:
            output: Tensor = self.run_decoder(hidden, position_ids)
        finally:
            handle.remove()
        return output

    def run_decoder(self, hidden: Tensor, position_ids: Tensor) -> Any:
        """Run the decoder until a hook raises `StopForward`; returns that one's value.

        `hidden` stands for the embeddings. For a later layer only its shape counts: masks and
        positions are made for it, and `replace_layer_input` gives the layer its real input.
        """
        try:
            run_text_part(
                self.model,
                position_ids.to(self.device),
                inputs_embeds=hidden.to(self.device),
            )
        except StopForward as stop:
            return stop.value
        raise RegraftError(
            f"the decoder of a {type(self.model).__name__} ran past layer {self.at}: "
            "it cannot be streamed"
        )


@contextmanager
def replace_layer_input(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, a layer gets `hidden` in place of its input."""

    def replace_input(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        # Decoders pass the hidden states by position or by name.
        if args:
            return (hidden, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden}

    handle = layer.register_forward_pre_hook(replace_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
