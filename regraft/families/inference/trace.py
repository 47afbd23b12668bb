"""Which module reads what another gives, from one traced forward pass."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .norms import NormKind, probe_norm
from .tiny_model import TinyModel, run

CLOSE = 1e-4  # largest difference of sums that count as equal


@dataclass(frozen=True, eq=False)  # tensors have no equality of their own
class Call:
    """One call of a module: its first input and its first output."""

    name: str
    module: Any
    given: Any
    result: Any


@dataclass
class Trace:
    """What the modules of a tiny model got and gave, in order of execution."""

    calls: list[Call]
    # The hidden size.
    width: int
    # Norms by name.
    norms: dict[str, NormKind] = field(default_factory=dict)
    # Names of norms of queries and keys, which are none of the stream.
    inner: frozenset[str] = frozenset()

    @property
    def stream_norms(self) -> list[Call]:
        """Calls of norms over the residual stream or a branch."""
        return [
            call
            for call in self.calls
            if call.name in self.norms
            and call.name not in self.inner
            and call.given is not None
            and call.given.shape[-1] == self.width == call.result.shape[-1]
        ]

    def find_reads(self, name: str) -> str:
        """What a map reads, "normed" or "stream"."""
        call = next((call for call in self.calls if call.name == name), None)
        if call is None or call.given is None:
            return "normed"
        normed = any(_has_rows(norm.result, call.given) for norm in self.stream_norms)
        return "normed" if normed else "stream"

    def find_writes(self, name: str) -> str:
        """What a map writes, "branch" where a norm follows before the sum, else "stream"."""
        inputs = [
            norm.given for norm in self.stream_norms if self.find_norm_reads(norm) == "branch"
        ]
        for call in self.calls:
            # Its own output, or that of the attention or MLP which it is in.
            inside = name == call.name or name.startswith(f"{call.name}.")
            if inside and _is_in_layer(call.name) and call.result is not None:
                if any(_same(given, call.result) for given in inputs):
                    return "branch"
        return "stream"

    def find_norm_reads(self, norm: Call) -> str:
        """What a norm reads: "branch" when it is what a module inside the layer gave, or the sum
        in models whose norms follow it; else "stream".
        """
        if self.is_post_norm(norm):
            return "branch"
        inside = (
            call
            for call in self.calls
            if _is_in_layer(call.name) and call.name not in self.norms and call.result is not None
        )
        return "branch" if any(_same(call.result, norm.given) for call in inside) else "stream"

    def find_norm_writes(self, norm: Call) -> str:
        """What a norm writes: "stream" behind a branch or a sum, "head" last, else "normed"."""
        if norm is self.stream_norms[-1] and not _is_in_layer(norm.name):
            return "head"
        if self.is_post_norm(norm):
            return "stream"
        readers = (
            call for call in self.calls if call.name not in self.norms and call.given is not None
        )
        is_read = any(_same(norm.result, call.given) for call in readers)
        return "normed" if is_read else "stream"

    def is_post_norm(self, norm: Call) -> bool:
        """Whether the stream goes on from what a norm gives, as in BERT."""
        norms = self.stream_norms
        place = norms.index(norm)
        if place + 1 == len(norms) or norms[place + 1].given.shape != norm.given.shape:
            return False
        following = norms[place + 1].given
        return self._is_branch(following - norm.result) and not self._is_branch(
            following - norm.given
        )

    def _is_branch(self, difference: Any) -> bool:
        """Whether a difference is what some module inside a layer gave."""
        return any(
            call.result is not None
            and call.result.shape == difference.shape
            and float((call.result - difference).abs().max()) < CLOSE
            for call in self.calls
            if _is_in_layer(call.name) and call.name not in self.norms
        )

    def find_embedding_factor(self, embedding: Any) -> float:
        """What the first layer gets, relative to the rows of the table of embeddings."""
        import torch

        first = next((norm.given for norm in self.stream_norms), None)
        ids = next((call.given for call in self.calls if call.module is embedding), None)
        if first is None or ids is None:
            return 1.0
        rows = torch.nn.functional.embedding(ids, embedding.weight.detach())
        if rows.shape != first.shape:
            return 1.0
        ratio = first / rows
        middle = float(ratio.median())
        return middle if float((ratio - middle).abs().max()) < 1e-3 * abs(middle) else 1.0


def trace_forward(tiny: TinyModel, model: Any, width: int, inner: frozenset[str]) -> Trace:
    """Run a model once and keep what its modules got and gave.

    Args:
        tiny: says what the model reads.
        model: an instance of it.
        width: the hidden size.
        inner: names of norms that are no norms of the stream.
    """
    calls: list[Call] = []
    handles = [
        module.register_forward_hook(_make_hook(name, calls), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    try:
        run(model, tiny)
    finally:
        for handle in handles:
            handle.remove()

    trace = Trace(calls, width, inner=inner)
    for call in calls:
        if call.given is None or any(True for _ in call.module.children()):
            continue
        if call.given.is_floating_point() and call.name not in trace.norms:
            kind = probe_norm(call.module, call.given.shape[-1])
            if kind is not None:
                trace.norms[call.name] = kind
    return trace


def _make_hook(name: str, calls: list[Call]) -> Any:
    def keep(module: Any, given: Any, named: Any, result: Any) -> None:
        first = next(iter([*given, *named.values()]), None)
        calls.append(Call(name, module, _copy(first), _copy(next(_flatten(result), None))))

    return keep


def _flatten(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, tuple | list) else [value]


def _copy(value: Any) -> Any:
    import torch

    return value.detach().clone() if torch.is_tensor(value) else None


def _same(first: Any, second: Any) -> bool:
    """Whether two tensors hold the same numbers, whatever their leading dimensions."""
    import torch

    if first is None or second is None or first.numel() != second.numel():
        return False
    return first.shape[-1] == second.shape[-1] and bool(
        torch.equal(first.reshape(-1), second.reshape(-1))
    )


def _has_rows(whole: Any, part: Any) -> bool:
    """Whether all rows of a tensor are rows of another: experts get some tokens, in any order."""
    if _same(whole, part):
        return True
    if part.shape[-1] != whole.shape[-1] or not part.numel():
        return False
    rows, others = part.reshape(-1, part.shape[-1]), whole.reshape(-1, whole.shape[-1])
    return bool((rows[:, None] == others[None]).all(-1).any(1).all())


def _is_in_layer(name: str) -> bool:
    """Whether a module is inside a layer, and not the layer itself."""
    return re.search(r"\.\d+\..", name) is not None
