"""Granite (IBM, 2024): Llama with factors on embeddings, branches, scores and logits."""

from .granite_swa import FACTORS, softmax_scale
from .llama import variant

anatomy = variant("granite", {"attention_multiplier": 1.0}, scale=softmax_scale, factors=FACTORS)
