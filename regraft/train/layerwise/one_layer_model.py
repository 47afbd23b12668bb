"""A decoder that holds the weights of one layer at a time; masks, positions and all else are the model's own."""

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
from ...modeling.loading import silence_transformers
from ...modeling.meta import build_meta_model, iter_buffers
from ..hooks import LayerRecord, record_layers
from ..layer_subset import SkippedLayer, layer_stack


class StopForward(Exception):
    """The decoder has run as far as it was asked to."""


class OneLayerModel:
    """A stock decoder on the meta device in float32, in eval mode; `opened` gives one layer its weights.

    Masks, rotary tables and positions are made by the model itself on every call, with all other layers skipped, so
    that no family needs code of its own here. Norms and position tables outside the layers are real, embedding and head
    are not. RegraftError when the checkpoint lacks what a layer needs.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.model: Any = build_meta_model(checkpoint)
        for module, name, value in iter_buffers(self.model):
            setattr(module, name, value.to(device))
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.mapping = get_model_conversion_mapping(self.model)
        self.stack = layer_stack(self.model)
        self.layers = list(self.stack)
        for at in range(len(self.layers)):
            self.stack[at] = SkippedLayer()
        self.at = 0
        self.load_weights(None, lambda role: not role.startswith(("embed", "head")))

    def load_weights(self, layer: int | None, wanted: Callable[[str], bool]) -> None:
        """Read the tensors of a layer, or those outside the layers, whose role is wanted, as float32 copies."""
        checkpoint = self.checkpoint
        values = {
            checkpoint.names[role, at]: lazy.read().to(self.device, torch.float32, copy=True)
            for (role, at), lazy in checkpoint.tensors.items()
            if at == layer and wanted(role)
        }
        config = LoadStateDictConfig(
            weight_mapping=self.mapping, dtype=torch.float32, device_map={"": self.device}
        )
        with silence_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, values, config)
        if info.unexpected_keys or info.conversion_errors:
            name = sorted({*info.unexpected_keys, *info.conversion_errors})[0]
            raise RegraftError(
                f"'{checkpoint.path}' holds '{name}', which its model does not take: stream another model"
            )
        self.model.requires_grad_(False)

    @contextmanager
    def load_layer(self, layer: int, mlp: bool = True) -> Iterator[None]:
        """Inside, this layer has its weights; without `mlp` only what stands before and in its attention."""
        self.at = layer
        self.stack[layer] = self.layers[layer]
        try:
            self.load_weights(layer, lambda role: mlp or not role.startswith("mlp."))
            needed = self.layers[layer] if mlp else self.attention_module()
            if lost := [name for name, parameter in needed.named_parameters() if parameter.is_meta]:
                raise RegraftError(
                    f"'{self.checkpoint.path}' has no '{lost[0]}' for layer {layer}: fetch the model again"
                )
            yield
        finally:
            self.layers[layer].to("meta")
            self.stack[layer] = SkippedLayer()

    def attention_module(self) -> nn.Module:
        """The attention of the opened layer."""
        module: nn.Module = self.model.get_submodule(self.checkpoint.anatomy.slot.format(self.at))
        return module

    @torch.no_grad()
    def embed_batches(
        self, input_ids: Tensor, position_ids: Tensor, batch: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """What the first layer gets, (rows, time, hidden), `batch` rows at a time; only the rows of the embedding that
        occur are in memory."""
        embedding = self.model.get_input_embeddings()
        found, places = torch.unique(input_ids, return_inverse=True)
        rows = (
            self.checkpoint.tensors["embed.weight", None]
            .read()[found.cpu()]
            .to(self.device, torch.float32)
        )
        embedding.weight, embedding.padding_idx = nn.Parameter(rows, requires_grad=False), None
        try:
            for start in range(0, len(input_ids), batch):
                part = slice(start, start + batch)
                given = embedding(places[part].to(self.device))
                yield part, self.run_module(self.stack[0], given, position_ids[part])
        finally:
            embedding.weight = nn.Parameter(embedding.weight.to("meta"), requires_grad=False)

    @torch.no_grad()
    def run_layer(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """What the opened layer makes of its input, both (batch, time, hidden)."""
        layer = self.layers[self.at]
        with replace_layer_input(layer, hidden):
            return self.run_module(layer, hidden, position_ids)

    @torch.no_grad()
    def record_attention(self, hidden: Tensor, position_ids: Tensor) -> LayerRecord:
        """What the opened layer's attention sees and gives when the layer gets `hidden`; nothing behind it runs."""
        kept: list[LayerRecord] = []

        def stop_with_record(layer: int, record: LayerRecord) -> None:
            kept.append(record)
            raise StopForward

        with (
            replace_layer_input(self.layers[self.at], hidden),
            record_layers([self.attention_module()], [0], stop_with_record),
        ):
            self.run_decoder(hidden, position_ids)
        return kept[0]

    def run_module(self, layer: nn.Module, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """The output of one of the stack's modules; nothing behind it runs."""
        kept: list[Tensor] = []

        def stop_with_output(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(output if torch.is_tensor(output) else output[0])
            raise StopForward

        handle = layer.register_forward_hook(stop_with_output)
        try:
            self.run_decoder(hidden, position_ids)
        finally:
            handle.remove()
        return kept[0]

    def run_decoder(self, hidden: Tensor, position_ids: Tensor) -> None:
        """Run the decoder until a hook says that it has reached what was wanted."""
        try:
            self.model.get_decoder()(
                inputs_embeds=hidden.to(self.device),
                position_ids=position_ids.to(self.device),
                use_cache=False,
            )
        except StopForward:
            return
        raise RegraftError(
            f"the decoder of a {type(self.model).__name__} ran past layer {self.at}: it cannot be streamed"
        )


@contextmanager
def replace_layer_input(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Inside, a layer gets `hidden` in place of what comes to it."""

    def replace_input(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    handle = layer.register_forward_pre_hook(replace_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
