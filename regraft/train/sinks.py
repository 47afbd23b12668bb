"""The closed-form start of windows with a learned sink: what a text's first token does for softmax
attention, kept in a logit per head and in biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..errors import RegraftError
from ..mixers.sink_window import SinkWindow
from .hooks import LayerRecord

CANDIDATES, ROUNDS = 33, 4  # logits that are tried at once, and how often around the best

Batch = tuple[Tensor, Tensor, Tensor | None]  # input_ids, position_ids, segments: (batch, time)


class SinkFit(TypedDict, total=False):
    """What the closed form found for one layer; nothing where it left the layer as it was."""

    sink_share: float  # mean share of the first token beside the window
    sink_error: float  # root mean square, of the shares that the sinks give


def begin_rows(batches: list[Batch], config: Any) -> list[Batch]:
    """The batches with the token at the start of each row that texts begin with.

    It is the config's `bos_token_id`, put in the place of the row's own first token. Without one,
    rows stay as they are.

    Args:
        batches: for calibration.
        config: of the teacher.

    RegraftError when the config names none and rows begin with different tokens.
    """
    bos = getattr(config, "bos_token_id", None)
    if isinstance(bos, int):
        return [(begin_with(ids, bos), positions, segments) for ids, positions, segments in batches]
    found = torch.cat([ids[:, 0] for ids, _, _ in batches]).unique()
    if len(found) > 1:
        raise RegraftError(
            "sink_window keeps the value of the token that every text begins with: config.json has"
            f" no bos_token_id, and the texts begin with {len(found)} different tokens"
            f" ({', '.join(map(str, found[:3].tolist()))}): set bos_token_id and begin texts with"
            " it, or take --mixer window"
        )
    return batches


def begin_with(ids: Tensor, token: int) -> Tensor:
    """Rows of ids with another first token."""
    return torch.cat((torch.full_like(ids[:, :1], token), ids[:, 1:]), 1)


def find_starts(batch: Batch) -> Tensor:
    """(batch, time): in which column a token's document begins; -1 where it does not begin with
    the first token of the rows.
    """
    ids, _, segments = batch
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if segments is None:
        return torch.zeros_like(columns)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = columns.masked_fill(~is_first, 0).cummax(1).values
    return start.masked_fill(ids.gather(1, start) != ids[:, :1], -1)


@torch.no_grad()
def fit_sinks(
    mixer: SinkWindow,
    records: Sequence[LayerRecord],
    starts: Sequence[Tensor],
    reach: int | None,
) -> SinkFit:
    """Set the sinks and fold the first token's value into the biases.

    Beyond the window, softmax attention over the window and the first token gives that token the
    share p = e^z / (e^z + sum of the window), z its score. A head's sink is the number that gives
    the shares nearest to p in the mean square. Its output (1 - p) window + p v, v the value of the
    first token, is (1 - p) (window - v) + v: values lose v, outputs get it back.

    Args:
        mixer: as linearized, its projections still the teacher's.
        records: by batch, what the teacher's attention got.
        starts: by batch, as of `find_starts`.
        reach: tokens that the teacher's attention sees; None: all.

    Returns:
        What it found; nothing where the teacher sees no further than the window, which is exact,
        and where it has sinks of its own, which stay.

    RegraftError when no row is longer than the window.
    """
    window, attention = mixer.options.window, mixer.attention
    if attention.sinks or (reach is not None and reach <= window):
        return {}

    values, count, parts = torch.zeros(()), torch.zeros(()), []
    for record, start in zip(records, starts, strict=True):
        q, k, v = mixer.qkv(record.inputs)
        q, k = mixer.rotate(q, k, record.rotary)
        k = k.repeat_interleave(attention.group, 1)

        column = torch.arange(start.shape[1], device=start.device)
        begins = ((start == column) & (start >= 0)).to(v.dtype)  # (batch, time)
        values = values.to(v) + (v * begins[:, None, :, None]).sum((0, 2))
        count = count.to(v) + begins.sum()

        distance = column.unsqueeze(-1) - column
        scores = attention.scale_scores(q @ k.transpose(-1, -2), distance[None, None]).float()
        first = start.clamp(min=0)[:, None, :, None].expand(-1, scores.shape[1], -1, 1)
        near = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf).logsumexp(-1)
        position = column - start
        counted = (start >= 0) & (position >= window) & (position < (reach or len(column)))
        parts.append((scores.gather(-1, first).squeeze(-1), near, counted))

    # Tokens of all batches side by side, (heads, tokens).
    score, near = (
        torch.cat([part[index].transpose(0, 1).flatten(1) for part in parts], 1) for index in (0, 1)
    )
    counted = torch.cat([part[2].flatten() for part in parts])
    if not counted.any():
        longest = max(start.shape[1] for start in starts)
        raise RegraftError(
            f"rows of {longest} tokens have no text beyond a window of {window}, on which its sinks"
            f" are measured: give --length {4 * window} or longer documents, or a smaller --window"
        )
    sinks, error = solve_sinks(score, near, counted)
    fold_value(mixer, values / count, sinks)
    share = (score - near).sigmoid()[:, counted]
    return {"sink_share": float(share.mean()), "sink_error": float(error.mean().sqrt())}


def solve_sinks(score: Tensor, near: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """(the sink of each head, the mean square error of its shares), both (heads,).

    Args:
        score: of the first token by query, (heads, tokens).
        near: logarithm of the window's sum, (heads, tokens).
        counted: (tokens,) which queries count.
    """
    score, near = score[:, counted], near[:, counted]
    share = (score - near).sigmoid()
    # Shares grow with the sink, so the best one lies among the scores.
    low, high = score.amin(1), score.amax(1)
    steps = torch.linspace(0, 1, CANDIDATES, device=score.device)
    for _ in range(ROUNDS):
        tried = low[:, None] + (high - low)[:, None] * steps  # (heads, candidates)
        errors = torch.stack(
            [((one[:, None] - near).sigmoid() - share).square().mean(1) for one in tried.T], 1
        )
        least, best = errors.min(1)
        sinks, width = tried.gather(1, best[:, None])[:, 0], (high - low) / (CANDIDATES - 1)
        low, high = sinks - width, sinks + width
    return sinks, least


def fold_value(mixer: SinkWindow, value: Tensor, sinks: Tensor) -> None:
    """Give a mixer its sinks, and the first token's value (kv, dim) to its biases."""
    by_head = value.repeat_interleave(mixer.attention.group, 0).flatten()
    assert mixer.sinks is not None
    mixer.sinks.copy_(sinks)
    mixer.v_proj.bias.sub_(value.flatten())
    mixer.o_proj.bias.add_(mixer.o_proj.weight @ by_head)
