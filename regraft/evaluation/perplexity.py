"""Perplexity per token and per byte, and divergence from a teacher, over fixed windows of text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import RegraftError
from .recall import standard_error
from .rows import PerplexityRow

Progress = Callable[[int, int], None]  # (forward passes done, all of them)
SLICE = 256  # tokens compared at once: bounds memory to SLICE x vocabulary numbers a distribution


@dataclass(frozen=True)
class Candidate:
    """A model to measure.

    Attributes:
        model: a causal language model.
        within: makes a context that is entered around forward passes, say to force one branch.
    """

    model: nn.Module
    within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@dataclass
class Score:
    """Sums over the predicted tokens of the windows measured so far.

    Attributes:
        nll: negative log-likelihood, in nats.
        kl: KL(teacher || model), in nats; None without a teacher.
        tokens: predicted tokens.
        bytes: UTF-8 bytes of the windows' text.
        windows: each window's mean negative log-likelihood per token.
        divergences: each window's mean KL per token, with a teacher.
    """

    nll: float = 0.0
    kl: float | None = None
    tokens: int = 0
    bytes: int = 0
    windows: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)

    def json(self) -> PerplexityRow:
        """The means as a row of a table."""
        bits = self.nll / self.bytes / math.log(2)
        return {
            "perplexity": math.exp(self.nll / self.tokens),
            # that of log perplexity: 0.01 is 1 % of the perplexity
            "perplexity_error": standard_error(torch.tensor(self.windows)),
            "byte_perplexity": 2**bits,
            "bits_per_byte": bits,
            "kl": None if self.kl is None else self.kl / self.tokens,
            "kl_error": standard_error(torch.tensor(self.divergences)),
            "tokens": self.tokens,
            "windows": len(self.windows),
        }


def measure(
    candidates: Mapping[str, Candidate],
    input_ids: Tensor,
    byte_counts: Tensor,
    teacher: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Score]:
    """Score every candidate on the same windows of text.

    The first token of a window is given, not predicted.

    Args:
        candidates: models by name.
        input_ids: (windows, length).
        byte_counts: UTF-8 bytes of each window's text, (windows,).
        teacher: the candidate whose distributions the others are compared with.
        progress: called after every forward pass.

    RegraftError when there is no window, or none with a token to predict.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] < 2:
        raise RegraftError(
            f"windows of shape {tuple(input_ids.shape)} leave nothing to predict: give longer text"
        )

    # Window by window, the teacher first: its distributions are kept for one window only.
    scores = {name: Score() for name in candidates}
    order = sorted(candidates, key=lambda name: name != teacher)
    done, total = 0, len(order) * len(input_ids)
    for row, size in zip(input_ids, byte_counts.tolist(), strict=True):
        teacher_logits: Tensor | None = None
        for name in order:
            logits = window_logits(candidates[name], row)
            if name == teacher:
                teacher_logits = logits
                add_window(scores[name], logits, row[1:], int(size), None)
            else:
                add_window(scores[name], logits, row[1:], int(size), teacher_logits)
            done += 1
            if progress:
                progress(done, total)
    return scores


@torch.no_grad()
def window_logits(candidate: Candidate, row: Tensor) -> Tensor:
    """row: (length,) -> logits (length - 1, vocab) that predict row[1:]."""
    device = next(candidate.model.parameters()).device
    with candidate.within():
        return candidate.model(row[None].to(device), use_cache=False).logits[0, :-1]


def add_window(
    score: Score, logits: Tensor, targets: Tensor, size: int, reference: Tensor | None
) -> None:
    """Add one window to a score.

    Args:
        score: gets the window's sums.
        logits: (tokens, vocab).
        targets: the tokens that come, (tokens,).
        size: UTF-8 bytes of the window's text.
        reference: the teacher's logits, (tokens, vocab) or of fewer tokens where the vocabulary
            grew; None leaves KL as it is.

    RegraftError when the likelihood is NaN or infinite.
    """
    nll = kl = 0.0
    for start in range(0, len(targets), SLICE):
        part = slice(start, start + SLICE)
        log_p = logits[part].float().log_softmax(-1)  # (SLICE, vocab)
        nll -= log_p.gather(1, targets[part, None].to(log_p.device)).sum().item()
        if reference is not None:
            log_t = reference[part].float().log_softmax(-1).to(log_p.device)
            # A grown vocabulary has tokens that the teacher never gives.
            log_p = log_p[:, : log_t.shape[-1]]
            kl += (log_t.exp() * (log_t - log_p)).sum().item()

    if not math.isfinite(nll):
        raise RegraftError(
            f"the model's likelihood is {nll}: its weights or activations are not finite"
        )
    score.nll += nll
    score.tokens += len(targets)
    score.bytes += size
    score.windows.append(nll / len(targets))
    if reference is not None:
        score.kl = (score.kl or 0.0) + kl
        score.divergences.append(kl / len(targets))
