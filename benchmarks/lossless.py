"""Tokens per second of a source alone, of its linearized model, and of both where the model drafts
and the source verifies, with what is accepted by place in the block and by kind of text.

Claim: the same text, at 16,384 tokens of context at twice the source's speed, at 65,536 at three
times. Sources decode as transformers' `generate` does; `same cache` is the source with the cache
and the attention that verifying uses. All in one process on the same weights, in turn. Reading a
context of 65,536 tokens takes a processor tens of minutes, so lengths are given. Run:
python benchmarks/lossless.py SOURCE MODEL [--lengths 1024,4096] [--tokens 64] [--prompts 200] [--kinds documentation]
[--text name=file.jsonl] [--dtype int8] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regraft import modeling
from regraft.data.default_text import docstrings, heldout_topics
from regraft.evaluation.verified import BlockClock, repeat_text, time_verified
from regraft.modeling.growing_cache import build_growing_cache
from regraft.modeling.packed_attention import packed_attention_in
from regraft.modeling.speculative import check_draft, share_weights
from regraft.report.tables import acceptance_by_position

GOALS = {16384: 2.0, 65536: 3.0}  # times the source
PROMPT = 64  # tokens of each prompt whose text is compared


def texts(more: list[str]) -> dict[str, list[str]]:
    """Documents by kind: Python's documentation held out of training, docstrings, files."""
    found = {"documentation": heldout_topics(), "docstrings": docstrings()}
    for pair in more:
        name, _, file = pair.partition("=")
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        found[name] = [json.loads(line)["text"] for line in lines]
    return found


def time_alone(model: Any, prompt: Tensor, tokens: int, **options: Any) -> BlockClock:
    """Greedy text of one model, and when its tokens came."""
    clock = BlockClock(model.device.type)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        streamer=clock,
        pad_token_id=0,
        **options,
    )
    return clock


def measure(source: Any, model: Any, prompt: Tensor, tokens: int, kind: str) -> None:
    """One context: all speeds, and what was accepted."""
    length = prompt.shape[1]
    own = time_alone(source, prompt, tokens)
    with packed_attention_in(source):
        cache = {modeling.CACHE: build_growing_cache(source.config)}
        growing = time_alone(source, prompt, tokens, **cache).tokens_per_second
    student = time_alone(model, prompt, tokens).tokens_per_second
    result, clock = time_verified(model, source, prompt, tokens)
    alone, both = own.tokens_per_second, clock.tokens_per_second
    goal = f" (goal {GOALS[length]:g})" if length in GOALS else ""
    blocks = [vars(block) for block in result.blocks]
    places = [f"{yes / tried:.0%}" for yes, tried in acceptance_by_position(blocks) if tried]
    same = clock.text == own.text
    print(
        f"{kind} {length:,}: source {alone:.2f}, same cache {growing:.2f}, model {student:.2f},"
        f" verified {both:.2f} tokens/s, {both / alone:.2f} times the source{goal};"
        f" {result.format_blocks()}; by place {' '.join(places)}; text equal: {same}",
        flush=True,
    )


def compare(source: Any, model: Any, ids: Tensor, count: int, tokens: int) -> Counter[bool]:
    """Whether texts behind `count` prompts, spread evenly over tokens (time,), are equal."""
    found: Counter[bool] = Counter()
    step = max(1, (len(ids) - PROMPT) // count)
    for prompt in list(ids.unfold(0, PROMPT, step))[:count]:
        own = time_alone(source, prompt[None], tokens)
        found[time_verified(model, source, prompt[None], tokens)[1].text == own.text] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("model")
    parser.add_argument("--lengths", default="1024")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=0, help="texts to compare, of each kind")
    parser.add_argument("--kinds", help="names of texts, all by default")
    parser.add_argument("--text", action="append", default=[], help="name=file.jsonl")
    parser.add_argument("--dtype", default="float32", help="of the model's weights, such as int8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    source = modeling.load(given.source)
    model = modeling.load(given.model, modeling.parse_decoding_dtype(given.dtype))
    tokenizer = modeling.load_tokenizer(given.source)
    own = modeling.load_tokenizer(given.model)
    check_draft((given.model, given.source), (model, source), (own, tokenizer))
    shared, total = share_weights(model, source)
    print(f"{given.threads} threads; {shared / total:.1%} of {total / 1e6:.0f} MB held once")
    for kind, documents in texts(given.text).items():
        if given.kinds and kind not in given.kinds.split(","):
            continue
        text = "\n\n".join(documents)
        begin = time.perf_counter()
        for length in map(int, filter(None, given.lengths.split(","))):
            prompt = repeat_text(text, tokenizer, length)
            measure(source, model, prompt, given.tokens, kind)
        if given.prompts:
            ids = tokenizer(text[: 40 * PROMPT * given.prompts], return_tensors="pt").input_ids[0]
            found = compare(source, model, ids, given.prompts, 32)
            print(
                f"{kind}: {found[True]} of {sum(found.values())} texts equal (goal: all),"
                f" {time.perf_counter() - begin:.0f} s"
            )


if __name__ == "__main__":
    main()
