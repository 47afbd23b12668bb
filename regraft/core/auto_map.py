"""The classes that load a linearized model, as transformers names them in a config."""

from __future__ import annotations

# Auto class -> file and class, in the code that lies beside a saved model.
AUTO_MAP = {
    "AutoConfig": "configuration_regraft.RegraftConfig",
    "AutoModel": "modeling_regraft.RegraftModel",
    "AutoModelForCausalLM": "modeling_regraft.RegraftForCausalLM",
    "AutoModelForSequenceClassification": "modeling_regraft.RegraftForSequenceClassification",
}
