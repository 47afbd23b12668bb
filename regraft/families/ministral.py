"""Ministral (Mistral AI, 2024): Mistral with a sliding window in some of its layers."""

from dataclasses import replace

from . import mistral

anatomy = replace(mistral.anatomy, family="ministral", rewrite=mistral.state_head_dim)
