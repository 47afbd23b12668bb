"""Text from a model, piece by piece, and the size of the state it decodes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from .. import modeling
from ..errors import RegraftError


@dataclass(frozen=True)
class Generation:
    """`text` without the prompt, tokens in and out, bytes of the converted and the kept layers' states at the end."""

    text: str
    prompt_tokens: int
    tokens: int
    converted_bytes: int
    kept_bytes: int

    def format_state_size(self) -> str:
        """One line: what the state holds after how many tokens."""
        seen = self.prompt_tokens + self.tokens
        return (
            f"state after {seen} tokens: {(self.converted_bytes + self.kept_bytes) / 2**20:.2f} MiB "
            f"({self.converted_bytes / 2**20:.2f} in converted layers, constant; "
            f"{self.kept_bytes / 2**20:.2f} in softmax layers, growing)"
        )


class CallbackStreamer(TextStreamer):
    """Hands finished pieces of text to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sink: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.sink = sink
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on and keep a piece."""
        self.pieces.append(text)
        if self.sink and text:
            self.sink(text)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    sink: Callable[[str], None] | None = None,
) -> Generation:
    """Continue `prompt` by up to `tokens` tokens; greedy at temperature 0, sampled otherwise.

    `chat` wraps the prompt in the tokenizer's chat template as a user's turn. Finished pieces of text go to `sink`.
    RegraftError for an empty prompt, a negative temperature or fewer than one token.
    """
    if tokens < 1 or temperature < 0:
        raise RegraftError(
            f"cannot generate {tokens} tokens at temperature {temperature}: ask for >= 1 and >= 0"
        )
    inputs = encode_prompt(tokenizer, prompt, chat).to(next(model.parameters()).device)
    streamer = CallbackStreamer(tokenizer, sink)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        streamer=streamer,
        pad_token_id=pad,
        return_dict_in_generate=True,
        **sampling,
    )
    sizes = modeling.state_bytes(modeling.cache_of(out))
    mixers = getattr(model.config, "mixers", None) or [None] * len(sizes)
    converted = sum(size for size, mixer in zip(sizes, mixers, strict=True) if mixer is not None)
    new = out.sequences.shape[1] - inputs.shape[1]
    return Generation(
        "".join(streamer.pieces), inputs.shape[1], new, converted, sum(sizes) - converted
    )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """prompt -> ids (1, time)."""
    if not prompt:
        raise RegraftError(f"the prompt is {prompt!r}: give at least one character to continue")
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    if tokenizer.chat_template is None:
        raise RegraftError(f"{tokenizer.name_or_path} has no chat template: leave out --chat")
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
