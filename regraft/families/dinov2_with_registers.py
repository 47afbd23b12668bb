"""DINOv2 with registers (arXiv 2309.16588): further tokens, which have no position."""

from dataclasses import replace

from ..core.anatomy import Part
from . import dinov2
from .bert import base_prefix, head_defaults

HEADS = {name.replace("Dinov2", "Dinov2WithRegisters"): head for name, head in dinov2.HEADS.items()}

anatomy = replace(
    dinov2.anatomy,
    family="dinov2_with_registers",
    parts={
        **dinov2.anatomy.parts,
        "mask.weight": Part("{p}embeddings.mask_token", "one hidden"),
        "registers.weight": Part("{p}embeddings.register_tokens", "one register hidden"),
    },
    sizes=(*dinov2.anatomy.sizes, ("num_register_tokens", "register")),
    defaults={
        **dinov2.anatomy.defaults,
        "patch_size": 16,
        "num_register_tokens": 4,
        **head_defaults(HEADS),
    },
    prefix=base_prefix(HEADS, "dinov2_with_registers."),
)
