"""The weight map of a change before it is made: parameters, bytes, FLOPs and decoding state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..core import lineage
from ..core.checkpoint import Checkpoint
from ..io.safetensors import TensorEntry
from ..mixers.registry import mixer_class
from ..modeling import flops as ledger
from ..modeling.layer_kinds import attention_of, kept_tokens, layer_kinds, mixers_of, state_bytes

if TYPE_CHECKING:
    from rich.console import Console


OVERHEAD = 96_000_000  # hashing, blocks of random numbers, what the allocator keeps


@dataclass(frozen=True)
class Plan:
    """What changes from `source` to `target`; `tensors` shares add up to one, `dropped` ones are of the source.

    `flops_per_token`: forward, decoding after `context` tokens (a multiply-add is 2). `state_bytes`: decoding state of
    one sequence after `context` tokens by kind of layer, float32. `row_flops_per_token`: of a whole row of `row_tokens`
    positions, forward and training (forward and backward). `peak_bytes`: what writing the target takes at most, in
    anonymous memory above that of the opened source.
    """

    source: dict[str, int]
    target: dict[str, int]
    parameters: int
    source_parameters: int
    tensors: dict[str, Any]
    dropped: dict[str, str]
    layers: dict[str, list[int]]
    bytes: int
    peak_bytes: int
    context: int
    flops_per_token: dict[str, int]
    row_tokens: int
    row_flops_per_token: dict[str, dict[str, int]]
    state_bytes: dict[str, int]
    source_state_bytes: int
    steps: list[dict[str, Any]]
    notes: list[str]

    @classmethod
    def of(
        cls,
        source: Checkpoint,
        target: Checkpoint,
        context: int = 16384,
        length: int = 1024,
        notes: Sequence[str] = (),
    ) -> Plan:
        """Compare two open checkpoints; reads no weights. Rows have `length` tokens, or all positions if less; `notes`
        are said after those of the steps."""
        length = min(length, source.sizes.get("pos", length))
        sizes = [lazy.bytes for lazy in target.tensors.values()]
        before = sum(lazy.size for lazy in source.tensors.values())
        dropped = sum(
            lazy.size for key, lazy in source.tensors.items() if source.names[key] in target.dropped
        )
        counts: dict[str, Any] = dict(lineage.count_by_kind(target))
        counts["dropped"] = {
            "count": len(target.dropped),
            "parameters": dropped,
            "share": dropped / before,
        }
        counts["unclaimed"] = {"count": 0, "parameters": 0, "share": 0.0}
        kinds = layer_kinds(target)
        context = context if source.anatomy.causal else source.sizes["pos"]
        return cls(
            source=source.sizes,
            target=target.sizes,
            parameters=sum(lazy.size for lazy in target.tensors.values()),
            source_parameters=before,
            tensors=counts,
            dropped=target.dropped,
            layers={
                kind: [layer for layer, name in enumerate(kinds) if name == kind]
                for kind in sorted(set(kinds))
            },
            bytes=sum(sizes),
            peak_bytes=writing_bytes(source, target),
            context=context,
            flops_per_token={
                "source": token_flops(source, context),
                "target": token_flops(target, context),
            },
            row_tokens=ledger.count_positions(source.config, length),
            row_flops_per_token={
                "source": row_flops(source, length),
                "target": row_flops(target, length),
            },
            state_bytes=state_bytes(target, context),
            source_state_bytes=sum(state_bytes(source, context).values()),
            steps=list(target.history),
            notes=[note for step in target.history for note in step.get("notes", [])] + list(notes),
        )

    def format_cost(self) -> str:
        """What writing the target takes, in a line."""
        return f"{_format_millions(self.bytes)} MB to write, {_format_millions(self.peak_bytes)} MB of memory needed"

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain values."""
        return asdict(self)


def writing_bytes(source: Checkpoint, target: Checkpoint) -> int:
    """Upper bound of the memory that saving takes: one tensor being made, another being written, and OVERHEAD.

    A tensor that comes straight from a file is mapped and takes none. Any other takes, while it is made, two of it in
    the dtype that is computed in and two in its own at most; many operators take half of that.
    """
    wide = max(
        4, *(lazy.dtype.itemsize for lazy in (*source.tensors.values(), *target.tensors.values()))
    )
    made = [
        lazy
        for lazy in target.tensors.values()
        if not isinstance(getattr(lazy.read, "__self__", None), TensorEntry)
    ]
    held = sorted((lazy.bytes for lazy in made), reverse=True) + [0, 0]
    making = [2 * wide * lazy.size + 2 * lazy.bytes for lazy in made]
    beside = [held[lazy.bytes == held[0]] for lazy in made]
    return OVERHEAD + max(
        (work + other for work, other in zip(making, beside, strict=True)), default=0
    )


def token_flops(checkpoint: Checkpoint, context: int) -> int:
    """Forward FLOPs of one token after `context` others: matrix products, attention and state updates."""
    if not checkpoint.anatomy.host(
        checkpoint.config
    ).causal:  # it does not decode: one token of a row of all positions
        return row_flops(checkpoint, checkpoint.sizes["pos"])["forward"]
    total = ledger.weight_flops(checkpoint.config, 1)[0]
    for layer, spec in enumerate(mixers_of(checkpoint)):
        attention = attention_of(checkpoint, layer)
        if spec is None:
            total += 4 * attention.heads * attention.dim * kept_tokens(checkpoint, layer, context)
        else:
            total += mixer_class(spec["name"]).mixing_flops(attention, spec)
    return total


def row_flops(checkpoint: Checkpoint, length: int) -> dict[str, int]:
    """FLOPs per position of a row of `length` tokens: `forward`, and `training` (forward and backward)."""
    held = ledger.count_positions(checkpoint, length)
    passes = {
        "forward": ledger.forward_flops(checkpoint, length),
        "training": ledger.training_flops(checkpoint, length),
    }
    return {name: value // held for name, value in passes.items()}


def print_plan(plan: Plan, console: Console) -> None:
    """Show a plan to a person."""
    from rich.table import Table

    table = Table("tensors", "count", "parameters", "share", title="Weight map")
    for kind, row in plan.tensors.items():
        if row["count"]:
            base = " of the source" if kind == "dropped" else ""
            table.add_row(
                kind, str(row["count"]), f"{row['parameters']:,}", f"{row['share']:.2%}{base}"
            )
    console.print(table)
    for name, reason in plan.dropped.items():
        console.print(f"dropped {name}: {reason}", soft_wrap=True, highlight=False)
    sizes = Table("axis", "source", "target", title="Sizes")
    for axis, size in plan.source.items():
        changed = plan.target[axis] != size
        sizes.add_row(axis, f"{size:,}", f"{plan.target[axis]:,}", style="bold" if changed else "")
    console.print(sizes)
    facts = Table("", "source", "target", title=f"After {plan.context:,} tokens")
    facts.add_row("parameters", f"{plan.source_parameters:,}", f"{plan.parameters:,}")
    if keeps := plan.source_state_bytes > 0:  # encoders keep none
        facts.add_row(
            "state, MB",
            _format_millions(plan.source_state_bytes),
            _format_millions(sum(plan.state_bytes.values())),
        )
    facts.add_row(
        "GFLOP per token", *(f"{value / 1e9:.3f}" for value in plan.flops_per_token.values())
    )
    for name, what in (
        ("forward", "GFLOP per token of a row"),
        ("training", "GFLOP per token trained"),
    ):
        values = (f"{row[name] / 1e9:.3f}" for row in plan.row_flops_per_token.values())
        facts.add_row(f"{what} of {plan.row_tokens:,}" if name == "forward" else what, *values)
    facts.add_row("on disk, MB", "", _format_millions(plan.bytes))
    facts.add_row("memory to write it, MB", "", _format_millions(plan.peak_bytes))
    console.print(facts)
    for kind, layers in plan.layers.items():
        held = f"; state {_format_millions(plan.state_bytes[kind])} MB" if keeps else ""
        console.print(
            f"{kind}: layers {', '.join(map(str, layers))}{held}", soft_wrap=True, highlight=False
        )
    for note in plan.notes:
        console.print(f"Note: {note}", soft_wrap=True, highlight=False)


def _format_millions(count: int) -> str:
    return f"{count / 1e6:,.1f}"
