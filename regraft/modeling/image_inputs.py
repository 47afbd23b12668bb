"""A random image among random tokens, as a multimodal model takes it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ..core.checkpoint import Checkpoint
from ..families.multimodal.wrapped_model import MultimodalAnatomy

TEXT_TOKENS = 6  # before and after the image
PATCHES = 2  # rows and columns of merged patches, of classes that take any size
# Config keys of the token that an image's features take the place of.
IMAGE_TOKENS = ("image_token_id", "image_token_index")
# Arguments that say which tokens are an image's.
TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")


@torch.no_grad()
def image_inputs(checkpoint: Checkpoint, model: Any, seed: int = 0) -> dict[str, Tensor]:
    """Random arguments of a forward pass over a text with an image in it.

    Args:
        checkpoint: of a multimodal model.
        model: the same, as transformers loads it. Its vision tower says how many tokens the image
            stands for.
        seed: of the random numbers.

    Returns:
        `input_ids` (1, time), `pixel_values` and what else the class needs; {} for a model without
        images, or without a row for the image's token.
    """
    anatomy = checkpoint.anatomy.host(checkpoint.config)
    if not isinstance(anatomy, MultimodalAnatomy):
        return {}
    found = [checkpoint.config.get(key, getattr(model.config, key, None)) for key in IMAGE_TOKENS]
    token = next((value for value in found if value is not None), None)
    vocab = checkpoint.sizes["vocab"]
    if token is None or token >= vocab:
        return {}
    random = torch.Generator().manual_seed(seed)
    image = draw_image(anatomy.wrapper.images, model.config.vision_config, random)
    features: Any = model.get_image_features(**image).pooler_output
    if isinstance(features, list | tuple):
        features = torch.cat(list(features))
    count = features.numel() // checkpoint.sizes["hidden"]

    text = torch.randint(0, vocab, (1, 2 * TEXT_TOKENS), generator=random)
    text = torch.where(text == token, (token + 1) % vocab, text)
    place = torch.full((1, count), token)
    ids = torch.cat([text[:, :TEXT_TOKENS], place, text[:, TEXT_TOKENS:]], 1)
    taken = inspect.signature(model.forward).parameters
    kinds = {name: (ids == token).long() for name in TYPE_KEYS if name in taken}
    return {"input_ids": ids, **image, **kinds}


def draw_image(form: str, vision: Any, random: torch.Generator) -> dict[str, Tensor]:
    """A random image as a vision tower takes it.

    Args:
        form: one of `Wrapper.images`.
        vision: the tower's config.
        random: of the pixels.
    """
    channels: int = getattr(vision, "num_channels", 0) or getattr(vision, "in_channels", 3)
    if form == "patches":
        side = PATCHES * vision.spatial_merge_size
        inner = channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.randn(side * side, inner, generator=random)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]])}
    if form == "placed":
        side = PATCHES * vision.pooling_kernel_size
        pixels = torch.randn(1, side * side, channels * vision.patch_size**2, generator=random)
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
        return {"pixel_values": pixels, "image_position_ids": places[None]}
    size = vision.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    pixels = torch.randn(1, channels, height, width, generator=random)
    if form == "several":
        return {"pixel_values": pixels[None]}
    if form == "sized":
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[height, width]])}
    return {"pixel_values": pixels}
