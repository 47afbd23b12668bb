"""OLMo 3 (Ai2, 2025): OLMo 2 with a sliding window in most of its layers."""

from dataclasses import replace

from . import gemma3_text, olmo2

anatomy = replace(olmo2.anatomy, family="olmo3", older=gemma3_text.older_config_keys)
