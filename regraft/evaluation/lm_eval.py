"""Benchmark questions through lm-evaluation-harness, which scores choices by log-likelihood."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import RegraftError
from . import chunked
from .perplexity import Candidate
from .rows import TaskScore
from .tasks import Question, Task

# The harness's names for what is computed of the answers.
ACC, ACC_NORM = (
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm")
)
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
Pair = tuple[tuple[int, ...], list[int]]  # token ids of a context and of an answer to it


def check_installed() -> None:
    """RegraftError with the command that installs lm-evaluation-harness when it is missing."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:
        raise RegraftError(
            f"benchmark tasks need {error.name}, which is not installed: pip install "
            "'regraft[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def language_model(candidate: Candidate, tokenizer: Any, batch: int) -> Any:
    """The harness's view of a model in memory.

    The harness tokenizes and says how long a context may be; log-likelihoods are computed here, see
    `answer_log_likelihoods`.

    Args:
        candidate: the model.
        tokenizer: its tokenizer.
        batch: answers read at a time.
    """
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """Without progress bars; counts the requests whose context had to be cut to fit."""

        cut = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, *args: Any, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = []
            for _, context, answer in requests:
                # on the left, as the harness does; the answer's last token is only predicted
                room = max(self.max_length + 1 - len(answer), 1)
                self.cut += len(context) > room
                pairs.append((tuple(context[-room:]), answer))
            return answer_log_likelihoods(self.model, pairs, batch)

    return Model(
        pretrained=candidate.model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch,
        trust_remote_code=False,
    )


def answer_log_likelihoods(
    model: nn.Module, pairs: Sequence[Pair], batch: int
) -> list[tuple[float, bool]]:
    """For every pair: log p(answer | context), and whether greedy decoding gives the answer.

    A context is read once for all its answers, which continue from the cache.

    Args:
        model: a causal language model with a cache.
        pairs: contexts and answers.
        batch: answers read at a time. Those of a batch have contexts of the same length, so that
            nothing before an answer is padding.
    """
    # Long contexts first, so that too large a batch fails at once; equal contexts side by side.
    order = sorted(
        range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], len(pairs[i][1]))
    )
    found: dict[int, tuple[float, bool]] = {}
    for _, same_length in itertools.groupby(order, key=lambda i: len(pairs[i][0])):
        while rows := list(itertools.islice(same_length, batch)):
            scores = batch_log_likelihoods(model, [pairs[i] for i in rows])
            found |= dict(zip(rows, scores, strict=True))
    return [found[i] for i in range(len(pairs))]


def batch_log_likelihoods(model: nn.Module, pairs: Sequence[Pair]) -> Iterator[tuple[float, bool]]:
    """`answer_log_likelihoods` of one batch, whose contexts have one length."""
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    which = torch.tensor([contexts.index(context) for context, _ in pairs])
    answers = nn.utils.rnn.pad_sequence(
        [torch.tensor(answer) for _, answer in pairs], batch_first=True
    )  # (answers, time), padded behind the answers

    # The context's last logits predict an answer's first token; the answer's own tokens but the
    # last predict the others.
    logits, cache = chunked.last_logits(model, torch.tensor(contexts))
    steps = logits[which.to(logits.device), None]  # (answers, 1, vocab)
    if answers.shape[1] > 1:
        cache.batch_select_indices(which.to(logits.device))
        more = chunked.forward_in_chunks(model, answers[:, :-1], cache)
        steps = torch.cat([steps, *(chunk for chunk, _ in more)], 1)  # (answers, time, vocab)

    every, greedy = chunked.log_likelihoods(steps, answers), steps.argmax(-1).cpu() == answers
    for row, (_, answer) in enumerate(pairs):
        yield every[row, : len(answer)].sum().item(), bool(greedy[row, : len(answer)].all())


def build_task(name: str, questions: Sequence[Question]) -> Any:
    """The harness's task of these questions, which are all of one form."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    several_contexts = len(questions[0].contexts) > 1

    rows = []
    context: int | str
    target: int | str
    for q in questions:
        if several_contexts:
            # The harness scores "multiple_choice" with several contexts when doc_to_text gives the
            # number of the right one, and doc_to_target the continuation of all.
            context, choices, target = q.gold, q.contexts, q.choices[0]
        else:
            target = q.gold if q.alternatives else f" {q.choices[0]}"
            context, choices = q.contexts[0], q.choices
        rows.append({"context": context, "choices": list(choices), "target": target})

    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_target": "target",
    }
    if questions[0].alternatives:
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            # one continuation for all contexts: nothing to divide by its length
            "metric_list": [ACC] if several_contexts else [ACC, ACC_NORM],
        }
    else:
        config |= {"output_type": "loglikelihood", "metric_list": [PERPLEXITY, ACC]}
    return ConfigurableTask(config=config)


def score(model: Any, task: Task, name: str, questions: Sequence[Question]) -> TaskScore:
    """How a model answers the questions of a task.

    Args:
        model: what `language_model` gave.
        task: says which metric counts.
        name: of the task, for the harness.
        questions: of the task.
    """
    from lm_eval.evaluator import evaluate

    model.cut = 0
    with contextlib.redirect_stdout(None):  # standard output is for --json
        found = evaluate(
            model,
            {"tasks": {name: build_task(name, questions)}},
            bootstrap_iters=0,
            log_samples=True,
        )

    # The harness's keys are "acc,none": metric and filter.
    results = {key.partition(",")[0]: value for key, value in found["results"][name].items()}
    n, chance = len(questions), sum(q.chance for q in questions) / len(questions)
    value = results[task.metric]
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return {
        "metric": task.metric,
        "acc": results.get("acc"),
        "acc_norm": results.get("acc_norm"),
        "perplexity": results.get("perplexity"),
        "n": n,
        # of a share of right answers: p (1 - p) / (n - 1) is its variance
        "stderr": math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None,
        "chance": chance,
        "above_chance": (value - chance) / (1 - chance),
        "each": [int(sample[task.metric]) for sample in samples],
        "truncated": model.cut,
    }
