"""Reading a row token by token."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def decode(model: Any, rows: torch.Tensor, prefix: int) -> torch.Tensor:
    """Logits of the last tokens of rows, read one by one behind a prefix."""
    output = model(input_ids=rows[:, :prefix], use_cache=True)
    logits = [output.logits[:, -1:]]
    for place in range(prefix, rows.shape[1]):
        name = "cache" if "cache" in output else "past_key_values"
        output = model(input_ids=rows[:, place : place + 1], use_cache=True, **{name: output[name]})
        logits.append(output.logits)
    return torch.cat(logits, 1)
