"""Speed of one-token steps and of reading a context beside the floor that memory sets.

Claim: a linearized model in regraft's own class decodes as fast as its teacher in the stock class
behind a short context, and faster the longer the context is. The floor of a step is the bytes of
weights and state that it reads over the bandwidth measured here; each figure stands beside it.

Run: python benchmarks/decode_speed.py TEACHER STUDENT [ALL_LINEAR] [--lengths 256,1024,4096,16384]
[--batch 1] [--threads 2] [--rounds 7] [--prefill 1024] [--dtype float32] [--operations]

All models are loaded at once and take turns, so that they share the machine's mood; ratios are
medians over rounds of one round's times. A context is read for its first 320 tokens and repeated
for the others, which decoding does not notice. Linearized models have their weights laid out by
`prepare_decoding` for one or two rows, and `teacher, laid out` is the stock class with its weights
in the same order and a cache that grows in place: what the layout alone does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import nn

from regraft import modeling
from regraft.evaluation import chunked
from regraft.evaluation.bench import extend_cache
from regraft.modeling.growing_cache import build_growing_cache
from regraft.modeling.modeling_regraft import FEW_ROWS
from regraft.modeling.speculative import decoding_bytes

# Tokens that are read: more than a window and its sinks, as behind any long context.
READ = 320
STEPS = 4
# Of the teacher's speed, by tokens of context: what a student shall reach at least.
DECODE_GOALS = {256: 1.0, 1024: 1.0, 4096: 1.5, 16384: 2.2}
PREFILL_GOALS = {1024: 1.0, 16384: 2.0}
LAID_OUT = "teacher, laid out"


def measure_bandwidth(megabytes: int = 400) -> float:
    """Bytes per second at which a large tensor is read, the best of some times."""
    data = torch.ones(megabytes * 250_000)
    times = []
    for _ in range(8):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return data.nbytes / min(times)


def load(path: str, dtype: torch.dtype) -> Any:
    """A model whose weights are no pages of a mapped file."""
    model = modeling.load(path, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def lay_out(model: Any) -> None:
    """What `prepare_decoding` does to layers that no mixer has, for a stock model."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features >= module.in_features:
            module.weight.data = module.weight.data.t().contiguous().t()


def start(name: str, model: Any, length: int, batch: int) -> list[Any]:
    """[last logits, cache] behind a context."""
    read = min(READ, length)
    ids = torch.randint(3, model.config.vocab_size, (batch, read))
    cache = build_growing_cache(model.config) if name == LAID_OUT else None
    logits, cache = chunked.last_logits(model, ids, cache)
    extend_cache(cache, length - read)
    return [logits, cache]


def time_steps(model: Any, at: list[Any]) -> float:
    """Seconds of a step; `at`, as of `start`, moves on."""
    begin = time.perf_counter()
    for _ in range(STEPS):
        at[:] = chunked.last_logits(model, at[0].argmax(-1, keepdim=True), at[1])
    return (time.perf_counter() - begin) / STEPS


def time_prefill(model: Any, length: int) -> float:
    """Seconds to read a context."""
    ids = torch.randint(3, model.config.vocab_size, (1, length))
    begin = time.perf_counter()
    chunked.last_logits(model, ids)
    return time.perf_counter() - begin


def print_decoding(models: dict[str, Any], length: int, given: Any, bandwidth: float) -> None:
    """One table of all models behind one context."""
    states = {name: start(name, model, length, given.batch) for name, model in models.items()}
    floors = {
        name: (decoding_bytes(model) + sum(modeling.state_bytes(states[name][1]))) / bandwidth
        for name, model in models.items()
    }
    rounds = [
        {name: time_steps(model, states[name]) for name, model in models.items()}
        for _ in range(given.rounds + 1)
    ][1:]
    for name, floor in floors.items():
        seconds = statistics.median(one[name] for one in rounds)
        ratio = statistics.median(one["teacher"] / one[name] for one in rounds)
        goal = DECODE_GOALS.get(length) if name in ("student", "all linear") else None
        print(
            f"decode {length:>6} x{given.batch}  {name:18} {1e3 * seconds:8.1f} ms"
            f"  floor {1e3 * floor:6.1f} ms  {seconds / floor:4.1f} x floor"
            f"  {ratio:5.2f} of the teacher{format_goal(ratio, goal)}",
            flush=True,
        )


def print_prefill(models: dict[str, Any], length: int, rounds: int) -> None:
    """Reading a context, all models in turn."""
    found = [
        {name: time_prefill(model, length) for name, model in models.items()} for _ in range(rounds)
    ]
    for name in models:
        seconds = statistics.median(one[name] for one in found)
        ratio = statistics.median(one["teacher"] / one[name] for one in found)
        goal = PREFILL_GOALS.get(length) if name != "teacher" else None
        print(
            f"prefill {length:>5} x1  {name:18} {seconds:8.2f} s  {ratio:5.2f} of the teacher"
            f"{format_goal(ratio, goal)}",
            flush=True,
        )


def format_goal(ratio: float, goal: float | None) -> str:
    """What the ratio shall be, and whether it is."""
    return "" if goal is None else f", goal {goal:g}: {'reached' if ratio >= goal else 'missed'}"


def print_operations(models: dict[str, Any], length: int, batch: int) -> None:
    """What each operation of a step takes, by PyTorch's profiler."""
    for name, model in models.items():
        at = start(name, model, length, batch)
        time_steps(model, at)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            time_steps(model, at)
        events = sorted(profile.key_averages(), key=lambda one: -one.self_cpu_time_total)
        total = sum(one.self_cpu_time_total for one in events)
        print(f"{name}: operations of a step behind {length} tokens")
        for one in events[:12]:
            share = one.self_cpu_time_total / total
            milliseconds = one.self_cpu_time_total / STEPS / 1e3
            print(
                f"  {one.key:44} {milliseconds:7.2f} ms {share:6.1%} {one.count // STEPS:5} calls"
            )


@torch.inference_mode()
def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("all_linear", nargs="?")
    parser.add_argument("--lengths", default="256,1024,4096,16384")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", default="", help="contexts to read, such as 1024,16384")
    parser.add_argument("--dtype", default="float32", help="of linearized models")
    parser.add_argument("--operations", action="store_true", help="profile the first length")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)

    bandwidth = measure_bandwidth()
    print(f"{given.threads} threads read {bandwidth / 1e9:.1f} GB/s")
    dtype = getattr(torch, given.dtype)
    models = {"teacher": load(given.teacher, torch.float32), "student": load(given.student, dtype)}
    if given.all_linear:
        models["all linear"] = load(given.all_linear, dtype)
    for length in [int(text) for text in given.prefill.split(",") if text]:
        print_prefill(models, length, given.rounds)

    for name in [name for name in models if name != "teacher"]:
        models[name].prepare_decoding(given.batch)
    models[LAID_OUT] = load(given.teacher, torch.float32)
    if given.batch <= FEW_ROWS:
        lay_out(models[LAID_OUT])
    lengths = [int(text) for text in given.lengths.split(",") if text]
    if given.operations:
        print_operations(models, lengths[0], given.batch)
    for length in lengths:
        print_decoding(models, length, given, bandwidth)


if __name__ == "__main__":
    main()
