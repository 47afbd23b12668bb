"""Ministral (Mistral AI, 2024): Mistral with a sliding window in some of its layers."""

from dataclasses import replace

from ..core.anatomy_defaults import no_keys
from . import mistral

anatomy = replace(
    mistral.anatomy,
    family="ministral",
    # The class has no size of heads of its own.
    not_null=("head_dim",),
    rewrite=no_keys,
)
