"""A wheel of this checkout, installed alone in a fresh environment, does what the README's first
commands do.

    python tests/wheel.py [--torch-args "--index-url URL"]

Builds the wheel, installs it with nothing but its own dependencies (torch first, from wherever pip
finds it), makes a tiny model with stock transformers, and runs plan, grow, check and linearize on
it from another folder.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)).save_pretrained("source")
"""
VERBS = (
    "plan source --hidden 48 --layers 6",
    "grow source grown --hidden 48 --layers 6",
    "check source grown",
    "linearize source linear --mixer gated_deltanet --keep every:2 --window 8",
    "check source linear",
)


def run(*words: str | Path, cwd: Path) -> str:
    """Run a command; its output. A failure ends this script with what the command said."""
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    """Build, install, run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--torch-args", default="", help="further arguments of pip install torch")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Of a copy: another pip may be at work in the checkout.
        checkout = folder / "checkout"
        shutil.copytree(ROOT / "regraft", checkout / "regraft")
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, checkout)
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, checkout, cwd=folder)
        (wheel,) = folder.glob("regraft-*.whl")

        venv.create(folder / "fresh", with_pip=True)
        python = folder / "fresh" / "bin" / "python"
        install = (python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt")
        run(*install, *shlex.split(options.torch_args), "torch", cwd=folder)
        run(*install, wheel, cwd=folder)

        run(python, "-c", MODEL, cwd=folder)
        where = run(python, "-c", "import regraft; print(regraft.__file__)", cwd=folder).strip()
        if not where.startswith(str(folder.resolve())):
            sys.exit(f"regraft was imported from {where}, not from the wheel")
        for verb in VERBS:
            found = json.loads(run(python.parent / "regraft", *verb.split(), "--json", cwd=folder))
            if verb.startswith("check") and not found["holds"]:
                sys.exit(f"regraft {verb}: does not hold")
            print(f"regraft {verb}: done")
        for verb in ("--help", "train --help", "--version"):
            run(python.parent / "regraft", *verb.split(), cwd=folder)


if __name__ == "__main__":
    main()
