"""The one-token step as one graph, from each of some kinds of cache.

Run: python -m helpers.graphs FOLDER dynamic,static NAME...

Prints for each model FOLDER/NAME the largest difference to a plain forward pass, relative to the
largest logit, as JSON. In a process of its own, since checks of shapes are no part of a graph.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from regraft import modeling


@torch.no_grad()
def measure(folder: Path, kinds: list[str]) -> float:
    """The largest difference; raises where there is more than one graph."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(3, model.config.vocab_size, (2, 14))
    whole = model(input_ids=tokens).logits[:, 12:]
    step = torch.compile(model, fullgraph=True, backend="eager")

    worst = 0.0
    make = {
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }
    for cache in (make[kind]() for kind in kinds):
        options = {"past_key_values": cache, "use_cache": True}
        model(input_ids=tokens[:, :12], **options)
        pieces = [step(input_ids=piece, **options).logits for piece in tokens[:, 12:].split(1, 1)]
        worst = max(worst, float((torch.cat(pieces, 1) - whole).abs().max() / whole.abs().max()))
    torch._dynamo.reset()
    return worst


def main(folder: str, kinds: str, *names: str) -> None:
    assert modeling  # imported: its classes are registered
    print(json.dumps({name: measure(Path(folder) / name, kinds.split(",")) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
