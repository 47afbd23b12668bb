"""XLM-RoBERTa (arXiv 1911.02116): RoBERTa under another name."""

from .roberta import variant

anatomy = variant("xlm-roberta", "XLMRoberta")
