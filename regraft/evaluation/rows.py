"""What evaluations write: the rows of eval.json and of `regraft eval --json`, key by key."""

from __future__ import annotations

from typing import Literal, TypedDict

Metric = Literal["acc", "acc_norm"]


class Difference(TypedDict):
    """How much higher the model scores than a baseline, over the same questions."""

    mean: float  # mean of the differences question by question
    stderr: float | None  # its standard error, None for a single question


class _Compared(TypedDict, total=False):
    difference: Difference  # in rows of baselines only


class _TaskCompared(_Compared, total=False):
    # above_chance as a share of the teacher's, None where the teacher is not above chance; there
    # only when a teacher was measured
    of_teacher: float | None


class TaskScore(_TaskCompared):
    """How a model does in one benchmark task."""

    metric: Metric  # the one that averages and tables use; never None
    acc: float | None  # share of right answers
    acc_norm: float | None  # the same with log-likelihoods divided by a choice's characters
    perplexity: float | None  # per answer, of tasks without choices
    n: int  # questions
    stderr: float | None  # standard error of `metric`
    chance: float  # `metric` of a model that guesses
    above_chance: float  # (metric - chance) / (1 - chance)
    each: list[int]  # 1 for each question that `metric` counts as right, else 0
    truncated: int  # answers whose context was cut on the left to fit


class RecallScore(_Compared):
    """How a model does in one kind of recall at one context length."""

    acc: float  # share of questions whose right answer is the likeliest candidate
    stderr: float | None  # standard error of `acc` over contexts
    exact: float  # share of questions whose greedy continuation is the right answer
    exact_stderr: float | None
    rank: float  # mean place of the right answer, from 1; ties count against it
    n: int  # contexts
    chance: float  # `acc` of a model that guesses
    each: list[float]  # `acc` of each context


# Perplexity of the tokens with `from` to `to` - 1 tokens of context before them. (In this form
# because `from` is a keyword of Python.)
PositionBucket = TypedDict(
    "PositionBucket",
    {
        "from": int,
        "to": int,
        "perplexity": float,
        "stderr": float | None,  # standard error of log perplexity over documents
        "tokens": int,
    },
)


class PerplexityRow(TypedDict):
    """How well a model predicts held-out windows of text."""

    perplexity: float  # per token
    perplexity_error: float | None  # standard error of log perplexity over windows
    byte_perplexity: float
    bits_per_byte: float
    kl: float | None  # mean KL(teacher || model) per token in nats
    kl_error: float | None  # standard error of `kl` over windows
    tokens: int  # predicted tokens
    windows: int


class Averages(TypedDict):
    """Means over benchmark tasks."""

    average: float  # of each task's `metric`
    average_above_chance: float  # of `above_chance`


class SuiteRow(TypedDict, total=False):
    """What a `Suite` measured of one model; a key is there when it was asked for."""

    tasks: dict[str, TaskScore]  # by name of the task
    average: float  # see Averages
    average_above_chance: float
    of_teacher: float | None  # average_above_chance as a share of the teacher's
    difference: Difference  # of the tasks' average, in rows of baselines only
    recall: dict[str, dict[str, RecallScore]]  # by kind and context length, such as "1024"
    positions: list[PositionBucket]


class QualityRow(PerplexityRow, SuiteRow):
    """Everything measured of one model, in the table of a run."""


class Evaluation(SuiteRow, total=False):
    """A model's own row and its baselines.

    Rows have the keys of a `PerplexityRow`, too, where perplexity was measured.
    """

    model: str  # its path
    baselines: dict[str, SuiteRow]  # by name, see `baselines.ROWS`


class BenchRow(TypedDict):
    """Speed and memory of a model at one context length.

    Speeds and bytes are those of all rows of the batch together. None: not measured.
    """

    length: int  # tokens of context
    batch: int  # rows decoded together
    decode_tok_s: float | None  # tokens per second
    prefill_tok_s: float | None
    state_bytes: int  # of the cache after `length` tokens
    converted_bytes: int  # the part of it that belongs to linearized layers
    kept_bytes: int  # the part of it that belongs to layers with softmax attention
    peak_bytes: int | None  # peak memory of the process, weights and interpreter included
    load_bytes: int | None  # the same before the first token
    extrapolated: list[str]  # speeds that follow from those at shorter contexts


class VerifiedRow(BenchRow):
    """A row of `bench` for two models: states are those of both."""

    tokens: int  # generated
    blocks: list[dict[str, int]]  # drafted and accepted tokens of each
