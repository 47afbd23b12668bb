"""A linearized model drafts, its source verifies: text of the source, in fewer of its steps.

Speculative decoding (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318):
transformers' assisted generation verifies, and this module is the draft that it asks for blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.utils import ModelOutput

from ..core.shapes import Int
from ..errors import RegraftError
from ..mixers.int8 import Int8Linear
from .cache import cache_kwargs, cache_of, state_bytes

MOST = 16  # drafted tokens in a block
FEW = 8  # tokens read one by one: models of one token are faster than that of several
CHUNK = 1024  # tokens of a forward pass where many are read
BINS = 8  # of the draft's probabilities, for the chance that a token is accepted
MEMORY = 0.9  # weight of the last block but one, against the last, in the rate of decoding


@dataclass(frozen=True)
class Block:
    """Tokens that were drafted together, and how many of the first were accepted."""

    drafted: int
    accepted: int


@dataclass
class Pace:
    """When a block is long enough.

    One more token is drafted while the chance that it is accepted, over what drafting it costs, is
    above the rate of decoding so far: that is how a sum of gains over a sum of costs becomes
    largest. Costs are bytes read per token over those of the source, so that the blocks, and with
    them what is sampled, depend on no clock.

    Attributes:
        tried, accepted: drafted tokens by the probability that the draft gave them.
        tokens, cost: what blocks gave and took, in steps of the source; older ones count less.
    """

    tried: list[float] = field(default_factory=lambda: [0.0] * BINS)
    accepted: list[float] = field(default_factory=lambda: [0.0] * BINS)
    tokens: float = 1.0
    cost: float = 1.0

    def chance(self, probability: float) -> float:
        """That a token of this probability is accepted; before any was tried, the probability."""
        at = min(int(probability * BINS), BINS - 1)
        return (self.accepted[at] + 2 * probability) / (self.tried[at] + 2)

    def goes_on(self, survives: float, cost: float) -> bool:
        """Whether another token shall be drafted.

        Args:
            survives: chance that all tokens of the block so far are accepted.
            cost: of drafting one, in steps of the source.
        """
        mean = (sum(self.accepted) + 2) / (sum(self.tried) + 2)
        return survives * mean >= self.tokens / self.cost * cost

    def record(self, probabilities: Sequence[float], accepted: int, cost: float) -> None:
        """Learn from a block.

        Args:
            probabilities: that the draft gave its tokens.
            accepted: how many of the first.
            cost: of drafting one, in steps of the source.
        """
        for place, probability in enumerate(probabilities[: accepted + 1]):
            at = min(int(probability * BINS), BINS - 1)
            self.tried[at] += 1
            self.accepted[at] += place < accepted
        self.tokens = MEMORY * self.tokens + accepted + 1
        self.cost = MEMORY * self.cost + 1 + cost * len(probabilities)


class DraftModel:
    """What assisted generation calls its assistant: gives blocks of tokens to verify.

    The states of a linearized model are constant, and each step makes new ones: those before a
    drafted token are kept until it is accepted, so that taking tokens back computes nothing.

    Attributes:
        model: the linearized model.
        source_bytes: of weights that the source reads per step.
        source_cache: of the source.
        before: tokens that the draft alone reads before the text, (1, 0 or 1).
        cache: of the draft.
        blocks: verified so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source_bytes: int,
        source_cache: DynamicCache,
        bos: int | None = None,
    ):
        self.model, self.config, self.device = model, model.config, model.device
        # What transformers reads of an assistant: blocks as long as this class wants them.
        self.generation_config = GenerationConfig(
            num_assistant_tokens=MOST,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.source_bytes, self.source_cache = source_bytes, source_cache
        self.before = torch.tensor([[bos]] if bos is not None else [[]], dtype=torch.long)
        self.bytes = decoding_bytes(model)
        self.blocks: list[Block] = []
        self.pace = Pace()
        self.begun = 0  # tokens before the block that is out
        self.block: list[int] = []
        self.probabilities: list[float] = []
        self.cost = 1.0

    def _supports_logits_to_keep(self) -> bool:
        return False

    @torch.no_grad()
    def generate(
        self,
        input_ids: Int[Tensor, "1 time"],
        logits_processor: Any,
        max_new_tokens: int,
        generation_config: GenerationConfig,
        **others: Any,
    ) -> ModelOutput:
        """The next block, behind the text so far; arguments as of transformers' `generate`.

        Args:
            input_ids: the text, in which the block before is verified.
            logits_processor: what the source's logits go through too.
            max_new_tokens: in the block.
            generation_config: whether to sample, and what ends a text.
            others: masks and such, which a single row does not need.
        """
        self.learn(input_ids)
        logits = self.read(input_ids)
        self.begun, self.block, self.probabilities = input_ids.shape[1], [], []
        self.cost = self.relative_cost()
        ends = generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]

        process = LogitsProcessorList(logits_processor)
        scores, survives = [], 1.0
        while True:
            score = process(input_ids, logits.float())
            token, probability = choose(score, bool(generation_config.do_sample))
            scores.append(score)
            self.block.append(token)
            self.probabilities.append(probability)
            survives *= self.pace.chance(probability)
            input_ids = torch.cat((input_ids, input_ids.new_tensor([[token]])), 1)
            full = len(self.block) >= max_new_tokens or token in ends
            if full or not self.pace.goes_on(survives, self.cost):
                # No cache: this class takes its tokens back itself.
                return ModelOutput(sequences=input_ids, scores=tuple(scores), cache=None)
            logits = self.step(input_ids[:, -1:])

    def learn(self, ids: Int[Tensor, "1 time"]) -> None:
        """Record what became of the block that is out, and forget its wrong tokens.

        Args:
            ids: the text with what was accepted, at the end of generation too.
        """
        if not self.block:
            return
        text = ids[0, self.begun :].tolist()
        pairs = zip(self.block, text, strict=False)
        same = [drafted == verified for drafted, verified in pairs]
        accepted = same.index(False) if False in same else len(same)
        self.blocks.append(Block(len(self.block), accepted))
        # What lies behind the end of a text was neither accepted nor rejected.
        known = self.probabilities[: len(text)]
        self.pace.record(known, accepted, self.cost)

        right = min(self.cache.get_seq_length(), self.before.shape[1] + self.begun + accepted)
        self.cache.crop(right - self.cache.get_seq_length())
        self.block = []

    def read(self, ids: Int[Tensor, "1 time"]) -> Tensor:
        """Logits behind a text, (1, vocab), of which the first tokens were read before."""
        new = torch.cat((self.before.to(ids), ids), 1)[:, self.cache.get_seq_length() :]
        first = self.cache.get_seq_length() == 0
        for part in new.split(CHUNK if first or new.shape[1] > FEW else 1, 1):
            logits = self.step(part)
        if first:
            # From here: the prompt is never taken back.
            self.cache.activate_past_recording()
        return logits

    def step(self, ids: Int[Tensor, "1 time"]) -> Tensor:
        """Logits behind more tokens, (1, vocab)."""
        out = self.model(
            ids.to(self.device), **cache_kwargs(self.cache), use_cache=True, logits_to_keep=1
        )
        self.cache = cache_of(out)
        logits: Tensor = out.logits[:, -1]
        return logits

    def relative_cost(self) -> float:
        """Bytes that a step of the draft reads, over those of a step of the source."""
        own = self.bytes + sum(state_bytes(self.cache))
        return own / (self.source_bytes + sum(state_bytes(self.source_cache)))


def choose(score: Tensor, sample: bool) -> tuple[int, float]:
    """A token from its scores (1, vocab), and its probability."""
    probability = score.softmax(-1)
    token = torch.multinomial(probability, 1) if sample else probability.argmax(-1, keepdim=True)
    return int(token), float(probability.gather(1, token))


def decoding_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a step reads: all but rows of an embedding that is no output too."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    lookup = None if head is None or head.weight is embedding.weight else embedding.weight
    weights = [p for p in model.parameters() if p is not lookup]
    weights += [part.int8 for part in model.modules() if isinstance(part, Int8Linear)]
    return sum(part.numel() * part.element_size() for part in weights)


def share_weights(model: nn.Module, source: nn.Module) -> tuple[int, int]:
    """Let a model hold the source's tensors where its own are the same, bit for bit.

    Returns:
        bytes shared, and bytes of the model's weights.
    """
    known: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in source.parameters():
        known.setdefault(describe(parameter), []).append(parameter.data)

    shared = total = 0
    for parameter in model.parameters():
        size = parameter.numel() * parameter.element_size()
        total += size
        for other in known.get(describe(parameter), ()):
            if torch.equal(bits(parameter), bits(other)):
                parameter.data, shared = other, shared + size
                break
    return shared, total


def describe(tensor: Tensor) -> tuple[Any, ...]:
    """What equal tensors have in common: shape, type, place, and the first bytes."""
    first = bits(tensor).flatten()[:64].tolist()
    return tensor.shape, tensor.dtype, tensor.device, tuple(first)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, so that zeros of both signs differ and a NaN is itself."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def check_draft(
    names: tuple[str, str],
    models: tuple[PreTrainedModel, PreTrainedModel],
    tokenizers: tuple[Any, Any],
    text: str = "",
) -> None:
    """Raise RegraftError when one model cannot draft for another: their tokens differ.

    Args:
        names: of the draft and of the source, for the message.
        models: the draft and the source.
        tokenizers: theirs.
        text: what both shall split alike.
    """
    sizes = [one.config.get_text_config(decoder=True).vocab_size for one in models]
    words = [one.get_vocab() for one in tokenizers]
    ids = [list(one(text).input_ids) for one in tokenizers]
    if sizes[0] != sizes[1]:
        reason = f"have {sizes[0]} and {sizes[1]} tokens"
    elif words[0] != words[1]:
        word = min(set(words[0].items()) ^ set(words[1].items()))[0]
        reason = f"have other vocabularies, such as at {word!r:.40}"
    elif ids[0] != ids[1]:
        reason = f"split this text into {len(ids[0])} and {len(ids[1])} tokens"
    else:
        return
    raise RegraftError(
        f"'{names[0]}' cannot draft for '{names[1]}': they {reason}; give the model that it was "
        "made from"
    )
