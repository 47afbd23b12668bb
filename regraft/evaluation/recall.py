"""Recall: what a model can repeat from a context that is longer than any window.

The contexts are made here. All contexts of one cell (kind and length) have the same number of
tokens, put together from pieces that are tokenized one by one, and every answer has as many tokens
as the other candidates; nothing is padded.
"""

from __future__ import annotations

import collections
import copy
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegraftError
from . import chunked
from .rows import RecallScore

CHOICES = 8  # answers a model chooses from: the right one and seven others
QUERIES = 8  # questions of associative recall, one after the other
SPACING = 32  # tokens of context for every pair of associative recall
DULL = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CITIES = (
    "Lisbon Oslo Cairo Lima Quito Hanoi Delhi Tokyo Paris London Berlin Madrid Rome Vienna Dublin "
    "Athens Boston Dallas Denver Miami Seoul Prague Warsaw Moscow Sydney Perth Havana Nairobi "
    "Dakar Tunis Ankara Baghdad"
).split()
ADJECTIVES = (
    "red blue green old new big small long short high low hot cold dark light fast slow rich poor "
    "young soft hard deep wide dry wet clean dirty early late empty full"
).split()
NOUNS = (
    "house river tree car dog cat book door road table chair window garden bridge ship horse bird "
    "fish stone wall hill field lake boat train clock lamp bread cup key coat hat"
).split()

Ids = list[int]


@dataclass(frozen=True)
class Round:
    """One question about every context.

    Attributes:
        query: tokens read after what came before, (items, query); may have none.
        candidates: possible answers, the right one first, (items, choices, answer).
    """

    query: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class RecallProbe:
    """The contexts of one cell and the questions about them.

    Attributes:
        context: (items, length).
        rounds: questions, each asked after the right answer to the one before.
    """

    context: Tensor
    rounds: list[Round]


class ProbeBuilder:
    """Pieces of text in tokens, and the random choices of one cell.

    Args:
        tokenizer: of the models that are measured.
        filler: text to hide things in.
        seed: of the choices.
    """

    def __init__(self, tokenizer: Any, filler: Sequence[str], seed: str):
        self.tokenizer, self.random = tokenizer, random.Random(seed)
        self.filler: Ids = [token for text in filler for token in self.encode(text)]
        self.dull = self.encode(DULL)

    def encode(self, text: str) -> Ids:
        """Tokens of a piece, without a start or end token."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def bos_ids(self) -> Ids:
        """The token that this tokenizer puts before a text, as a list; empty where it puts none."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []

    def encode_same_length(self, texts: Iterable[str]) -> list[Ids]:
        """Tokens of those texts that have the commonest number of tokens, without the others."""
        every = [self.encode(text) for text in dict.fromkeys(texts)]
        size = collections.Counter(map(len, every)).most_common(1)[0][0]
        return [ids for ids in every if len(ids) == size]

    def encode_answers(self, words: Iterable[object]) -> list[Ids]:
        """Answers as they follow a word, all of one length, so that their likelihoods compare.

        RegraftError when fewer than `CHOICES` have the commonest length.
        """
        answers = self.encode_same_length(f" {word}" for word in words)
        if len(answers) < CHOICES:
            raise RegraftError(
                f"recall needs {CHOICES} answers of one length and this tokenizer gives "
                f"{len(answers)}: it is not for English text"
            )
        return answers

    def sample_filler(self, tokens: int) -> Ids:
        """`tokens` tokens of the filler text from a random place on; at its end it starts again."""
        start = self.random.randrange(len(self.filler))
        return [self.filler[(start + offset) % len(self.filler)] for offset in range(tokens)]

    def filler_length(self, length: int, *pieces: Ids) -> int:
        """Tokens left for filler in a context of `length` with these pieces.

        RegraftError when the pieces alone are longer.
        """
        used = len(self.bos_ids()) + sum(map(len, pieces))
        if used > length:
            raise RegraftError(
                f"a recall context of {length} tokens is too short: this one needs {used} at least"
            )
        return length - used


# context; for each question its query and its candidates, the right one first
Item = tuple[Ids, list[tuple[Ids, list[Ids]]]]


def passkey(pieces: ProbeBuilder, length: int, depth: float) -> Item:
    """A five-digit key in dull text (Mohtashami and Jaggi, arXiv 2305.16300).

    Args:
        pieces: of the cell.
        length: tokens of the context.
        depth: where in the text the key is, 0 (start) to 1 (end).
    """
    numbers = pieces.random.sample(range(10000, 100000), 64)
    keys = pieces.random.sample(pieces.encode_answers(numbers), CHOICES)

    head = pieces.encode(
        "There is a pass key hidden in a lot of dull text. Find it and remember it."
    )
    note = [
        *pieces.encode(" The pass key is"),
        *keys[0],
        *pieces.encode(". Remember it. The pass key is"),
        *keys[0],
        *pieces.encode("."),
    ]
    end = pieces.encode(" What is the pass key? The pass key is")

    room = pieces.filler_length(length, head, note, end)
    dull = (pieces.dull * (room // len(pieces.dull) + 1))[:room]
    before = round(depth * room)
    context = [*pieces.bos_ids(), *head, *dull[:before], *note, *dull[before:], *end]
    return context, [([], keys)]  # the context ends with the question


def needle(pieces: ProbeBuilder, length: int, depth: float) -> Item:
    """Eight sentences of a city and its word in real text; one is asked for.

    All eight words are candidates, so that knowing the form of the sentences does not help.

    Args:
        pieces: of the cell.
        length: tokens of the context.
        depth: where in the text the sentence that is asked for is, 0 (start) to 1 (end). The others
            are at random places.
    """
    cities = pieces.random.sample(CITIES, CHOICES)
    words = pieces.random.sample(pieces.encode_answers(NOUNS), CHOICES)
    facts = [
        pieces.encode(f" The secret word of {city} is") + word + pieces.encode(".")
        for city, word in zip(cities, words, strict=True)
    ]
    end = pieces.encode(f"\n\nThe secret word of {cities[0]} is")

    room = pieces.filler_length(length, *facts, end)
    text = pieces.sample_filler(room)
    # positions in the text at which the sentences are put in, the first of which is asked for
    places = [round(depth * room), *(pieces.random.randrange(room + 1) for _ in facts[1:])]
    context, done = pieces.bos_ids(), 0
    for place, fact in sorted(zip(places, facts, strict=True)):
        context += text[done:place] + fact
        done = place
    return context + text[done:] + end, [([], words)]


def mqar(pieces: ProbeBuilder, length: int, depth: float) -> Item:
    """Multi-query associative recall (Zoology, arXiv 2312.04927), in words.

    The context has a pair of key and value for every 32 tokens, then real text. Eight keys are
    asked for in turn.

    Args:
        pieces: of the cell.
        length: tokens of the context.
        depth: not used: the keys that are asked for are drawn from all.
    """
    names = pieces.encode_same_length(
        f"\nThe {adjective} {noun} is in" for adjective in ADJECTIVES for noun in NOUNS
    )
    cities = pieces.encode_answers(CITIES)
    count = max(QUERIES, length // SPACING)
    if count > len(names):
        raise RegraftError(
            f"a recall context of {length} tokens needs {count} keys and there are {len(names)}"
        )

    # keys are distinct, values are not
    keys, values = pieces.random.sample(names, count), pieces.random.choices(cities, k=count)
    pairs = [token for key, value in zip(keys, values, strict=True) for token in key + value]
    text = pieces.sample_filler(pieces.filler_length(length, pairs))
    context = [*pieces.bos_ids(), *pairs, *text]

    rounds = []
    for number in pieces.random.sample(range(count), QUERIES):
        others = [city for city in cities if city != values[number]]
        rounds.append((keys[number], [values[number], *pieces.random.sample(others, CHOICES - 1)]))
    return context, rounds


KINDS: dict[str, Callable[[ProbeBuilder, int, float], Item]] = {
    "passkey": passkey,
    "needle": needle,
    "mqar": mqar,
}


def build_probe(
    kind: str, tokenizer: Any, filler: Sequence[str], length: int, items: int, seed: int = 0
) -> RecallProbe:
    """The contexts and questions of one cell; the same ones for the same arguments.

    Args:
        kind: one of `KINDS`.
        tokenizer: of the models that are measured.
        filler: text to hide things in.
        length: tokens of a context.
        items: contexts, their depths spread evenly.
        seed: of the random choices.

    RegraftError when `length` cannot hold the question, or `items` is less than one.
    """
    if items < 1:
        raise RegraftError(f"--limit {items} leaves nothing to recall: ask for one item at least")
    pieces = ProbeBuilder(tokenizer, filler, f"{kind} {length} {seed}")
    made = [KINDS[kind](pieces, length, (number + 0.5) / items) for number in range(items)]

    # from questions by item to items by question
    rounds = []
    for turn in zip(*(questions for _, questions in made), strict=True):
        query = torch.tensor([ids for ids, _ in turn], dtype=torch.long)
        rounds.append(Round(query, torch.tensor([candidates for _, candidates in turn])))
    return RecallProbe(torch.tensor([context for context, _ in made]), rounds)


def score(model: nn.Module, probe: RecallProbe, batch: int = 8) -> RecallScore:
    """How a model answers the questions of one cell.

    Args:
        model: a causal language model with a cache.
        probe: contexts and questions.
        batch: contexts read at a time.
    """
    ranks, exacts = [], []  # (items, questions) of each batch
    for start in range(0, len(probe.context), batch):
        part = slice(start, start + batch)
        batch_ranks, batch_exacts = [], []  # (items,) of each question
        for likelihood, is_greedy in score_answers(model, probe, part):
            # the right answer is the first candidate
            rank = 1 + (likelihood[:, 1:] >= likelihood[:, :1]).sum(1).double()
            batch_ranks.append(rank)
            batch_exacts.append(is_greedy.double())
        ranks.append(torch.stack(batch_ranks, 1))
        exacts.append(torch.stack(batch_exacts, 1))

    rank, exact = torch.cat(ranks), torch.cat(exacts)
    first = (rank == 1).double()
    # Questions about one context are not independent: errors are over contexts.
    return {
        "acc": first.mean().item(),
        "stderr": standard_error(first.mean(1)),
        "exact": exact.mean().item(),
        "exact_stderr": standard_error(exact.mean(1)),
        "rank": rank.mean().item(),
        "n": len(rank),
        "chance": 1 / CHOICES,
        "each": first.mean(1).tolist(),
    }


def score_answers(
    model: nn.Module, probe: RecallProbe, part: slice
) -> Iterable[tuple[Tensor, Tensor]]:
    """For every question the candidates' log-likelihoods, and whether greedy decoding is right.

    Args:
        model: a causal language model with a cache.
        probe: contexts and questions.
        part: which contexts.

    Returns (items, choices) and (items,) for each question.
    """
    unread, cache = probe.context[part], None
    for question in probe.rounds:
        ids = torch.cat([unread, question.query[part]], 1)
        logits, cache = chunked.last_logits(model, ids, cache)  # (items, vocab)

        likelihoods = []
        for number, answer in enumerate(question.candidates[part].unbind(1)):
            # The last logits predict an answer's first token. For the others its own tokens are
            # read, from a copy of the cache: each candidate follows the same context.
            steps = logits[:, None]
            if answer.shape[1] > 1:
                after, _ = next(
                    chunked.forward_in_chunks(model, answer[:, :-1], copy.deepcopy(cache))
                )
                steps = torch.cat([steps, after], 1)  # (items, answer, vocab)
            likelihoods.append(chunked.log_likelihoods(steps, answer).sum(1).cpu())
            if number == 0:
                is_greedy = (steps.argmax(-1).cpu() == answer).all(1)

        unread = question.candidates[part, 0]
        yield torch.stack(likelihoods, 1), is_greedy


def standard_error(values: Tensor) -> float | None:
    """Standard error of a mean; None for a single value."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
