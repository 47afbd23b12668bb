"""Questions through lm-evaluation-harness, which scores choices by their log-likelihood."""

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
from .tasks import Question, Task

ACC, ACC_NORM = (
    {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm")
)
PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}


def check_installed() -> None:
    """RegraftError with the command that installs lm-evaluation-harness when it is missing."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ModuleNotFoundError as error:
        raise RegraftError(
            f"benchmark tasks need {error.name}, which is not installed: pip install 'regraft[eval]'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def language_model(candidate: Candidate, tokenizer: Any, batch: int) -> Any:
    """The harness's view of a model in memory: its tokenization and lengths, `likelihoods` for the scores."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        """Without bars of its own; counts the requests that had to be cut on the left to fit."""

        cut = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, *args: Any, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = []
            for _, context, answer in requests:
                room = max(self.max_length + 1 - len(answer), 1)
                self.cut += len(context) > room
                pairs.append((tuple(context[-room:]), answer))
            return answer_log_likelihoods(self.model, pairs, batch)

    return Model(
        pretrained=candidate.model, tokenizer=tokenizer, backend="causal", batch_size=batch
    )


def answer_log_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[tuple[int, ...], list[int]]], batch: int
) -> list[tuple[float, bool]]:
    """For every (context, answer) of token ids: log p(answer | context), and whether greedy text is the answer.

    A context is read once for all its answers, which go on from the cache, in batches of `batch` answers whose contexts
    have the same length: nothing before an answer is padding.
    """
    found: dict[int, tuple[float, bool]] = {}
    order = sorted(
        range(len(pairs)), key=lambda i: (-len(pairs[i][0]), pairs[i][0], len(pairs[i][1]))
    )
    for _, alike in itertools.groupby(order, key=lambda i: len(pairs[i][0])):
        while rows := list(itertools.islice(alike, batch)):
            found |= dict(
                zip(rows, batch_log_likelihoods(model, [pairs[i] for i in rows]), strict=True)
            )
    return [found[i] for i in range(len(pairs))]


def batch_log_likelihoods(
    model: nn.Module, pairs: Sequence[tuple[tuple[int, ...], list[int]]]
) -> Iterator[tuple[float, bool]]:
    """`likelihoods` of one batch, whose contexts have one length."""
    contexts = list(dict.fromkeys(context for context, _ in pairs))
    which = torch.tensor([contexts.index(context) for context, _ in pairs])
    answers = nn.utils.rnn.pad_sequence(
        [torch.tensor(answer) for _, answer in pairs], batch_first=True
    )
    logits, cache = chunked.last_logits(model, torch.tensor(contexts))
    steps = logits[which.to(logits.device), None]
    if answers.shape[1] > 1:
        cache.batch_select_indices(which.to(logits.device))
        steps = torch.cat(
            [
                steps,
                *(more for more, _ in chunked.forward_in_chunks(model, answers[:, :-1], cache)),
            ],
            1,
        )
    every, greedy = chunked.log_likelihoods(steps, answers), steps.argmax(-1).cpu() == answers
    for row, (_, answer) in enumerate(pairs):
        yield every[row, : len(answer)].sum().item(), bool(greedy[row, : len(answer)].all())


def build_task(name: str, questions: Sequence[Question]) -> Any:
    """The harness's task of these questions, which are all of one form."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    several = len(questions[0].contexts) > 1
    rows = [
        {
            "context": q.gold if several else q.contexts[0],
            "choices": list(q.contexts if several else q.choices),
            "target": q.choices[0] if several else q.gold if q.alternatives else f" {q.choices[0]}",
        }
        for q in questions
    ]
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_target": "target",
    }
    if questions[0].alternatives:
        metrics = [ACC] if several else [ACC, ACC_NORM]
        config |= {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "metric_list": metrics,
        }
    else:
        config |= {"output_type": "loglikelihood", "metric_list": [PERPLEXITY, ACC]}
    return ConfigurableTask(config=config)


def score(model: Any, task: Task, name: str, questions: Sequence[Question]) -> dict[str, Any]:
    """`acc, acc_norm, perplexity` (None where a task has none), `n`, `stderr, chance, above_chance` of `metric`.

    `model` is a `language_model`. `acc_norm` divides a choice's log-likelihood by its characters; `above_chance` is
    (metric - chance) / (1 - chance); `each` is 1 for every question that `metric` counts as right and 0 for the others;
    `truncated` counts continuations whose context was cut on the left to fit.
    """
    from lm_eval.evaluator import evaluate

    model.cut = 0
    with contextlib.redirect_stdout(None):
        found = evaluate(
            model,
            {"tasks": {name: build_task(name, questions)}},
            bootstrap_iters=0,
            log_samples=True,
        )
    results = {key.partition(",")[0]: value for key, value in found["results"][name].items()}
    n, chance = len(questions), sum(q.chance for q in questions) / len(questions)
    value = results[task.metric]
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return {
        "metric": task.metric,
        **{key: results.get(key) for key in ("acc", "acc_norm", "perplexity")},
        "n": n,
        "stderr": math.sqrt(value * (1 - value) / (n - 1)) if n > 1 else None,
        "chance": chance,
        "above_chance": (value - chance) / (1 - chance),
        "each": [int(sample[task.metric]) for sample in samples],
        "truncated": model.cut,
    }
