"""Decode and prefill speed, state bytes and peak memory by context length.

Each row is measured in a process of its own, so that its peak memory is that of one model at one
length. Run as a module, this file is that process.
"""

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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..io.linux import available_memory
from ..mixers.registry import mixer_class
from .bench_time import TimeLimit, extrapolate
from .rows import BenchRow

STEPS = 32


def bench(
    models: dict[str, str],
    lengths: Sequence[int],
    steps: int = STEPS,
    progress: Callable[[int, int, str], None] | None = None,
    batch: int = 1,
    prefill: bool = True,
    seconds: float | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> dict[str, list[BenchRow]]:
    """Measure models at several context lengths; rows by name of the model.

    A fresh process for each model and length prefills random tokens in chunks of 1,024 through the
    cache, then decodes. A row whose weights and state do not fit into the free memory of this
    machine has the bytes of its state as forecast, and None for what was not measured.

    Args:
        models: paths by name.
        lengths: tokens of context.
        steps: decoding steps; the speed is their median, after one step to warm up.
        progress: called with the rows done, their total, and what is measured.
        batch: rows decoded together.
        prefill: read the context. Else windows are read, and all other keys and values are copies
            of the last, which takes no attention over the context: decoding is timed alone.
        seconds: what all of it may take. Where reading a context would take longer, decoding is
            timed alone; where that would, nothing is. What is left out is extrapolated from shorter
            contexts. None: everything is measured.
        dtypes: of weights by name of the model, as `parse_decoding_dtype` knows them; float32 for
            others.

    RegraftError for a batch or number of steps below one, and when a process fails.
    """
    if batch < 1 or steps < 1:
        raise RegraftError(
            f"cannot bench a batch of {batch} for {steps} steps: ask for one of each at least"
        )

    rows: dict[str, list[BenchRow]] = {name: [] for name in models}
    opened = {name: Checkpoint.open(path) for name, path in models.items()}
    lengths, limit = sorted(lengths), TimeLimit(seconds, steps, len(models))
    dtypes = dict.fromkeys(models, "float32") | dict(dtypes or {})

    for done, length in enumerate(lengths):
        level = limit.choose(rows, length, len(lengths) - done) if prefill else "decode"
        for number, (name, checkpoint) in enumerate(opened.items()):
            if progress:
                job = done * len(models) + number
                progress(job, len(lengths) * len(models), f"{name} at {length}")
            row = row_if_too_large(checkpoint, length, batch, dtypes[name])
            if row is None and level == "nothing":
                row = unmeasured_row(checkpoint, length, batch)
            if row is None:
                reads = level == "all"
                row = run_worker(models[name], length, steps, batch, reads, dtypes[name])
            rows[name].append(row if seconds is None else extrapolate(row, rows[name]))
    return rows


def row_if_too_large(
    checkpoint: Checkpoint, length: int, batch: int, dtype: str = "float32"
) -> BenchRow | None:
    """The row of a model that does not fit into the machine's free memory; None when it fits.

    Always None with an accelerator: what its memory holds is not forecast here.
    """
    free = available_memory()
    if free is None or torch.cuda.is_available():
        return None
    row = unmeasured_row(checkpoint, length, batch)
    size = 2 if dtype in ("bfloat16", "float16") else 4  # int8 is loaded as float32
    weights = size * sum(lazy.size for lazy in checkpoint.tensors.values())
    return None if weights + row["state_bytes"] <= free[0] else row


def unmeasured_row(checkpoint: Checkpoint, length: int, batch: int) -> BenchRow:
    """A row with the bytes of the state, as forecast, and nothing measured."""
    from ..modeling.layer_kinds import layer_kinds, mixers_of, state_bytes

    state = {kind: batch * size for kind, size in state_bytes(checkpoint, length).items()}
    softmax_kinds = {
        kind
        for kind, spec in zip(layer_kinds(checkpoint), mixers_of(checkpoint), strict=True)
        if spec is None
    }
    kept = sum(size for kind, size in state.items() if kind in softmax_kinds)
    return {
        "length": length,
        "batch": batch,
        "decode_tok_s": None,
        "prefill_tok_s": None,
        "peak_bytes": None,
        "load_bytes": None,
        "state_bytes": sum(state.values()),
        "converted_bytes": sum(state.values()) - kept,
        "kept_bytes": kept,
        "extrapolated": [],
    }


def run_worker(
    path: str,
    length: int,
    steps: int,
    batch: int = 1,
    prefill: bool = True,
    dtype: str = "float32",
) -> BenchRow:
    """`measure` in a child process; errors as of `run_in_process`."""
    numbers = map(str, (length, steps, batch, int(prefill)))
    words = [path, dtype, *numbers]
    row: BenchRow = run_in_process(__name__, words, f"{path} at {length} tokens")
    return row


def run_in_process(module: str, words: Sequence[str], what: str) -> Any:
    """What a module of this package prints last, as JSON, when a child process runs it.

    Args:
        module: its full name.
        words: its arguments.
        what: is measured, for the message.

    RegraftError with the last line that the process wrote if it fails.
    """
    # The child must import this very package, wherever it was imported from.
    root = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=search),
    )

    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        last = lines[-1] if lines else f"killed by signal {-finished.returncode}"
        raise RegraftError(
            f"bench of {what} failed: {last}; try shorter --lengths or a smaller --batch"
        )
    return json.loads(finished.stdout.strip().splitlines()[-1])


def measure(
    path: str,
    length: int,
    steps: int,
    batch: int = 1,
    prefill: bool = True,
    dtype: str = "float32",
) -> BenchRow:
    """The row of one model at one length, measured in this process; see `bench`."""
    from .. import modeling
    from . import chunked

    torch.manual_seed(0)
    model: Any = modeling.load(path, modeling.parse_decoding_dtype(dtype))
    device = next(model.parameters()).device
    # Weights may be pages of a mapped file, which would count once for every tensor near them.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    reset_peak(device.type)
    loaded = peak_bytes(device.type)

    config = model.config.get_text_config()
    mixers = getattr(model.config, "mixers", None) or [None] * config.num_hidden_layers
    # Windows are full, as behind any long context: what is then written takes no new memory.
    tokens = [mixer_class(spec["name"]).softmax_tokens(spec) for spec in mixers if spec]
    read = length if prefill else min(length, max(tokens, default=0) + 1)
    ids = torch.randint(config.vocab_size, (batch, read), device=device)
    with torch.inference_mode():
        begin = time.perf_counter()
        logits, cache = chunked.last_logits(model, ids)
        synchronize(device.type)
        prefill_seconds = time.perf_counter() - begin

        if isinstance(model, modeling.RegraftForCausalLM):
            model.prepare_decoding(batch)
        extend_cache(cache, length - ids.shape[1])
        sizes = modeling.state_bytes(cache)  # by layer

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
        "prefill_tok_s": batch * length / prefill_seconds if prefill else None,
        "state_bytes": sum(sizes),
        "converted_bytes": converted,
        "kept_bytes": sum(sizes) - converted,
        "peak_bytes": peak_bytes(device.type),
        "load_bytes": loaded,
        "extrapolated": [],
    }


def extend_cache(cache: Any, tokens: int) -> None:
    """Make a cache as large as after `tokens` more positions, each a copy of its last one.

    For timing only: what is decoded afterwards means nothing.
    """
    from .. import modeling

    for layer in cache.layers if tokens else ():
        if isinstance(layer, modeling.MixerState):
            layer.cumulative_length += tokens  # its state does not grow
        else:
            # keys and values: (batch, heads, positions, dim)
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
    """Peak memory since `reset_peak`: the accelerator's where one is used, else resident memory.

    Where the peak could not be reset, that since the start of the process.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()

    # Linux's own high-water mark: getrusage gives the parent's peak to a child where it was higher.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: str) -> None:
    """Forget the peak of loading, where the system can."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


if __name__ == "__main__":
    file, kind = sys.argv[1:3]
    at, times, rows, reads = map(int, sys.argv[3:])
    print(json.dumps(measure(file, at, times, rows, bool(reads), kind)))
