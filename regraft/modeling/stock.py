"""A stock model from its directory, read by transformers' own `from_pretrained`."""

from __future__ import annotations

import torch
from transformers import AutoConfig, PreTrainedModel

from ..core.checkpoint import Checkpoint
from ..core.model_files import refuse_fetched_code
from ..errors import RegraftError
from ..io.finite import check_finite
from .meta import choose_class, explain_model_errors, silence_transformers

# Keys with which a config.json makes transformers read other files than those that were verified.
REDIRECTING_KEYS = ("configuration_files", "transformers_weights")


def load_stock(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `AutoModel...from_pretrained` makes of a directory, in eval mode.

    Class, ties and renaming are transformers' own, not those of the family's table. Only
    safetensors are read, and nothing is fetched.

    Args:
        checkpoint: of a stock family, as opened.
        dtype: of the weights.

    Raises RegraftError when stock loading would leave a weight at random, ignore one that the
    family's table has a use for, or read other files than `Checkpoint.open` did.
    """
    folder = checkpoint.path
    if named := [key for key in REDIRECTING_KEYS if checkpoint.config.get(key)]:
        raise RegraftError(
            f"config.json of '{folder}' has {named[0]} {checkpoint.config[named[0]]!r:.60}, which "
            "makes transformers read other files: remove the key"
        )

    with explain_model_errors(checkpoint.origin), silence_transformers():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        refuse_fetched_code(config.to_dict(), folder)
        # A wrong shape is then listed in `mismatched_keys` instead of raised.
        model, info = choose_class(config, checkpoint.anatomy.causal).from_pretrained(
            folder,
            config=config,
            variant=checkpoint.variant,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )

    lost = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
    canonical = checkpoint.anatomy.canonical_name
    ignored = {
        name for name in info["unexpected_keys"] if canonical(name) not in checkpoint.dropped
    }
    if lost | ignored:
        raise RegraftError(
            f"'{checkpoint.path}' does not fit its model: parameter '{sorted(lost | ignored)[0]}' "
            f"has no counterpart in {type(model).__name__} as transformers loads it"
        )
    if not checkpoint.allow_nonfinite:
        for name, parameter in model.named_parameters():
            advice = "fetch the file again; grow, linearize and train take --allow-nonfinite"
            check_finite(parameter.detach(), f"tensor '{name}' in '{folder}'", advice)
    return model.eval()
