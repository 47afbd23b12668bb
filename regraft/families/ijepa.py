"""I-JEPA (arXiv 2301.08243): ViT without a class token, whose patches are averaged."""

from dataclasses import replace

from ..core.anatomy import Config
from . import vit
from .bert import base_prefix, head_defaults

HEADS = {"IJepaModel": "", "IJepaForImageClassification": "classifier"}


def count_positions(config: Config) -> int:
    """Number of patches."""
    return vit.position_count(config) - 1


anatomy = replace(
    vit.anatomy,
    family="ijepa",
    parts={
        role: part
        for role, part in vit.anatomy.parts.items()
        if role.partition(".")[0] not in ("first", "pooler")
    },
    sizes=(*vit.SIZES, ("intermediate_size", "ffn")),
    defaults={
        "patch_size": 14,
        **vit.DEFAULTS,
        "layer_norm_eps": 1e-12,
        **head_defaults(HEADS),
        "_positions": count_positions,
    },
    prefix=base_prefix(HEADS, "ijepa."),
)
