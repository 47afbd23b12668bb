"""AFM (Arcee, 2025): Llama with a plain MLP under a squared ReLU."""

from ..core.anatomy import Part
from .llama import parts, variant


def without_gate() -> dict[str, Part]:
    """Llama's parts without the gate."""
    table = parts("attention_bias", "attention_bias", "mlp_bias")
    return {role: part for role, part in table.items() if not role.startswith("mlp.gate.")}


anatomy = variant(
    "arcee",
    {"rms_norm_eps": 1e-5},
    parts=without_gate(),
    divides=(("hidden_size", "num_attention_heads"),),
)
