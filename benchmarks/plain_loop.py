"""The training loop beside a hand-written one: same model, same rows, same optimiser, in turns in
one run.

python benchmarks/plain_loop.py [--hidden 512] [--layers 8] [--length 256] [--batch 2] [--steps 12]
[--rounds 3]

Prints tokens a second of both and their ratio, the median over rounds: above 1 the loop of `regraft
train` is faster.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from regraft.data.rows import Packed
from regraft.train import loop
from regraft.train.stage import Stage


def plain(model: PreTrainedModel, rows: Packed, batch: int, steps: int) -> float:
    """A loop as one writes it by hand; seconds after its first step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    begin = 0.0
    for step in range(steps):
        ids = rows.input_ids[step * batch : (step + 1) * batch]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        begin = begin or time.monotonic()
    return time.monotonic() - begin


def ours(model: PreTrainedModel, rows: Packed, batch: int, steps: int) -> float:
    """The same through `loop.train`, with its metrics and its watch over the loss; seconds after
    the first step, which runs under the FLOP counter. Checkpoints, which the plain loop has not,
    are left out.
    """
    length, marks = rows.length, []
    stage = Stage("next", steps * batch * length, length, batch, lr_body=3e-4, precision="float32")

    def note(*told: object) -> None:
        marks.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            loop.Run(
                model, [stage], lambda length: rows, Path(folder), save_seconds=1e9, progress=note
            )
        )
    return marks[-1] - marks[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, value in {
        "hidden": 512,
        "layers": 8,
        "length": 256,
        "batch": 2,
        "steps": 12,
        "rounds": 3,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.manual_seed(0)
    sizes = {
        "hidden_size": given.hidden,
        "intermediate_size": 3 * given.hidden,
        "num_hidden_layers": given.layers,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8192, num_attention_heads=8, num_key_value_heads=4, **sizes)
    ).eval()
    ids = torch.randint(0, 8192, (given.steps * given.batch, given.length))
    rows = Packed(ids, torch.arange(given.length).expand_as(ids), torch.zeros(len(ids)))
    tokens = (given.steps - 1) * given.batch * given.length
    found: dict[str, list[float]] = {"plain": [], "regraft": []}
    for turn in range(2 * given.rounds):
        name, run = [("plain", plain), ("regraft", ours)][
            (turn + turn // 2) % 2
        ]  # the one that begins changes
        found[name].append(tokens / run(copy.deepcopy(model), rows, given.batch, given.steps))
        print(f"{name}: {found[name][-1]:,.0f} tokens/s")
    ratios = [mine / theirs for mine, theirs in zip(found["regraft"], found["plain"], strict=True)]
    print(
        f"regraft / plain: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
