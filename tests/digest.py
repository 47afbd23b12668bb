"""What eight tiny commands write, as numbers that a refactoring must not change.

    python tests/digest.py make before.json --tree OLD_CHECKOUT
    python tests/digest.py make after.json
    python tests/digest.py compare before.json after.json    # exit 0: equal bit for bit

`make` runs the commands twice, so that clocks and other noise are known: numbers that differ
between two runs of the same tree are left out of the comparison. Keys and flags may be renamed
between two trees, their values may not change. `ORIGINAL_FLAGS` and `ORIGINAL_KEYS` have the flags
and recipe keys of trees that parse the command line in `regraft/cli.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TREE = Path(__file__).resolve().parents[1]
ORIGINAL_FLAGS = {"--width-init": "--how", "--depth-init": "--depth-how"}
ORIGINAL_KEYS = {"width_init": "how", "depth_init": "depth_how"}
TEXT = "the law of the land is that a wider model is the same model in a new house".split()
TRAINING = ["--tokens", "1024", "--length", "64", "--batch", "2", "--lr-body", "1e-3"]
FIT = '{"steps": 3, "batch": 2, "length": 32}'
LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip
RECIPE = {
    "source": "llama",
    "train": [{"path": "text.txt", "share": 1.0}],
    "heldout": "text.txt",
    "remix": {"mixer": "gated_deltanet", "keep": "every:2", "window": 8, "sinks": 2},
    "calibration": 512,
    "stages": [
        {"kind": "align", "tokens": 256, "length": 64},
        {"kind": "distil", "tokens": 512, "length": 64},
    ],
    "measure": {
        "windows": 2,
        "length": 64,
        "bench": [32],
        "bench_steps": 2,
        "prompts": ["the law"],
    },
}
COMPARISON = {
    "task": "next",
    "source": LLAMA,
    "target": {"hidden": 24, "ffn": 48, "heads": 2, "layers": 2},
    "vocabulary": 260,
    "pretrain": {"tokens": 1280, "length": 16, "batch": 8},
    "train": {"tokens": 1280, "length": 16, "batch": 8},
    "arms": [
        {"name": "scratch", "scratch": True},
        {"name": "pad", "grow": {"width_init": "pad", "depth_init": "stack"}},
    ],
    "seeds": [0, 1],
    "every": 5,
    "rows": 8,
}
COMMANDS: dict[str, list[str]] = {
    "grow-pad": ["grow", "llama", "grow-pad", "--hidden", "48", "--ffn", "72", "--layers", "5"],
    "grow-tile": ["grow", "llama", "grow-tile", "--hidden", "64", "--layers", "6", "--noise", "0.1", "--width-init",
                  "tile", "--depth-init", "stack"],
    "grow-ligo": ["grow", "llama", "grow-ligo", "--hidden", "48", "--layers", "5", "--width-init", "ligo", "--data",
                  "text.txt", "--fit", FIT],
    "linearize": ["linearize", "qwen3", "linearize", "--keep", "every:2", "--window", "8", "--sinks", "2"],
    "linearize-data": ["linearize", "llama", "linearize-data", "--method", "lolcats", "--data", "text.txt",
                       "--tokens", "1024", "--length", "64", "--batch", "2"],
    "train": ["train", "linearize", "train", "--teacher", "qwen3", "--data", "text.txt", "--heldout", "text.txt",
              "--every", "4", *TRAINING],
    "run": ["run", "recipe.yaml", "run"],
    "compare": ["compare", "comparison.yaml", "compare"],
    "plan": ["plan", "llama", "--hidden", "48", "--layers", "5"],
    "plan-linear": ["plan", "qwen3", "--mixer", "gla", "--keep", "0"],
    "check-grow": ["check", "llama", "grow-pad"],
    "check-linear": ["check", "qwen3", "linearize"],
}  # fmt: skip


def write_inputs(folder: Path, original: bool) -> None:
    """Two tiny models with a byte tokenizer, a text and two recipes; stock transformers only."""
    import torch
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

    words = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    for name, kind in {"llama": LlamaConfig, "qwen3": Qwen3Config}.items():
        torch.manual_seed(0)
        config = kind(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    lines = (" ".join(TEXT[i % 17 :] + TEXT[: i % 7]) + f" {i}" for i in range(240))
    (folder / "text.txt").write_text("\n\n\n".join(lines), encoding="utf-8")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE), encoding="utf-8")
    comparison = json.dumps(COMPARISON | {"data": "text.txt"})
    for new, old in ORIGINAL_KEYS.items() if original else ():
        comparison = comparison.replace(f'"{new}"', f'"{old}"')
    (folder / "comparison.yaml").write_text(comparison, encoding="utf-8")


def run_commands(tree: Path, folder: Path) -> dict[str, list[Any]]:
    """Run every command of `COMMANDS` with the package in `tree`: values by command and file
    written.
    """
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    original = (tree / "regraft" / "cli.py").is_file()
    write_inputs(folder, original)
    found: dict[str, list[Any]] = {}
    for name, words in COMMANDS.items():
        flags = [ORIGINAL_FLAGS.get(word, word) if original else word for word in words]
        command = [sys.executable, "-m", "regraft", *flags, "--json"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        print(f"{name}: exit {done.returncode}", file=sys.stderr)
        if done.returncode == 2 or not done.stdout:
            raise SystemExit(f"{' '.join(flags)}: {done.stderr[-2000:]}")
        found[f"{name} stdout"] = leaves(json.loads(done.stdout))
        for file in sorted(
            path
            for path in (folder / name).rglob("*")
            if path.is_file() and path.name != ".regraft.json"  # has paths and hashes of the rest
        ):
            values = read_values(file)
            if values:
                place = re.sub(r"[0-9a-f]{12,}", "HASH", str(file.relative_to(folder / name)))
                found[f"{name} {place}"] = values
    return found


def read_values(file: Path) -> list[Any]:
    """Weights as hashes, JSON and tables as their numbers, pages as the numbers a reader sees."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, "pt") as stored:
            return [[name, hash_tensor(stored.get_tensor(name))] for name in sorted(stored.keys())]
    if file.suffix == ".json":
        return leaves(json.loads(file.read_text(encoding="utf-8")))
    if file.suffix == ".jsonl":
        return leaves([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    if file.suffix in (".html", ".md"):
        text = re.sub(
            r"<(style|svg)\b.*?</\1>|<[^>]*>", " ", file.read_text(encoding="utf-8"), flags=re.S
        )
        return re.findall(r"-?\d[\d.,e+-]*", html.unescape(text))
    return []


def hash_tensor(tensor: Any) -> str:
    """Dtype, shape and bits of a tensor."""
    import torch

    bits = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bits).hexdigest()[:16]}"


def leaves(value: Any) -> list[Any]:
    """Numbers, truth values and nulls of a JSON value in document order; names and texts are left
    out.
    """
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    if isinstance(value, list):
        return [leaf for part in value for leaf in leaves(part)]
    return [] if isinstance(value, str) else [value]


def make(out: Path, tree: Path) -> None:
    """Write the digest of a tree: the values of two runs."""
    runs = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run_commands(tree.resolve(), Path(folder)))
    out.write_text(json.dumps(runs), encoding="utf-8")


def steady(runs: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Values by file with None where two runs of one tree differ.

    A page whose count of numbers depends on the clock is left out: the JSON beside it holds the
    same numbers.
    """
    first, second = runs
    if set(first) != set(second):
        raise SystemExit(f"two runs of one tree wrote different files: {set(first) ^ set(second)}")
    return {
        name: [a if a == b else None for a, b in zip(first[name], second[name], strict=True)]
        for name in first
        if len(first[name]) == len(second[name])
    }


def compare(before: Path, after: Path) -> int:
    """Print what differs between two digests; the number of files that do."""
    old, new = (steady(json.loads(path.read_text(encoding="utf-8"))) for path in (before, after))
    different = 0
    for name in sorted(set(old) | set(new)):
        if name not in old or name not in new:
            print(f"{name}: not steady in, or missing from, {after if name in old else before}")
            different += not name.endswith((".html", ".md"))
            continue
        pairs = list(zip(old[name], new[name], strict=False))
        wrong = [(a, b) for a, b in pairs if a != b and a is not None and b is not None]
        if wrong or len(old[name]) != len(new[name]):
            print(
                f"{name}: {len(old[name])} and {len(new[name])} values, {len(wrong)} differ, such"
                f" as {wrong[:3]}"
            )
            different += 1
    values = sum(value is not None for found in new.values() for value in found)
    print(f"{len(new)} files, {values:,} values, {different} files differ")
    return different


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    verbs = parser.add_subparsers(dest="verb", required=True)
    making = verbs.add_parser("make")
    making.add_argument("out", type=Path)
    making.add_argument("--tree", type=Path, default=TREE)
    comparing = verbs.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.verb == "make":
        make(options.out, options.tree)
        return 0
    return int(compare(options.before, options.after) > 0)


if __name__ == "__main__":
    sys.exit(main())
