"""Decode and prefill speed, state bytes and peak memory by context length, each measured in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError

STEPS = 32


def parse_lengths(text: str) -> list[int]:
    """`1k,4k,16k` or `512,2048` -> token counts; RegraftError on anything else."""
    lengths = []
    for word in text.lower().split(","):
        digits, factor = (word[:-1], 1024) if word.endswith("k") else (word, 1)
        if not digits.strip().isdigit() or int(digits) == 0:
            raise RegraftError(
                f"'{word}' in --lengths '{text}' is no length: write counts such as 512 or 16k"
            )
        lengths.append(int(digits) * factor)
    return lengths


def bench(
    models: dict[str, str],
    lengths: Sequence[int],
    steps: int = STEPS,
    progress: Callable[[int, int, str], None] | None = None,
    batch: int = 1,
    prefill: bool = True,
) -> dict[str, list[dict[str, Any]]]:
    """Rows by model name: `length, batch, decode_tok_s, prefill_tok_s, state_bytes, converted_bytes, kept_bytes,
    peak_bytes, load_bytes`; speeds and bytes are those of all `batch` rows together.

    Without `prefill` the cache is filled with copies of a first token's keys and values instead, which takes no
    attention over the context: decoding is timed alone. A row whose weights and state do not fit the memory that this
    machine has free holds their state's bytes as forecast, and None for what was not measured.

    `models` maps names to paths. A fresh process per model and length prefills random tokens in chunks of 1,024 through
    the cache, then decodes: one warm-up step, then the median over `steps` steps. `peak_bytes` is the process's peak
    resident memory (accelerator memory where one is used), weights and interpreter included; `load_bytes` the same
    before the first token.
    """
    if batch < 1 or steps < 1:
        raise RegraftError(
            f"cannot bench a batch of {batch} for {steps} steps: ask for one of each at least"
        )
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in models}
    opened = {name: Checkpoint.open(path) for name, path in models.items()}
    jobs = [(name, length) for length in lengths for name in models]
    for done, (name, length) in enumerate(jobs):
        if progress:
            progress(done, len(jobs), f"{name} at {length}")
        row = row_if_too_large(opened[name], length, batch) or run_worker(
            models[name], length, steps, batch, prefill
        )
        rows[name].append(row)
    return rows


def row_if_too_large(checkpoint: Checkpoint, length: int, batch: int) -> dict[str, Any] | None:
    """The row of a model whose weights and state do not fit into the free memory of a processor's machine."""
    from ..modeling.layer_kinds import layer_kinds, mixers_of, state_bytes

    free = free_bytes()
    if free is None or torch.cuda.is_available():
        return None
    state = {kind: batch * size for kind, size in state_bytes(checkpoint, length).items()}
    weights = 4 * sum(lazy.size for lazy in checkpoint.tensors.values())
    if weights + sum(state.values()) <= free:
        return None
    softmax = {
        kind
        for kind, spec in zip(layer_kinds(checkpoint), mixers_of(checkpoint), strict=True)
        if spec is None
    }
    kept = sum(size for kind, size in state.items() if kind in softmax)
    row: dict[str, Any] = dict.fromkeys(
        ("decode_tok_s", "prefill_tok_s", "peak_bytes", "load_bytes")
    )
    sizes = {
        "state_bytes": sum(state.values()),
        "converted_bytes": sum(state.values()) - kept,
        "kept_bytes": kept,
    }
    return {"length": length, "batch": batch, **row, **sizes}


def free_bytes() -> int | None:
    """Memory that a new process may have, where the system tells."""
    place = Path("/proc/meminfo")
    if not place.exists():
        return None
    line = next(line for line in place.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def run_worker(
    path: str, length: int, steps: int, batch: int = 1, prefill: bool = True
) -> dict[str, Any]:
    """One row, measured in a child process that sees the same package; RegraftError with its last line if it fails."""
    root = str(Path(__file__).resolve().parents[2])
    environment = dict(
        os.environ, PYTHONPATH=os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    )
    command = [
        sys.executable,
        "-m",
        "regraft.evaluation.bench",
        path,
        *map(str, (length, steps, batch, int(prefill))),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        last = (
            finished.stderr.strip().splitlines() or [f"killed by signal {-finished.returncode}"]
        )[-1]
        raise RegraftError(
            f"bench of {path} at {length} tokens failed: {last}; try shorter --lengths or a smaller --batch"
        )
    return json.loads(finished.stdout.strip().splitlines()[-1])


def measure(
    path: str, length: int, steps: int, batch: int = 1, prefill: bool = True
) -> dict[str, Any]:
    """The row of one model at one length, in this process."""
    from .. import modeling
    from . import chunked

    torch.manual_seed(0)
    model: Any = modeling.load(path)
    device = next(model.parameters()).device
    for (
        parameter
    ) in model.parameters():  # pages of a file would count once for every tensor mapped near them
        parameter.data = parameter.data.clone()
    reset_peak(device.type)
    loaded = peak_bytes(device.type)
    ids = torch.randint(model.config.vocab_size, (batch, length if prefill else 1), device=device)
    mixers = getattr(model.config, "mixers", None) or [None] * model.config.num_hidden_layers
    with torch.inference_mode():
        begin = time.perf_counter()
        logits, cache = chunked.last_logits(model, ids)
        synchronize(device.type)
        reading_took = time.perf_counter() - begin
        extend_cache(cache, length - ids.shape[1])
        sizes = modeling.state_bytes(cache)
        seconds = []
        for _ in range(steps + 1):
            begin = time.perf_counter()
            logits, cache = chunked.last_logits(model, logits.argmax(-1, keepdim=True), cache)
            synchronize(device.type)
            seconds.append(time.perf_counter() - begin)
    converted = sum(size for size, mixer in zip(sizes, mixers, strict=True) if mixer is not None)
    return {
        "length": length,
        "batch": batch,
        "decode_tok_s": batch / statistics.median(seconds[1:]),
        "prefill_tok_s": batch * length / reading_took if prefill else None,
        "state_bytes": sum(sizes),
        "converted_bytes": converted,
        "kept_bytes": sum(sizes) - converted,
        "peak_bytes": peak_bytes(device.type),
        "load_bytes": loaded,
    }


def extend_cache(cache: Any, tokens: int) -> None:
    """Make a cache as large as after `tokens` more positions, each a copy of its last one: to time decoding."""
    from .. import modeling

    for layer in cache.layers if tokens else ():
        if isinstance(layer, modeling.MixerState):
            layer.cumulative_length += tokens
        else:
            grown = (
                part[..., -1:, :].expand(*part.shape[:-2], tokens, -1)
                for part in (layer.keys, layer.values)
            )
            layer.update(*grown)


def synchronize(device: str) -> None:
    """Wait for queued work on an accelerator."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(device: str) -> int:
    """Peak memory since `reset_peak`, or since the start: the accelerator's, or resident.

    Linux's own high-water mark is read where there is one: getrusage reports the parent's peak when that was higher.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def reset_peak(device: str) -> None:
    """Forget the peak of loading, where the system can."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    at, times, rows, reads = map(int, sys.argv[2:])
    print(json.dumps(measure(sys.argv[1], at, times, rows, bool(reads))))
