"""The classes that load a linearized model, as transformers names them in a config."""

from __future__ import annotations

from collections.abc import Iterable

# Auto class -> file and class, in the code that lies beside a saved model. All in one file, which
# imports all others: transformers tells copies of code apart by what the named file imports, and
# models with another mixer each would share one copy if they had the named file in common.
AUTO_MAP = {
    "AutoConfig": "modeling_regraft.RegraftConfig",
    "AutoModel": "modeling_regraft.RegraftModel",
    "AutoModelForCausalLM": "modeling_regraft.RegraftForCausalLM",
    "AutoModelForSequenceClassification": "modeling_regraft.RegraftForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_regraft.RegraftForTokenClassification",
}
# The same of a model that has its language model in `text_config`, beside other parts.
WRAPPER_AUTO_MAP = {
    "AutoConfig": "modeling_regraft.RegraftConfig",
    "AutoModelForImageTextToText": "modeling_regraft.RegraftForImageTextToText",
}
TEXT_CONFIG = "text_config"


def find_auto_map(keys: Iterable[str]) -> dict[str, str]:
    """The auto map of a linearized model.

    Args:
        keys: of its config.
    """
    return dict(WRAPPER_AUTO_MAP if TEXT_CONFIG in keys else AUTO_MAP)


def find_architecture(keys: Iterable[str]) -> str:
    """The class of a linearized model that continues text; `keys` as of `find_auto_map`."""
    return "RegraftForImageTextToText" if TEXT_CONFIG in keys else "RegraftForCausalLM"
