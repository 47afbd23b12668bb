"""Text from a model, piece by piece, and the size of its decoding state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache
from transformers.generation.streamers import TextStreamer

from .. import modeling
from ..core.shapes import Int
from ..errors import RegraftError, explain_errors
from ..mixers.registry import begins_with_bos
from .cache import CACHE
from .growing_cache import build_growing_cache
from .loading import bos_token_id
from .modeling_regraft import RegraftForCausalLM
from .packed_attention import packed_attention_in
from .speculative import Block, DraftModel, decoding_bytes

MANY = 64  # tokens, for which it pays to lay weights out first


@dataclass(frozen=True)
class Generation:
    """Generated text and what it took."""

    text: str  # without the prompt
    prompt_tokens: int
    tokens: int  # generated
    converted_bytes: int  # of the states of layers with a mixer, at the end
    kept_bytes: int  # of keys and values of softmax layers, at the end
    # What was drafted and accepted, where a source verified.
    blocks: tuple[Block, ...] = ()

    def format_state_size(self) -> str:
        """One line: the size of the state after how many tokens."""
        seen = self.prompt_tokens + self.tokens
        total = self.converted_bytes + self.kept_bytes
        return (
            f"state after {seen} tokens: {total / 2**20:.2f} MiB "
            f"({self.converted_bytes / 2**20:.2f} in converted layers, constant; "
            f"{self.kept_bytes / 2**20:.2f} in softmax layers, growing)"
        )

    def format_blocks(self) -> str:
        """One line: what a source made of the drafted blocks."""
        drafted = sum(block.drafted for block in self.blocks)
        accepted = sum(block.accepted for block in self.blocks)
        # The last token is the source's alone where no other could follow a drafted one.
        alone = self.tokens > accepted + len(self.blocks)
        steps = len(self.blocks) + alone
        return (
            f"verified: {self.tokens} tokens in {steps} steps of the source, "
            f"{self.tokens / steps:.1f} each; {accepted} of {drafted} drafted tokens accepted"
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
    source: PreTrainedModel | None = None,
) -> Generation:
    """Continue a prompt, which begins with the BOS token where a mixer is made for that.

    With a source the text is the source's: the model drafts blocks of tokens, which the source
    accepts or replaces (arXiv 2211.17192). Greedy text is what the source alone gives, but for
    ties within the rounding of its numbers; sampled text has the same distribution.

    Args:
        model: a causal language model; for many tokens the weights of a linearized one are laid out
            by its `prepare_decoding`.
        tokenizer: of the model.
        prompt: at least one character.
        tokens: how many to generate at most.
        temperature: 0 for greedy decoding, else of sampling from the top 95 %.
        seed: of the sampling.
        chat: wrap the prompt in the tokenizer's chat template, as a user's turn.
        sink: gets each finished piece of text.
        source: what verifies, a model with the same vocabulary; see `speculative.check_draft`.

    Raises RegraftError for an empty prompt, a negative temperature, fewer than one token, a chat
    without a template, or a source that cannot take tokens back.
    """
    if tokens < 1 or temperature < 0:
        raise RegraftError(
            f"cannot generate {tokens} tokens at temperature {temperature}: ask for >= 1 and >= 0"
        )

    inputs = encode_prompt(tokenizer, prompt, chat).to(next(model.parameters()).device)
    needs_bos = begins_with_bos(getattr(model.config, "mixers", None))
    if needs_bos and source is None:
        inputs = begin_with_bos(tokenizer, inputs)
    streamer = CallbackStreamer(tokenizer, sink)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95}

    # Without a padding token transformers warns and takes this one.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options = sampling | {"max_new_tokens": tokens, "streamer": streamer, "pad_token_id": pad}
    what = f"'{tokenizer.name_or_path}' cannot generate"
    with explain_errors(what, "check its generation_config.json"):
        if source is not None:
            bos = bos_token_id(tokenizer) if needs_bos else None
            return generate_verified(model, source, inputs, options, bos)
        if tokens >= MANY and isinstance(model, RegraftForCausalLM):
            model.prepare_decoding(len(inputs))
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            return_dict_in_generate=True,
            **options,
        )

    converted, kept = measure_state(model, modeling.cache_of(out))
    new = out.sequences.shape[1] - inputs.shape[1]
    return Generation("".join(streamer.pieces), inputs.shape[1], new, converted, kept)


def generate_verified(
    model: PreTrainedModel,
    source: PreTrainedModel,
    inputs: Int[torch.Tensor, "1 time"],
    options: dict[str, Any],
    bos: int | None = None,
) -> Generation:
    """Text of a source whose blocks a model drafts.

    Args:
        model: the draft.
        source: what verifies.
        inputs: tokens of the prompt.
        options: of transformers' `generate`, a `CallbackStreamer` among them.
        bos: a token that the draft alone reads before the prompt.

    Raises RegraftError when the source cannot take tokens back.
    """
    cache = build_growing_cache(source.config)
    draft = DraftModel(model, decoding_bytes(source), cache, bos)
    what = f"a {type(source).__name__} cannot verify"
    remedy = "give a source whose layers all keep keys and values"
    with packed_attention_in(source), explain_errors(what, remedy):
        out = source.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            assistant_model=draft,
            **{CACHE: cache},
            **options,
        )
    draft.learn(out)

    converted, kept = measure_state(model, draft.cache)
    kept += sum(modeling.state_bytes(cache))
    new, text = out.shape[1] - inputs.shape[1], "".join(options["streamer"].pieces)
    return Generation(text, inputs.shape[1], new, converted, kept, tuple(draft.blocks))


def measure_state(model: PreTrainedModel, cache: Cache) -> tuple[int, int]:
    """Bytes of a cache in layers with a mixer and in others."""
    sizes = modeling.state_bytes(cache)
    # A stock model has no mixers: all its layers keep keys and values.
    mixers = getattr(model.config, "mixers", None) or [None] * len(sizes)
    converted = sum(size for size, mixer in zip(sizes, mixers, strict=True) if mixer is not None)
    return converted, sum(sizes) - converted


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
