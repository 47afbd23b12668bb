"""Speed of linearized models beside an earlier revision of regraft, in turns in one run.

python benchmarks/speed_before.py REVISION [--rounds 3] [--lengths 1k,4k] [--batch 1]

Each revision converts the same random source (SmolLM2's sizes, six layers) by itself and measures
it beside its source with `regraft bench`. Prints tokens a second of this checkout over those of
REVISION, for the models and, as the error of the measurement, for the stock source.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "window": "--mixer window --keep none --window 64 --sinks 4",
    "gated_deltanet-window": "--mixer gated_deltanet --keep every:3 --window 64 --sinks 4",
    "gated_deltanet": "--mixer gated_deltanet --keep none --window 0",
    "supra": "--mixer supra --keep none --window 0",
    "mamba2": "--mixer mamba2 --keep none --window 0",
}


def run(root: Path, *words: str) -> str:
    """A command of the regraft in `root`; its output."""
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-m", "regraft", *words],
        env=environment,
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def measure(root: Path, model: Path, source: Path, given: Any) -> dict[tuple[str, int, str], float]:
    """(who, context, what) -> tokens a second."""
    words = ("bench", model, "--against", source, "--lengths", given.lengths, "--json")
    found = json.loads(run(root, *map(str, words), "--batch", str(given.batch)))
    return {
        (who, row["length"], what): row[f"{what}_tok_s"]
        for who, rows in (("model", found["rows"]), ("source", found["against"]))
        for row in rows
        for what in ("decode", "prefill")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lengths", default="1k,4k")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--models", default=",".join(MODELS))
    given = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), Path(name) / "before"
        add = ("git", "worktree", "add", "--detach", str(before), given.revision)
        subprocess.run(add, cwd=ROOT, check=True, capture_output=True)
        try:
            compare(folder, {"before": before, "now": ROOT}, given)
        finally:
            remove = ("git", "worktree", "remove", "--force", str(before))
            subprocess.run(remove, cwd=ROOT, check=True)


def compare(folder: Path, roots: dict[str, Path], given: Any) -> None:
    """Convert and measure with both revisions, and print the ratios."""
    source = folder / "source"
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=9,
            num_key_value_heads=3,
            vocab_size=4096,
            max_position_embeddings=8192,
        )
    ).save_pretrained(source)

    print("this checkout / before, median of rounds: model (stock source)")
    for kind in given.models.split(","):
        for when, root in roots.items():
            run(root, "linearize", str(source), str(folder / kind / when), *MODELS[kind].split())
        rounds = [
            {
                when: measure(root, folder / kind / when, source, given)
                for when, root in roots.items()
            }
            for _ in range(given.rounds)
        ]

        parts = []
        for who, length, what in rounds[0]["now"]:
            if who == "source":
                continue
            ratios = {
                one: statistics.median(
                    found["now"][one, length, what] / found["before"][one, length, what]
                    for found in rounds
                )
                for one in ("model", "source")
            }
            parts.append(f"{what} {length} {ratios['model']:.2f} ({ratios['source']:.2f})")
        print(f"{kind:24}", ", ".join(parts), flush=True)


if __name__ == "__main__":
    main()
