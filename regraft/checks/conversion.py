"""Whether a converted layer's window computes what the stock attention in its place does."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..mixers.registry import mixer_class
from ..mixers.source_windows import source_windows
from ..modeling.layer_kinds import mixers_of
from ..modeling.mixer_slot import RowLayout
from ..train.hooks import LayerRecord, record_layers

BOUND = 1e-5  # largest difference in float32 that rounding makes, relative to the largest output


class WindowDifference(TypedDict):
    """How far windows are from the stock attention, where windows see all that it sees."""

    # Of the layer that differs most, relative to its largest output; None: no layer has a window.
    window_vs_stock: float | None
    window_vs_stock_layer: int | None


NO_WINDOW: WindowDifference = {"window_vs_stock": None, "window_vs_stock_layer": None}


def compare_windows(
    before: Checkpoint, after: Checkpoint, model: PreTrainedModel, tokens: Tensor
) -> WindowDifference:
    """The windows of a linearized model against the attention modules of its source.

    Both get what the stock attention gets in the source's own forward pass: hidden states and
    rotary tables. Weights must be as they were converted, not trained.

    Args:
        before: the source, a stock decoder.
        after: the linearized model.
        model: the same, loaded in float32.
        tokens: (batch, time) of the pass.
    """
    lengths = comparable_lengths(before, after, tokens.shape[1])
    if not lengths:
        return NO_WINDOW

    records = record_attention(modeling.load_stored(before), before, list(lengths), tokens)
    slots = modeling.slots(model)
    worst = NO_WINDOW
    with torch.no_grad(), modeling.force_branch(model, "window"):
        for layer, length in lengths.items():
            # Attention is causal: its first outputs are those of a row that ends there.
            record = cut_record(records[layer], length)
            given, _ = slots[layer](
                record.inputs, position_embeddings=record.rotary, rows=RowLayout()
            )
            scale = record.outputs.abs().max()
            difference = float((given - record.outputs).abs().max() / scale)
            # `not <=`, so that NaN counts as the largest.
            if worst["window_vs_stock"] is None or not difference <= worst["window_vs_stock"]:
                worst = {"window_vs_stock": difference, "window_vs_stock_layer": layer}
    return worst


def comparable_lengths(before: Checkpoint, after: Checkpoint, time: int) -> dict[int, int]:
    """By converted layer, the first tokens of a row on which it must give what the source gives.

    Args:
        before: the source.
        after: the linearized model.
        time: tokens of the row.
    """
    lengths = {}
    windows = source_windows(before.anatomy.host_config(before.config), states=True)
    for layer, spec in enumerate(mixers_of(after)):
        exact = mixer_class(spec["name"]).softmax_tokens(spec) if spec else 0
        if spec and exact:
            # Beyond its window, a layer gives the same where the source has the same window.
            alone = spec["window"] if spec["name"] == "gated" else spec
            is_same = alone.get("sinks") == 0 and windows[layer] == exact
            lengths[layer] = time if is_same else min(exact, time)
    return lengths


def record_attention(
    stock: PreTrainedModel, checkpoint: Checkpoint, layers: list[int], tokens: Tensor
) -> dict[int, LayerRecord]:
    """What the attention modules of a stock model get and give in its forward pass, by layer."""
    records: dict[int, LayerRecord] = {}
    slots = modeling.slots(stock, checkpoint)
    with torch.no_grad(), record_layers(slots, layers, records.__setitem__):
        stock(input_ids=tokens, use_cache=False)
    return records


def cut_record(record: LayerRecord, length: int) -> LayerRecord:
    """The first `length` tokens of a record."""
    rotary = None
    if record.rotary is not None:
        cos, sin = record.rotary
        rotary = (cos[:, :length], sin[:, :length])
    return LayerRecord(record.inputs[:, :length], record.outputs[:, :length], rotary)
