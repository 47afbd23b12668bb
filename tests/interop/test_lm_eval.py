"""lm-eval's own command line on a saved model, in a process where regraft cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import regraft

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

COMMAND = """
import sys
sys.modules["regraft"] = None
from lm_eval.__main__ import cli_evaluate
cli_evaluate()
"""
TASK = """
task: tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""
KINDS = {
    "loglikelihood": "metric_list: [{metric: perplexity}]\n",
    "generate_until": "generation_kwargs: {until: ['#'], max_gen_toks: 6}\n"
    "metric_list: [{metric: exact_match}]\n",
}
ROWS = [("the quick brown", " fox jumps"), ("one", " lazy dog"), ("a longer text, and", " more")]


def write_tasks(folder: Path) -> None:
    rows = [{"question": question, "answer": answer} for question, answer in ROWS]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, rest in KINDS.items():
        text = TASK.format(kind=kind, data=folder / "data.jsonl") + rest
        (folder / f"{kind}.yaml").write_text(text)


def read_answers(folder: Path, kind: str) -> list[Any]:
    """The model's answer to each row."""
    (file,) = folder.rglob(f"samples_tiny_{kind}_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    return [sample["resps"][0][0] for sample in sorted(samples, key=lambda one: one["doc_id"])]


@torch.no_grad()
def test_command_line_without_regraft(linearized: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path)
    command = [
        sys.executable, "-c", COMMAND, "--model", "hf", "--model_args",
        f"pretrained={linearized},trust_remote_code=True,dtype=float32", "--device", "cpu",
        "--include_path", str(tmp_path), "--tasks", ",".join(f"tiny_{kind}" for kind in KINDS),
        "--batch_size", "2", "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_DATASETS_CACHE": str(tmp_path / "datasets"),
        "HF_DATASETS_OFFLINE": "1",
    }
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr

    model, tokenizer = regraft.load(str(linearized)), AutoTokenizer.from_pretrained(linearized)
    likelihoods = read_answers(tmp_path / "out", "loglikelihood")
    texts = read_answers(tmp_path / "out", "generate_until")
    for (question, answer), (found, _), text in zip(ROWS, likelihoods, texts, strict=True):
        ids = tokenizer(question + answer, return_tensors="pt").input_ids
        asked = tokenizer(question, return_tensors="pt").input_ids
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        wanted = logs.gather(1, ids[0, 1:, None])[asked.shape[1] - 1 :].sum()
        assert float(found) == pytest.approx(float(wanted), rel=1e-4)
        new = model.generate(asked, max_new_tokens=6, do_sample=False)[0, asked.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).split("#")[0]
