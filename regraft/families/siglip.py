"""SigLIP (arXiv 2303.15343): a tower for texts and one for images; each pair is a question."""

from ..core.part import Part
from . import siglip_text_model, siglip_vision_model
from .multimodal.two_towers import build_two_towers, within

anatomy = build_two_towers(
    "siglip",
    "SiglipModel",
    within(siglip_text_model.anatomy, "text_model."),
    within(siglip_vision_model.anatomy, "vision_model."),
    ("SiglipTextModel", "SiglipVisionModel"),
    own_parts={
        "temperature.weight": Part("logit_scale", "scale one", writes="own"),
        "temperature.bias": Part("logit_bias", "scale one", writes="own"),
    },
    texts_follow=True,
)
