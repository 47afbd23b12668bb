"""What vLLM makes of saved models, run by the python of vLLM's own environment.

Run: python run_vllm.py JOBS FOUND

JOBS is a JSON file, a list of {"folder", "rows", "dtype", "new_tokens", "top", "chunk"}. FOUND is
written: a list in that order, each {"error"} or {"prompts", "greedy", "vllm"}. `prompts` has, for
each row, a map {token id: log-probability} for every token but the first: the `top` best ones and
the row's own. `greedy` has the ids that the model writes behind each row. `vllm` is its release.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

# Read when vLLM is imported: one process, a small cache, as many threads as the caller says.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
import vllm  # noqa: E402  # after the variables
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job's result."""
    rows, new = job["rows"], job["new_tokens"]
    model = vllm.LLM(
        job["folder"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,  # what is cached has no log-probabilities
        max_model_len=max(map(len, rows)) + new,
        max_num_seqs=len(rows),
        max_num_batched_tokens=job["chunk"],  # longer rows are read in pieces, beside each other
        max_logprobs=job["top"],
    )
    sampling = vllm.SamplingParams(
        temperature=0.0,
        max_tokens=new,
        ignore_eos=True,
        prompt_logprobs=job["top"],
        detokenize=False,
    )
    prompts = [{"prompt_token_ids": row} for row in rows]
    answers = model.generate(prompts, sampling, use_tqdm=False)
    return {
        "prompts": [
            [
                {token: one.logprob for token, one in place.items()}
                for place in row.prompt_logprobs[1:]
            ]
            for row in answers
        ],
        "greedy": [list(row.outputs[0].token_ids) for row in answers],
        "vllm": vllm.__version__,
    }


def main(jobs: str, found: str) -> None:
    results = []
    for job in json.loads(Path(jobs).read_text()):
        try:
            results.append(run(job))
        except Exception:
            results.append({"error": traceback.format_exc(limit=-3)})
        cleanup_dist_env_and_memory()
    Path(found).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
