"""CamemBERT (arXiv 1911.03894): RoBERTa under another name."""

from .roberta import variant

anatomy = variant("camembert", "Camembert")
