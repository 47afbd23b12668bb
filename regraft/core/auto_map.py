"""The classes that load a linearized model, as transformers names them in a config."""

from __future__ import annotations

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
