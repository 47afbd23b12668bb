"""Recall made on the fly: what a model can say back from a context longer than any window.

Every context of one cell has exactly the same number of tokens, put together from pieces tokenized one by one, and
every answer as many tokens as its alternatives; nothing is padded.
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

CHOICES = 8  # answers a model chooses from: the right one and seven others
QUERIES = 8  # asked one after the other in associative recall
SPACING = 32  # tokens of context for every pair of associative recall
DULL = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
CITIES = (
    "Lisbon Oslo Cairo Lima Quito Hanoi Delhi Tokyo Paris London Berlin Madrid Rome Vienna Dublin Athens Boston Dallas "
    "Denver Miami Seoul Prague Warsaw Moscow Sydney Perth Havana Nairobi Dakar Tunis Ankara Baghdad"
).split()
ADJECTIVES = (
    "red blue green old new big small long short high low hot cold dark light fast slow rich poor young soft hard deep "
    "wide dry wet clean dirty early late empty full"
).split()
NOUNS = (
    "house river tree car dog cat book door road table chair window garden bridge ship horse bird fish stone wall hill "
    "field lake boat train clock lamp bread cup key coat hat"
).split()

Ids = list[int]


@dataclass(frozen=True)
class Round:
    """One question: query (items, q) read after what came before; candidates (items, choices, n), right one first."""

    query: Tensor
    candidates: Tensor


@dataclass(frozen=True)
class RecallProbe:
    """Contexts (items, length) and the questions asked after them, each after the right answer to the one before."""

    context: Tensor
    rounds: list[Round]


class ProbeBuilder:
    """Token pieces of one tokenizer, and the random choices of one cell."""

    def __init__(self, tokenizer: Any, filler: Sequence[str], seed: str):
        self.tokenizer, self.random = tokenizer, random.Random(seed)
        self.filler: Ids = [token for text in filler for token in self.encode(text)]
        self.dull = self.encode(DULL)

    def encode(self, text: str) -> Ids:
        """Tokens of a piece, without a start or end of text."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def bos_ids(self) -> Ids:
        """The token that this tokenizer puts before a text, if it has one."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("a")["input_ids"][0] == bos else []

    def encode_same_length(self, texts: Iterable[str]) -> list[Ids]:
        """Tokens of those texts that have the commonest number of tokens."""
        every = [self.encode(text) for text in dict.fromkeys(texts)]
        size = collections.Counter(map(len, every)).most_common(1)[0][0]
        return [ids for ids in every if len(ids) == size]

    def encode_answers(self, words: Iterable[object]) -> list[Ids]:
        """Answers as they follow a word, all of one length, so that candidates compare; RegraftError for too few."""
        found = self.encode_same_length(f" {word}" for word in words)
        if len(found) < CHOICES:
            raise RegraftError(
                f"recall needs {CHOICES} answers of one length and this tokenizer gives {len(found)}: it is not for "
                "English text"
            )
        return found

    def sample_filler(self, tokens: int) -> Ids:
        """A stretch of the filler text, from the start again when it ends."""
        start = self.random.randrange(len(self.filler))
        return [self.filler[(start + offset) % len(self.filler)] for offset in range(tokens)]

    def filler_length(self, length: int, *pieces: Ids) -> int:
        """Tokens left for filler in a context of `length`; RegraftError when there are none."""
        used = len(self.bos_ids()) + sum(map(len, pieces))
        if used > length:
            raise RegraftError(
                f"a recall context of {length} tokens is too short: this one needs {used} at least"
            )
        return length - used


Item = tuple[Ids, list[tuple[Ids, list[Ids]]]]  # context; per question its query and candidates


def passkey(pieces: ProbeBuilder, length: int, depth: float) -> Item:
    """A five-digit key at `depth` (0 to 1) of dull text (Mohtashami and Jaggi, arXiv 2305.16300)."""
    keys = pieces.random.sample(
        pieces.encode_answers(pieces.random.sample(range(10000, 100000), 64)), CHOICES
    )
    head = pieces.encode(
        "There is a pass key hidden in a lot of dull text. Find it and remember it."
    )
    note = (
        pieces.encode(" The pass key is")
        + keys[0]
        + pieces.encode(". Remember it. The pass key is")
        + keys[0]
    )
    note += pieces.encode(".")
    end = pieces.encode(" What is the pass key? The pass key is")
    room = pieces.filler_length(length, head, note, end)
    dull = (pieces.dull * (room // len(pieces.dull) + 1))[:room]
    before = round(depth * room)
    return [*pieces.bos_ids(), *head, *dull[:before], *note, *dull[before:], *end], [([], keys)]


def needle(pieces: ProbeBuilder, length: int, depth: float) -> Item:
    """Eight sentences of a city and its word in real text; the one at `depth` is asked for among all eight words."""
    cities = pieces.random.sample(CITIES, CHOICES)
    words = pieces.random.sample(pieces.encode_answers(NOUNS), CHOICES)
    facts = [
        pieces.encode(f" The secret word of {city} is") + word + pieces.encode(".")
        for city, word in zip(cities, words, strict=True)
    ]
    end = pieces.encode(f"\n\nThe secret word of {cities[0]} is")
    room = pieces.filler_length(length, *facts, end)
    text = pieces.sample_filler(room)
    places = [round(depth * room), *(pieces.random.randrange(room + 1) for _ in facts[1:])]
    context, done = pieces.bos_ids(), 0
    for place, fact in sorted(zip(places, facts, strict=True)):
        context += text[done:place] + fact
        done = place
    return context + text[done:] + end, [([], words)]


def mqar(pieces: ProbeBuilder, length: int, depth: float) -> Item:
    """Multi-query associative recall (Zoology, arXiv 2312.04927) in words: a pair for every 32 tokens of the context,
    real text after the pairs, then eight keys asked for in turn, drawn from all of them whatever `depth` is."""
    names = pieces.encode_same_length(
        f"\nThe {adjective} {noun} is in" for adjective in ADJECTIVES for noun in NOUNS
    )
    cities = pieces.encode_answers(CITIES)
    count = max(QUERIES, length // SPACING)
    if count > len(names):
        raise RegraftError(
            f"a recall context of {length} tokens needs {count} keys and there are {len(names)}"
        )
    keys, values = pieces.random.sample(names, count), pieces.random.choices(cities, k=count)
    pairs = [token for key, value in zip(keys, values, strict=True) for token in key + value]
    context = [
        *pieces.bos_ids(),
        *pairs,
        *pieces.sample_filler(pieces.filler_length(length, pairs)),
    ]
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
    """`items` contexts of `length` tokens of one kind, the same ones for the same arguments; depths evenly spread.

    RegraftError when `length` cannot hold the question or there is no item to make.
    """
    if items < 1:
        raise RegraftError(f"--limit {items} leaves nothing to recall: ask for one item at least")
    pieces = ProbeBuilder(tokenizer, filler, f"{kind} {length} {seed}")
    made = [KINDS[kind](pieces, length, (number + 0.5) / items) for number in range(items)]
    rounds = [
        Round(
            torch.tensor([query for query, _ in turn], dtype=torch.long),
            torch.tensor([c for _, c in turn]),
        )
        for turn in zip(*(asked for _, asked in made), strict=True)
    ]
    return RecallProbe(torch.tensor([context for context, _ in made]), rounds)


def score(model: nn.Module, probe: RecallProbe, batch: int = 8) -> dict[str, Any]:
    """`acc`: the right answer is the likeliest of the candidates; `exact`: the greedy continuation is the right answer;
    `rank`: mean place of the right answer, from 1, ties against it. `n` contexts, `each` one's `acc`; standard errors
    over them."""
    ranks, greedy = [], []
    for start in range(0, len(probe.context), batch):
        part = slice(start, start + batch)
        for likelihood, right in score_answers(model, probe, part):
            ranks.append(1 + (likelihood[:, 1:] >= likelihood[:, :1]).sum(1).double())
            greedy.append(right.double())
    turns = len(probe.rounds)
    rank, exact = (
        torch.cat([torch.stack(values[i : i + turns], 1) for i in range(0, len(values), turns)])
        for values in (ranks, greedy)
    )
    first = (rank == 1).double()
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
    """For every question: log-likelihood of every candidate (rows, choices), and whether greedy decoding gives the
    right one (rows,)."""
    told, cache = probe.context[part], None
    for asked in probe.rounds:
        logits, cache = chunked.last_logits(model, torch.cat([told, asked.query[part]], 1), cache)
        likelihoods = []
        for number, ids in enumerate(asked.candidates[part].unbind(1)):
            steps = logits[:, None]
            if ids.shape[1] > 1:
                more, _ = next(chunked.forward_in_chunks(model, ids[:, :-1], copy.deepcopy(cache)))
                steps = torch.cat([steps, more], 1)
            likelihoods.append(chunked.log_likelihoods(steps, ids).sum(1).cpu())
            if number == 0:
                right = (steps.argmax(-1).cpu() == ids).all(1)
        told = asked.candidates[part, 0]
        yield torch.stack(likelihoods, 1), right


def standard_error(values: Tensor) -> float | None:
    """Standard error of a mean."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
