"""SigLIP's tower for texts (arXiv 2303.15343): an encoder whose last token goes through a map."""

from dataclasses import replace

from . import clip_text_model
from .bert import head_linear
from .clip_text_model import SIZES, text_parts

anatomy = replace(
    clip_text_model.anatomy,
    family="siglip_text_model",
    parts={
        **text_parts(),
        **head_linear("projection", "head", "hidden -> pool", "_head", reads="normed", at="last"),
    },
    sizes=(*SIZES, ("projection_size", "pool")),
    defaults={
        "max_position_embeddings": 64,
        "projection_size": lambda config: config["hidden_size"],
        "layer_norm_eps": 1e-6,
        "_head": True,
    },
    prefix=lambda config: "",
)
