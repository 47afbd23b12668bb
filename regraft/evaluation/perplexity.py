"""Perplexity per token and per byte, and divergence from a teacher, over fixed windows of text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import RegraftError

Progress = Callable[[int, int], None]
SLICE = 256  # tokens whose full distributions are compared at once: bounds memory at SLICE x vocab numbers


@dataclass(frozen=True)
class Candidate:
    """A model to measure; `within` is entered around its forward passes (say, to force one branch)."""

    model: nn.Module
    within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@dataclass
class Score:
    """Sums over the predicted tokens: negative log likelihood and KL in nats, bytes of the windows' text."""

    nll: float = 0.0
    kl: float | None = None
    tokens: int = 0
    bytes: int = 0
    windows: list[float] = field(default_factory=list)

    def json(self) -> dict[str, float | int | None]:
        """`perplexity` per token, `byte_perplexity`, `bits_per_byte`, mean `kl` per token in nats, `tokens`, `windows`.

        `perplexity_error` is the standard error of log perplexity over windows (0.01 is 1 % of the perplexity).
        """
        bits = self.nll / self.bytes / math.log(2)
        many = len(self.windows) > 1
        spread = (
            torch.tensor(self.windows).std().item() / math.sqrt(len(self.windows)) if many else None
        )
        return {
            "perplexity": math.exp(self.nll / self.tokens),
            "perplexity_error": spread,
            "byte_perplexity": 2**bits,
            "bits_per_byte": bits,
            "kl": None if self.kl is None else self.kl / self.tokens,
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
    """Score every candidate on windows input_ids: (windows, length), whose texts have byte_counts: (windows,) bytes.

    The first token of a window is given, not predicted. With `teacher` naming a candidate, the others also get
    KL(teacher || candidate); the teacher's distributions are kept for one window only. `progress(done, total)` counts
    forward passes. RegraftError when there is no window.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] < 2:
        raise RegraftError(
            f"windows of shape {tuple(input_ids.shape)} leave nothing to predict: give longer text"
        )
    scores = {name: Score() for name in candidates}
    order = sorted(candidates, key=lambda name: name != teacher)
    done, total = 0, len(order) * len(input_ids)
    for row, size in zip(input_ids, byte_counts.tolist(), strict=True):
        reference: Tensor | None = None
        for name in order:
            logits = window_logits(candidates[name], row)
            reference = logits if name == teacher else reference
            add_window(
                scores[name], logits, row[1:], int(size), None if name == teacher else reference
            )
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
    """Add one window: logits and reference (tokens, vocab), targets (tokens,), `size` bytes of text."""
    nll = kl = 0.0
    for start in range(0, len(targets), SLICE):
        part = slice(start, start + SLICE)
        log_p = logits[part].float().log_softmax(-1)
        nll -= log_p.gather(1, targets[part, None].to(log_p.device)).sum().item()
        if reference is not None:
            log_t = reference[part].float().log_softmax(-1).to(log_p.device)
            kl += (log_t.exp() * (log_t - log_p)).sum().item()
    if not math.isfinite(nll):
        raise RegraftError(
            f"the model's likelihood is {nll}: its weights or activations are not finite"
        )
    score.nll, score.tokens, score.bytes = (
        score.nll + nll,
        score.tokens + len(targets),
        score.bytes + size,
    )
    score.windows.append(nll / len(targets))
    if reference is not None:
        score.kl = (score.kl or 0.0) + kl
