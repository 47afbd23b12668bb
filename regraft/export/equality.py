"""Whether an exported model is the same in plain transformers: logits and greedy text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..mixers.source_windows import source_windows
from ..modeling.loading import random_inputs
from ..modeling.meta import silence_transformers

BOUND = 1e-4  # of the largest logit, in float32
BEYOND, SHORTEST = 32, 64  # tokens beyond the widest window, and of a row at least
NEW_TOKENS = 16


class Equality(TypedDict):
    """What was compared, and how far apart it was."""

    tokens: int  # of the row
    difference: float  # of the logits, as a share of the largest
    greedy_gap: float  # how far below the best token of regraft's model the stock class's ones are
    loaded: str  # the class that transformers took


@torch.no_grad()
def compare_exported(
    model: PreTrainedModel, checkpoint: Checkpoint, folder: Path, code: bool
) -> Equality:
    """Compare a written model, as transformers loads it, with the one it was made of.

    Args:
        model: regraft's, in float32.
        checkpoint: its checkpoint.
        folder: of the written model.
        code: whether the result may need regraft's own class.

    RegraftError when they differ, or when a class of transformers was to load it and did not.
    """
    with silence_transformers():
        stock = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        ).eval()
    kind = type(stock)
    if not code and not kind.__module__.startswith("transformers."):
        raise RegraftError(
            f"transformers loads '{folder}' as {kind.__module__}.{kind.__name__}, which is no class"
            " of its own: nothing was published, report this"
        )

    return compare_models(model, stock, checkpoint)


@torch.no_grad()
def compare_models(
    model: PreTrainedModel, stock: PreTrainedModel, checkpoint: Checkpoint
) -> Equality:
    """Compare a model of a class of transformers with the one that it was made of.

    Args:
        model: regraft's, in float32.
        stock: the one that was made, in float32.
        checkpoint: of regraft's.

    RegraftError when they differ.
    """
    ids = random_inputs(checkpoint, length=row_length(checkpoint))["input_ids"]
    expected = model(input_ids=ids, use_cache=False).logits
    largest = expected.abs().max()
    difference = (stock(input_ids=ids, use_cache=False).logits - expected).abs().max() / largest
    gap = max(
        greedy_gap(model, write_greedily(stock, ids, use_cache), ids.shape[1]) / float(largest)
        for use_cache in (True, False)
    )
    found: Equality = {
        "tokens": ids.shape[1],
        "difference": float(difference),
        "greedy_gap": gap,
        "loaded": type(stock).__name__,
    }
    # Each of two scores may be off by the bound. Written so that NaN is refused.
    if not (found["difference"] <= BOUND and gap <= 2 * BOUND):
        raise RegraftError(
            f"{type(stock).__name__} and regraft's model differ on {ids.shape[1]} tokens by"
            f" {difference:.1e} of the largest logit, greedy text by {gap:.1e} (bound {BOUND:g}):"
            " nothing was published, report this"
        )
    return found


def row_length(checkpoint: Checkpoint) -> int:
    """Tokens of a row that is longer than every window, as far as the model has positions."""
    config = checkpoint.config
    host = checkpoint.anatomy.host_config(config)
    widths = [width for width in source_windows(host, states=True) if width is not None]
    length = max([*widths, *iter_mixer_windows(config), SHORTEST]) + BEYOND
    positions = host.get("max_position_embeddings")
    known = checkpoint.sizes.get("pos", positions)
    return min(length, known - NEW_TOKENS) if known else length


def iter_mixer_windows(config: Mapping[str, Any]) -> Iterator[int]:
    """Widths of the windows in a linearized model's mixers, with their sinks."""
    for spec in config.get("mixers") or ():
        for one in [spec, *spec.values()] if spec else []:
            if isinstance(one, dict) and type(one.get("window")) is int:
                yield one["window"] + int(one.get("sinks") or 0)


def write_greedily(model: PreTrainedModel, ids: Tensor, use_cache: bool) -> Tensor:
    """The ids and what a model writes behind them, always its best token."""
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
    )
    text: Tensor = model.generate(ids, settings, attention_mask=torch.ones_like(ids))
    return text


def greedy_gap(model: PreTrainedModel, text: Tensor, begin: int) -> float:
    """How far the tokens of a text lie below the model's best ones at most, in logits.

    Args:
        model: that says what is best.
        text: (1, time).
        begin: where the tokens begin that are looked at.
    """
    logits = model(input_ids=text[:, :-1], use_cache=False).logits[:, begin - 1 :]
    chosen = logits.gather(-1, text[:, begin:, None]).squeeze(-1)
    return float((logits.amax(-1) - chosen).max())
