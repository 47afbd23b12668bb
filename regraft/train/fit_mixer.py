"""Closed forms of a mixer by ridge regression on what its teacher's layer got and gave: gates,
half-lives and value maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mixers.base import Mixer, MixerContext
from ..mixers.gated import GatedMixer
from ..mixers.linear import LinearAttention
from .attention_statistics import Records
from .hooks import LayerRecord

RIDGE = 1e-3
RIDGES = (1e-3, 1e-2, 1e-1)  # of value maps, the one that judging batches like best
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # gate candidates: these shares of the far attention mass
GATE_RANGE = (0.01, 0.9)  # targets of the gate, so that its logit stays finite
SIZE_RANGE = (0.02, 4.0)  # of a head's output, as a share of its mean
NEWTON = 20  # steps
HALF_LIFE_TOKENS = 2048  # tokens that half-lives are chosen on


class RidgeRegression:
    """Ridge regressions side by side: features (..., n, f) -> targets (..., n, t).

    Only the normal equations are kept, so that rows can come batch by batch.
    """

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0  # X^T X: (..., f, f)
        self.cross: Tensor | float = 0.0  # X^T Y: (..., f, t)
        self.energy: Tensor | float = 0.0  # ||Y||^2: (...)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in more rows."""
        self.gram = self.gram + features.mT @ features
        self.cross = self.cross + features.mT @ targets
        self.energy = self.energy + targets.square().sum((-2, -1))

    def merge(self, other: RidgeRegression) -> RidgeRegression:
        """Both's rows in one."""
        both = RidgeRegression()
        both.gram = self.gram + other.gram
        both.cross = self.cross + other.cross
        both.energy = self.energy + other.energy
        return both

    def solve(self, ridge: float = RIDGE, prior: float = 0.0) -> Tensor:
        """Coefficients W (..., f, t) of min ||X W - Y||^2 + penalty ||W - prior I||^2.

        Args:
            ridge: the penalty as a share of the features' mean square.
            prior: what multiple of the identity W is drawn to.
        """
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        # The small constant keeps features that are all zero solvable.
        penalty = (ridge * scale + 1e-12) * torch.eye(gram.shape[-1], device=gram.device)
        return torch.linalg.solve(gram + penalty, cross + prior * penalty if prior else cross)

    def residual_error(self, coefficients: Tensor) -> Tensor:
        """||X W - Y||^2 for coefficients W (..., f, t): (...)."""
        gram, cross = torch.as_tensor(self.gram), torch.as_tensor(self.cross)
        # ||X W - Y||^2 = ||Y||^2 - (2 <W, X^T Y> - <W, X^T X W>)
        linear = 2 * (coefficients * cross).sum((-2, -1))
        quadratic = (coefficients * (gram @ coefficients)).sum((-2, -1))
        return torch.as_tensor(self.energy) - (linear - quadratic)


def gate_candidates(records: Records, counted: Sequence[Tensor] | None = None) -> Tensor:
    """Gate weights and bias for g = share x attention mass m outside the window.

    Softmax attention is exactly (1 - m) window + m rest, so m is the right gate for a linear
    branch that gives the rest; smaller shares suit one that does not. The candidates are ridge
    regressions of logit(share x m) on the layer's input, solved as one.

    Args:
        records: by batch, what the layer got and what its attention was.
        counted: by batch, the tokens whose gate may open (batch, time); None for all.

    Returns:
        (candidates, hidden + 1, heads), the bias last.
    """
    problem = RidgeRegression()
    shares = torch.tensor(SHARES)
    for number, (record, seen) in enumerate(records):
        outside = seen.outside.transpose(1, 2).flatten(0, 1)  # (batch * time, heads)
        targets = (shares.to(outside)[:, None] * outside[:, None]).clamp(*GATE_RANGE).logit()
        features = _append_ones(record.inputs).flatten(0, 1)  # (batch * time, hidden + 1)
        if counted is not None:
            features = features * counted[number].flatten()[:, None]
        problem.add(features, targets.flatten(1))
    return problem.solve().unflatten(1, (len(SHARES), -1)).transpose(0, 1)


def _append_ones(x: Tensor) -> Tensor:
    """A column of ones for the bias."""
    return torch.cat((x.float(), torch.ones_like(x[..., :1])), dim=-1)


def fit_output_gate(mixer: LinearAttention, records: Records) -> None:
    """Set a SiLU gate so that a normed head is about as large as the teacher's.

    A norm takes from a head's outputs how large they are, for example how little a head gives that
    looks at a text's first token. The gate of all of a head's coordinates is the ridge regression,
    without a bias, of the number whose SiLU is the root mean square of the teacher's head, as a
    share of its mean.

    Args:
        mixer: with a gate of SiLU behind a norm per head.
        records: by batch, what the layer got and what its attention was.
    """
    size = torch.cat([seen.heads.square().mean(-1).sqrt() for _, seen in records])
    share = size / size.mean((0, 2), keepdim=True).clamp(min=1e-12)
    targets = invert_silu(share.clamp(*SIZE_RANGE)).transpose(1, 2)  # (rows, time, heads)
    problem = RidgeRegression()
    features = torch.cat([record.inputs.float() for record, _ in records])
    problem.add(features.flatten(0, 1), targets.flatten(0, 1))
    by_head = problem.solve().mT  # (heads, hidden)
    mixer.gate.weight.copy_(by_head.repeat_interleave(mixer.attention.value_dim, 0))


def invert_silu(y: Tensor) -> Tensor:
    """The positive z with silu(z) = y for y > 0, by Newton's method."""
    z = y + 0.5
    for _ in range(NEWTON):
        share = z.sigmoid()
        # The slope is one half at zero and grows, so that the steps stay small.
        z = z - (z * share - y) / (share * (1 + z * (1 - share)))
    return z


def linear_branch(mixer: Mixer) -> Mixer:
    """The linear branch of a gated mixer; any other mixer itself."""
    return mixer.linear if isinstance(mixer, GatedMixer) else mixer


@dataclass
class Evidence:
    """One batch for the choice of gates, half-lives and value maps of a mixer."""

    record: LayerRecord
    heads: Tensor  # (batch, heads, time, dim): the teacher's per-head outputs
    context: MixerContext
    # Of a mixer beside a window, else None: what no candidate changes.
    window: Tensor | None  # (batch, heads, time, dim): the window's outputs
    gates: Tensor | None  # (candidates, batch, heads, time, 1)

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.heads.shape[0] * self.heads.shape[2]


def gather_evidence(
    mixer: Mixer,
    records: Records,
    segments: Sequence[Tensor | None],
    gates: Tensor | None,
    counted: Sequence[Tensor] | None = None,
) -> list[Evidence]:
    """What all candidates share, computed once.

    Args:
        mixer: the mixer.
        records: by batch, what the layer got and what its attention was.
        segments: by batch, (batch, time) numbers of documents, or None.
        gates: gate candidates (candidates, hidden + 1, heads); None for a mixer without a gate.
        counted: as of `gate_candidates`.
    """
    gathered = []
    for number, ((record, seen), ids) in enumerate(zip(records, segments, strict=True)):
        one = Evidence(record, seen.heads, record.mixer_context(ids), None, None)
        if gates is not None and isinstance(mixer, GatedMixer):
            window = mixer.window.mix(record.inputs, one.context, None)[0]
            one.window = window.float().transpose(1, 2)
            values = torch.einsum("bth,chk->cbkt", _append_ones(record.inputs), gates)
            one.gates = values.sigmoid().unsqueeze(-1)
            if counted is not None:
                one.gates = one.gates * counted[number][:, None, :, None]
        gathered.append(one)
    return gathered


def fit_mixer(
    mixer: Mixer, records: Records, segments: Sequence[Tensor | None]
) -> tuple[bool, float]:
    """Set decays, gates and value maps that best complete the window to the teacher, by head.

    A linear mixer's output is linear in its values. So a (dim, dim) map of the output, found by
    ridge regression, folds into the value projection, or into the output projection where a norm
    stands between; a branch with a norm takes no map.

    Args:
        mixer: as linearized, its projections still the teacher's.
        records: by batch, what the layer got and what its attention was.
        segments: by batch, (batch, time) numbers of documents, or None.

    Returns:
        (whether the maps were folded, the mean of the chosen gate shares).
    """
    linear = linear_branch(mixer)
    gates = counted = None
    if isinstance(mixer, GatedMixer):
        if mixer.options.past_window:
            counted = [
                mixer.leaves_window(record.inputs, record.mixer_context(ids), None)
                for (record, _), ids in zip(records, segments, strict=True)
            ]
        gates = gate_candidates(records, counted)
    evidence = gather_evidence(mixer, records, segments, gates, counted)
    if linear.half_lives is not None:
        choose_half_lives(linear, linear.half_lives, evidence)

    # Each map takes the gate candidate that leaves the least error.
    solved, errors = solve_value_maps(linear, evidence)
    best = errors.argmin(0)  # of (candidates, maps)
    maps = len(best)
    chosen = torch.stack(solved)[best, torch.arange(maps)]
    if gates is None or not isinstance(mixer, GatedMixer):
        return linear.fold_heads(chosen), 1.0

    # Heads that share a map have chosen together, but have gates of their own.
    heads = linear.attention.heads
    per_head = best.repeat_interleave(heads // maps)
    picked = gates[per_head, :, torch.arange(heads)]  # (heads, hidden + 1)
    mixer.gate.weight.copy_(picked[:, :-1])
    mixer.gate.bias.copy_(picked[:, -1])
    return linear.fold_heads(chosen), float(torch.tensor(SHARES, device=best.device)[best].mean())


def choose_half_lives(linear: Mixer, candidates: Tensor, evidence: Sequence[Evidence]) -> None:
    """Set each state's half-life to the candidate that leaves the least error.

    The first `HALF_LIFE_TOKENS` decide: a half-life is one number of a state.

    Args:
        linear: the linear branch.
        candidates: half-lives to try, in tokens (candidates, states).
        evidence: by batch; each half-life is judged with the best of its gates.
    """
    states = candidates.shape[1]
    before = itertools.accumulate((one.tokens for one in evidence), initial=0)
    few = [one for one, seen in zip(evidence, before, strict=False) if seen < HALF_LIFE_TOKENS]

    errors = []
    for half_lives in candidates:
        linear.set_half_lives(half_lives)
        left = solve_value_maps(linear, few)[1].amin(0)  # (maps,)
        errors.append(left.unflatten(0, (states, -1)).sum(1))  # a state may serve several maps

    best = torch.stack(errors).argmin(0)  # of (candidates, states)
    linear.set_half_lives(candidates.gather(0, best[None])[0])


def solve_value_maps(linear: Mixer, evidence: Sequence[Evidence]) -> tuple[list[Tensor], Tensor]:
    """The best value maps for each gate candidate, and how well they do.

    With several batches the last quarter judges maps that the others gave: beside a wide window
    little is left to explain, and a map that explains it on its own rows alone does harm.

    Args:
        linear: the linear branch.
        evidence: by batch; a mixer without a gate counts as one candidate.

    Returns:
        (by candidate, maps (maps, dim, dim) from all batches; squared errors left by those of the
        others on the batches that judge, (candidates, maps)).
    """
    judges = len(evidence) // 4 or len(evidence) // 2
    parts = evidence[: len(evidence) - judges], evidence[len(evidence) - judges :]
    fit, judge = (gather_regressions(linear, part) for part in parts)
    # Averages of values, as the teacher's outputs are too, are drawn to the identity, else to zero.
    prior = float(linear.denominator)

    def solve(problems: Sequence[RidgeRegression], ridge: float) -> list[Tensor]:
        solved = [problem.solve(ridge, prior) for problem in problems]
        if linear.values_are_linear or hasattr(linear, "o_proj"):
            return solved
        # Nothing can take a map (a branch with a norm): its error is that without one.
        eye = torch.eye(linear.attention.value_dim, device=solved[0].device)
        return [eye.expand_as(found) for found in solved]

    if not judge:
        maps = solve(fit, RIDGE)
        return maps, stack_errors(fit, maps)
    both = [one.merge(two) for one, two in zip(fit, judge, strict=True)]
    judged = torch.stack([stack_errors(judge, solve(fit, ridge)) for ridge in RIDGES])
    errors, best = judged.min(0)  # (candidates, maps)
    found = torch.stack([torch.stack(solve(both, ridge)) for ridge in RIDGES])
    rows, columns = (torch.arange(size, device=best.device) for size in best.shape)
    return list(found[best, rows[:, None], columns]), errors


def stack_errors(problems: Sequence[RidgeRegression], maps: Sequence[Tensor]) -> Tensor:
    """Squared errors by candidate: (candidates, maps)."""
    return torch.stack(
        [problem.residual_error(found) for problem, found in zip(problems, maps, strict=True)]
    )


def gather_regressions(linear: Mixer, evidence: Sequence[Evidence]) -> list[RidgeRegression]:
    """By gate candidate, the regression of what the window leaves on the linear branch's outputs;
    none without evidence.
    """
    if not evidence:
        return []
    maps = linear.attention.heads
    if linear.values_are_linear:  # the maps fold into v, whose heads are shared by groups
        maps = linear.states

    gated = evidence[0].gates is not None
    problems = [RidgeRegression() for _ in (SHARES if gated else (1.0,))]
    for one in evidence:
        out = linear.mix(one.record.inputs, one.context, None)[0].float().transpose(1, 2)
        if one.gates is None or one.window is None:
            problems[0].add(*_group_heads(maps, out, one.heads))
            continue

        # g out W + (1 - g) window = teacher: what is left for W is teacher - (1 - g) window.
        for problem, gate in zip(problems, one.gates, strict=True):
            problem.add(*_group_heads(maps, gate * out, one.heads - (1 - gate) * one.window))
    return problems


def _group_heads(maps: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(batch, heads, time, dim) -> (maps, rows, dim): heads that share a map become rows."""
    return tuple(t.transpose(0, 1).unflatten(0, (maps, -1)).flatten(1, 3) for t in tensors)
