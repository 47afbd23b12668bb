"""ViT-MSN (arXiv 2204.07141): ViT without a pooler."""

from dataclasses import replace

from . import vit
from .bert import base_prefix, head_defaults

HEADS = {"ViTMSNModel": "", "ViTMSNForImageClassification": "classifier"}

anatomy = replace(
    vit.anatomy,
    family="vit_msn",
    parts={role: part for role, part in vit.anatomy.parts.items() if "pooler" not in role},
    sizes=(*vit.SIZES, ("intermediate_size", "ffn")),
    defaults={
        "patch_size": 16,
        **vit.DEFAULTS,
        "layer_norm_eps": 1e-6,
        **head_defaults(HEADS),
    },
    prefix=base_prefix(HEADS, "vit."),
)
