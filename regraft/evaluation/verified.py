"""Speed and acceptance where a linearized model drafts and its source verifies.

Run as a module, this file measures one length, in a process of its own as `evaluation.bench` does.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..data.default_text import heldout_topics
from ..modeling import load, load_tokenizer, parse_decoding_dtype
from ..modeling.generate import Generation, generate_verified
from ..modeling.speculative import check_draft, share_weights
from .bench import peak_bytes, reset_peak, run_in_process, synchronize
from .rows import VerifiedRow


class BlockClock(BaseStreamer):
    """Notes when the prompt and each block of tokens came.

    Attributes:
        times: in seconds.
        ids: tokens of each.
        pieces: of text; none, as what reads it wants it there.
    """

    def __init__(self, device: str):
        self.device = device
        self.times: list[float] = []
        self.ids: list[list[int]] = []
        self.pieces: list[str] = []

    def put(self, value: Tensor) -> None:
        """A prompt or a block, ids of any shape."""
        synchronize(self.device)
        self.times.append(time.perf_counter())
        self.ids.append(value.flatten().tolist())

    def end(self) -> None:
        """Nothing more comes."""

    @property
    def tokens_per_second(self) -> float:
        """Behind the first block, whose time is that of reading the prompt."""
        return sum(map(len, self.ids[2:])) / (self.times[-1] - self.times[1])

    @property
    def text(self) -> list[int]:
        """All tokens behind the prompt."""
        return [token for block in self.ids[1:] for token in block]


def bench_verified(
    model: str,
    source: str,
    lengths: Sequence[int],
    steps: int,
    progress: Callable[[int, int, str], None] | None = None,
    dtype: str = "float32",
) -> list[VerifiedRow]:
    """Measure greedy text behind held-out documentation, by length of context.

    Args:
        model: path of the draft.
        source: path of what verifies.
        lengths: tokens of context.
        steps: a quarter of the tokens that are generated.
        progress: as of `bench`.
        dtype: of the draft's weights, a name that `parse_decoding_dtype` knows.

    RegraftError when a process fails.
    """
    rows: list[VerifiedRow] = []
    for done, length in enumerate(lengths):
        if progress:
            progress(done, len(lengths), f"verified at {length}")
        words = [model, source, dtype, str(length), str(4 * steps)]
        rows.append(run_in_process(__name__, words, f"{model} with {source} at {length} tokens"))
    return rows


def measure_verified(model: str, source: str, dtype: str, length: int, tokens: int) -> VerifiedRow:
    """The row of one length, measured in this process; see `bench_verified`."""
    student, teacher = load(model, parse_decoding_dtype(dtype)), load(source)
    tokenizer = load_tokenizer(source)
    check_draft((model, source), (student, teacher), (load_tokenizer(model), tokenizer))
    share_weights(student, teacher)
    device = next(teacher.parameters()).device.type
    reset_peak(device)
    loaded = peak_bytes(device)

    prompt = repeat_text("\n\n".join(heldout_topics()), tokenizer, length)
    result, clock = time_verified(student, teacher, prompt, tokens)
    return {
        "length": length,
        "batch": 1,
        "decode_tok_s": clock.tokens_per_second,
        "prefill_tok_s": length / (clock.times[1] - clock.times[0]),
        "state_bytes": result.converted_bytes + result.kept_bytes,
        "converted_bytes": result.converted_bytes,
        "kept_bytes": result.kept_bytes,
        "peak_bytes": peak_bytes(device),
        "load_bytes": loaded,
        "extrapolated": [],
        "tokens": result.tokens,
        "blocks": [asdict(block) for block in result.blocks],
    }


def time_verified(
    model: Any, source: Any, prompt: Tensor, tokens: int
) -> tuple[Generation, BlockClock]:
    """Greedy text of exactly `tokens` tokens behind a prompt (1, time), and when it came."""
    device = next(source.parameters()).device
    clock = BlockClock(device.type)
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    options |= {"streamer": clock, "pad_token_id": 0}
    return generate_verified(model, source, prompt.to(device), options), clock


def repeat_text(text: str, tokenizer: Any, length: int) -> Tensor:
    """The first tokens of a text, (1, length), which begins again where it ends."""
    ids = tokenizer(text, return_tensors="pt").input_ids
    return ids.repeat(1, -(-length // ids.shape[1]))[:, :length]


if __name__ == "__main__":
    torch.manual_seed(0)
    draft, verifies, kind = sys.argv[1:4]
    print(json.dumps(measure_verified(draft, verifies, kind, *map(int, sys.argv[4:]))))
