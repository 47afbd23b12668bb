"""Text from a model, piece by piece, and the size of its decoding state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from .. import modeling
from ..core.shapes import Int
from ..errors import RegraftError, explain_errors
from ..mixers.registry import begins_with_bos
from .loading import bos_token_id


@dataclass(frozen=True)
class Generation:
    """Generated text and what it took."""

    text: str  # without the prompt
    prompt_tokens: int
    tokens: int  # generated
    converted_bytes: int  # of the states of layers with a mixer, at the end
    kept_bytes: int  # of keys and values of softmax layers, at the end

    def format_state_size(self) -> str:
        """One line: the size of the state after how many tokens."""
        seen = self.prompt_tokens + self.tokens
        total = self.converted_bytes + self.kept_bytes
        return (
            f"state after {seen} tokens: {total / 2**20:.2f} MiB "
            f"({self.converted_bytes / 2**20:.2f} in converted layers, constant; "
            f"{self.kept_bytes / 2**20:.2f} in softmax layers, growing)"
        )


class CallbackStreamer(TextStreamer):
    """Passes finished pieces of text to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sink: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.sink = sink
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Record a piece and pass it on."""
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
    """Continue a prompt, which begins with the BOS token where a mixer is made for that.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        prompt: at least one character.
        tokens: how many to generate at most.
        temperature: 0 for greedy decoding, else of sampling from the top 95 %.
        seed: of the sampling.
        chat: wrap the prompt in the tokenizer's chat template, as a user's turn.
        sink: gets each finished piece of text.

    Raises RegraftError for an empty prompt, a negative temperature, fewer than one token, or a chat
    without a template.
    """
    if tokens < 1 or temperature < 0:
        raise RegraftError(
            f"cannot generate {tokens} tokens at temperature {temperature}: ask for >= 1 and >= 0"
        )

    inputs = encode_prompt(tokenizer, prompt, chat).to(next(model.parameters()).device)
    if begins_with_bos(getattr(model.config, "mixers", None)):
        inputs = begin_with_bos(tokenizer, inputs)
    streamer = CallbackStreamer(tokenizer, sink)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95}

    # Without a padding token transformers warns and takes this one.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    what = f"'{tokenizer.name_or_path}' cannot generate"
    with explain_errors(what, "check its generation_config.json"):
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            streamer=streamer,
            pad_token_id=pad,
            return_dict_in_generate=True,
            **sampling,
        )

    # A stock model has no mixers: all its layers keep keys and values.
    sizes = modeling.state_bytes(modeling.cache_of(out))
    mixers = getattr(model.config, "mixers", None) or [None] * len(sizes)
    converted = sum(size for size, mixer in zip(sizes, mixers, strict=True) if mixer is not None)
    new = out.sequences.shape[1] - inputs.shape[1]
    return Generation(
        "".join(streamer.pieces), inputs.shape[1], new, converted, sum(sizes) - converted
    )


def begin_with_bos(
    tokenizer: PreTrainedTokenizerBase, ids: Int[torch.Tensor, "1 time"]
) -> Int[torch.Tensor, "1 longer"]:
    """The tokens behind the BOS token, where the tokenizer did not put it there itself."""
    bos = bos_token_id(tokenizer)
    return ids if ids[0, 0] == bos else torch.cat((torch.full_like(ids[:, :1], bos), ids), 1)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool
) -> Int[torch.Tensor, "1 time"]:
    """Token ids of a prompt; errors as in `generate`."""
    if not prompt:
        raise RegraftError(f"the prompt is {prompt!r}: give at least one character to continue")
    if not chat:
        return tokenizer(prompt, return_tensors="pt").input_ids
    if tokenizer.chat_template is None:
        raise RegraftError(f"{tokenizer.name_or_path} has no chat template: leave out --chat")
    turns = [{"role": "user", "content": prompt}]
    what = f"the chat template of '{tokenizer.name_or_path}' cannot be used"
    with explain_errors(what, "leave out --chat"):
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
