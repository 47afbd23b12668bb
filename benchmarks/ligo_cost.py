"""What fitting LiGO's maps costs: FLOPs of making the grown weights beside a plain training step,
and peak memory.

Claims: at the batch of the paper's BERT-Small to BERT-Base (256 rows of 128 tokens) making the
weights and carrying their gradients back takes about 1 % of a plain step's FLOPs (more at smaller
batches, in proportion); fitting takes at most 1.5 times the memory of training the target with
AdamW. FLOPs of making the weights are counted on real tensors, those of a training step come from
`regraft.modeling.flops` (tests hold both to PyTorch's counter). Memory is the largest RssAnon of a
process of its own, two steps of --rows rows, less what a process has that has only imported; both
sides see the same rows. Run: python benchmarks/ligo_cost.py [--rows 8] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from grow_speed import measure_command

LENGTH, BATCH = 128, 256
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
}
SIZES = {"hidden": 768, "ffn": 3072, "heads": 12, "layers": 12}
COMMON = """
import torch, sys
from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.train.fit_ligo import LigoTrainer
from regraft.growth.ligo_options import Ligo
from regraft.growth.steps.ligo import Learned
from regraft.data.rows import Packed
from regraft.train.stage import Stage
source, rows, length, sizes = Checkpoint.open(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), eval(sys.argv[4])
learned = Learned(**sizes, method=Ligo(steps=100))
ids = torch.randint(200, 1000, (rows, length))
places = torch.arange(length).expand_as(ids).contiguous()
data = Packed(ids, places, torch.zeros(rows), mask=103, special=(0,))
stage = Stage("mask", rows * length, length, rows, precision="float32")
"""
FIT = """
fitting = LigoTrainer(learned(source), learned.build_grower(source).cache_source(), learned.method)
for step in range(2):
    fitting.step(stage, data, step, 0, rows)
"""
TRAIN = """
from regraft.train.objectives import compute_loss
model = modeling.materialize(learned(source))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for step in range(2):
    compute_loss(model, "mask", data, generator=torch.Generator().manual_seed(step)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
"""


def source(folder: Path) -> None:
    """A BERT-Small of random weights."""
    from transformers import BertConfig, BertForMaskedLM

    BertForMaskedLM(BertConfig(**SMALL, architectures=["BertForMaskedLM"])).save_pretrained(folder)


def overhead(folder: Path) -> dict[str, float]:
    """FLOPs of making the weights and their gradients, and of a plain training step at the paper's
    batch.
    """
    import torch

    from regraft.core.checkpoint import Checkpoint
    from regraft.growth.steps.ligo import Learned
    from regraft.modeling import flops

    small = Checkpoint.open(folder)
    learned = Learned(**SIZES)
    grower = learned.build_grower(small).cache_source()
    with flops.build_flop_counter() as counter:
        made = [value for value in grower().values() if value.requires_grad]
        torch.autograd.backward(made, [torch.ones_like(value) for value in made])
    making, step = counter.get_total_flops(), flops.training_flops(learned(small), LENGTH, BATCH)
    return {"making": making, "step": step, "share": making / step}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    arguments = parser.parse_args()
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "small"
        source(folder)
        row |= overhead(folder)
        print(f"making the weights {row['making']:.3e} FLOPs, a step of {BATCH} x {LENGTH} tokens {row['step']:.3e}: "
              f"{100 * row['share']:.2f} %", flush=True)  # fmt: skip
        words = [str(folder), str(arguments.rows), str(LENGTH), repr(SIZES)]
        for side, code in (("imports", ""), ("train", TRAIN), ("fit", FIT)):
            row[side] = measure_command([sys.executable, "-c", COMMON + code, *words])["peak"]
        row["memory"] = (row["fit"] - row["imports"]) / (row["train"] - row["imports"])
    print(f"memory above imports: training {(row['train'] - row['imports']) / 1e6:.0f} MB, fitting "
          f"{(row['fit'] - row['imports']) / 1e6:.0f} MB: {row['memory']:.2f} times")  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
