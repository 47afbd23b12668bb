"""CLIP (arXiv 2103.00020): a tower for texts, one for images, and a map from each to one space."""

from ..core.part import Part
from . import clip_text_model, clip_vision_model
from .multimodal.two_towers import build_two_towers

anatomy = build_two_towers(
    "clip",
    "CLIPModel",
    clip_text_model.anatomy,
    clip_vision_model.anatomy,
    ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"),
    shared=("projection_dim",),
    own_parts={"temperature.weight": Part("logit_scale", "scalar", writes="own")},
)
