"""DeiT (arXiv 2012.12877): ViT with a second token, for distillation."""

from dataclasses import replace

from ..core.anatomy import Config, Part
from . import vit
from .bert import base_prefix, head_defaults, head_linear

HEADS = {
    "DeiTModel": "pooler",
    "DeiTForImageClassification": "classifier",
    "DeiTForImageClassificationWithTeacher": "teacher",
}


def position_count(config: Config) -> int:
    """Number of positions: one more than ViT's, for the token of distillation."""
    return 1 + vit.position_count(config)


anatomy = replace(
    vit.anatomy,
    family="deit",
    parts={
        **vit.anatomy.parts,
        "second.weight": Part("{p}embeddings.distillation_token", "one one hidden"),
        **head_linear(
            "teacher.first", "cls_classifier", "hidden -> label", "_teacher", reads="normed"
        ),
        **head_linear(
            "teacher.second", "distillation_classifier", "hidden -> label", "_teacher",
            reads="normed",
        ),
    },
    defaults={**vit.anatomy.defaults, "_positions": position_count, **head_defaults(HEADS)},
    prefix=base_prefix(HEADS, "deit."),
)  # fmt: skip
