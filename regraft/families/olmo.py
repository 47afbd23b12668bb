"""OLMo (arXiv 2402.00838): Llama with layer norms that have no parameters."""

from ..core.anatomy import Part
from .llama import parts, variant
from .olmoe import check_clip


def without_norms() -> dict[str, Part]:
    """Llama's parts without the norms'."""
    table = parts("attention_bias", "attention_bias", False)
    return {role: part for role, part in table.items() if not role.startswith("norm.")}


anatomy = variant(
    "olmo",
    {"_eps": 1e-5},
    parts=without_norms(),
    eps="_eps",
    bare_norms=True,
    finish=check_clip,
)
