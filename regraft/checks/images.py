"""What models that read images are compared on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import modeling
from ..core.checkpoint import Checkpoint


def draw_image_inputs(
    before: Checkpoint, after: Checkpoint, model: Any, seed: int
) -> dict[str, Tensor]:
    """A random text with an image, as both models take it; {} when one of them takes none.

    Args:
        before: the source.
        after: the result.
        model: of the source.
        seed: of the random numbers.
    """
    # A language model that was taken out of another reads text alone.
    hosts = {type(one.anatomy.host(one.config)) for one in (before, after)}
    return modeling.image_inputs(before, model, seed) if len(hosts) == 1 else {}


@torch.no_grad()
def cached_image_difference(model: Any, images: dict[str, Tensor]) -> float:
    """Decoding through the cache behind an image against all tokens at once, relative.

    Args:
        model: what is run.
        images: as of `modeling.image_inputs`.
    """
    ids = images["input_ids"]
    logits = model(**images, use_cache=False).logits.float()
    start = ids.shape[1] - modeling.TEXT_TOKENS
    first = {
        name: value[:, :start] if value.shape == ids.shape else value
        for name, value in images.items()
    }
    out, worst = model(**first, use_cache=True), 0.0
    for place in range(start, ids.shape[1]):
        cache = modeling.cache_kwargs(modeling.cache_of(out))
        out = model(input_ids=ids[:, place : place + 1], **cache, use_cache=True)
        worst = max(worst, float((out.logits.float() - logits[:, place : place + 1]).abs().max()))
    return worst / float(logits.abs().max())
