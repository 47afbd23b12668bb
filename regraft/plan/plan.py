"""The weight map of a change before it is made: parameters, bytes, FLOPs and decoding state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ..core import lineage
from ..core.checkpoint import Checkpoint, LazyTensor
from ..core.side_files import SideFiles, find_side_files
from ..errors import printable
from ..io.finite import count_nonfinite
from ..io.safetensors import TensorEntry
from ..mixers.latent import expanded_width
from ..mixers.registry import mixer_class
from ..modeling import flops as ledger
from ..modeling.layer_kinds import attention_of, kept_tokens, layer_kinds, mixers_of, state_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


# Bytes for hashing, blocks of random numbers, and what the allocator keeps.
OVERHEAD = 96_000_000
FIRST = 3  # files that are named of those that are not copied


class TensorCount(TypedDict):
    """Tensors of one kind, such as `copied` or `fresh`."""

    count: int
    # Numbers in them.
    parameters: int
    # Of all parameters: the target's, or for `dropped` the source's.
    share: float


class RowFlops(TypedDict):
    """FLOPs per position of a row; a multiply-add is 2."""

    forward: int
    # Forward and backward.
    training: int


class NonfiniteCount(TypedDict):
    """Numbers of a tensor that are not finite."""

    nan: int
    infinite: int


@dataclass(frozen=True)
class Plan:
    """What changes from a source to a target; `regraft plan --json` prints its fields.

    Attributes:
        source: the source's sizes by axis.
        target: the target's.
        parameters: of the target.
        source_parameters: of the source.
        tensors: counts by kind. Shares of the target's kinds add up to one; `dropped` tensors are
            the source's, and `unclaimed` ones would be a bug: a checkpoint refuses them.
        dropped: reasons by name of the source's tensor.
        layers: numbers of the target's layers by kind, such as `softmax` or a mixer's name.
        bytes: of the target on disk.
        peak_bytes: what writing the target takes at most, in anonymous memory above that of the
            opened source.
        context: tokens after which decoding is counted.
        flops_per_token: of `source` and `target`: forward FLOPs of decoding one token after
            `context` others.
        row_tokens: positions of a row.
        row_flops_per_token: of `source` and `target`, on whole rows of `row_tokens`.
        state_bytes: the target's decoding state of one sequence after `context` tokens, float32,
            by kind of layer.
        source_state_bytes: the source's, over all layers; 0 for encoders.
        steps: the target's history, as lineage.json has it.
        notes: what the steps and the files beside the weights want a person to know.
        left_out: files and folders beside the source's weights that are not copied -> why.
        nonfinite: what a scan of the source's values found, by tensor: how many are NaN, and how
            many infinite. None where no values were read.
    """

    source: dict[str, int]
    target: dict[str, int]
    parameters: int
    source_parameters: int
    tensors: dict[str, TensorCount]
    dropped: dict[str, str]
    layers: dict[str, list[int]]
    bytes: int
    peak_bytes: int
    context: int
    flops_per_token: dict[str, int]
    row_tokens: int
    row_flops_per_token: dict[str, RowFlops]
    state_bytes: dict[str, int]
    source_state_bytes: int
    steps: list[dict[str, Any]]
    notes: list[str]
    left_out: dict[str, str]
    nonfinite: dict[str, NonfiniteCount] | None = None

    @classmethod
    def of(
        cls,
        source: Checkpoint,
        target: Checkpoint,
        context: int = 16384,
        length: int = 1024,
        notes: Sequence[str] = (),
    ) -> Plan:
        """Compare two open checkpoints; reads no weights.

        Args:
            source: before the change.
            target: after it, not yet computed.
            context: tokens after which decoding is counted; all positions for an encoder.
            length: tokens of a row; all positions where a model has fewer.
            notes: to add to those of the steps.
        """
        length = min(length, source.sizes.get("pos", length))
        if not source.anatomy.causal:
            paired = "encoder_depth" in source.sizes
            context = length if paired else source.sizes.get("pos", length)
        kinds = layer_kinds(target)
        side = SideFiles()
        if target.folder is not None:  # a GGUF file that is not converted yet has none
            side = find_side_files(target.folder, target.sizes["hidden"], target.copy_code)
        return cls(
            source=source.sizes,
            target=target.sizes,
            parameters=sum(lazy.size for lazy in target.tensors.values()),
            source_parameters=sum(lazy.size for lazy in source.tensors.values()),
            tensors=count_tensors(source, target),
            dropped=target.dropped,
            layers={
                kind: [layer for layer, name in enumerate(kinds) if name == kind]
                for kind in sorted(set(kinds))
            },
            bytes=sum(lazy.bytes for lazy in target.tensors.values()),
            peak_bytes=writing_bytes(source, target),
            context=context,
            flops_per_token={
                "source": token_flops(source, context),
                "target": token_flops(target, context),
            },
            # Patches of an image model are its positions, whatever the length.
            row_tokens=ledger.count_positions(source.config, length),
            row_flops_per_token={
                "source": row_flops(source, length),
                "target": row_flops(target, length),
            },
            state_bytes=state_bytes(target, context),
            source_state_bytes=sum(state_bytes(source, context).values()),
            steps=list(target.history),
            notes=[
                *(note for step in target.history for note in step.get("notes", [])),
                *notes,
                *side.notes,
            ],
            left_out=side.left_out,
        )

    def format_cost(self) -> str:
        """What writing the target takes, in a line."""
        disk, memory = format_megabytes(self.bytes), format_megabytes(self.peak_bytes)
        return f"{disk} MB to write, {memory} MB of memory needed"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def scan_values(source: Checkpoint) -> dict[str, NonfiniteCount]:
    """Tensors with NaN or infinity; reads every value of a checkpoint that allows them."""
    found: dict[str, NonfiniteCount] = {}
    for key, lazy in source.tensors.items():
        nan, infinite = count_nonfinite(lazy.read())
        if nan or infinite:
            found[source.names[key]] = {"nan": nan, "infinite": infinite}
    return found


def count_tensors(source: Checkpoint, target: Checkpoint) -> dict[str, TensorCount]:
    """Tensors of the target by what becomes of them, and those of the source that are dropped."""
    counts = cast(dict[str, TensorCount], dict(lineage.count_by_kind(target)))
    total = sum(lazy.size for lazy in source.tensors.values())
    dropped = sum(
        lazy.size for key, lazy in source.tensors.items() if source.names[key] in target.dropped
    )
    counts["dropped"] = {
        "count": len(target.dropped),
        "parameters": dropped,
        "share": dropped / total,
    }
    # Always zero: opening a checkpoint refuses a tensor that its anatomy does not claim.
    counts["unclaimed"] = {"count": 0, "parameters": 0, "share": 0.0}
    return counts


def writing_bytes(source: Checkpoint, target: Checkpoint) -> int:
    """Upper bound of the memory that saving takes.

    At the worst moment one tensor is computed while another is written, beside OVERHEAD. While a
    tensor is computed it takes at most twice its size in the dtype that is computed in, and twice
    its size in its own; many operators take half of that.
    """
    lazies = (*source.tensors.values(), *target.tensors.values())
    widest = max(4, *(lazy.dtype.itemsize for lazy in lazies))

    # A tensor that comes straight from a file is mapped and takes no memory.
    computed = [lazy for lazy in target.tensors.values() if not is_mapped(lazy)]
    by_size = sorted((lazy.bytes for lazy in computed), reverse=True)
    largest, second = (*by_size, 0, 0)[:2]

    peak = 0
    for lazy in computed:
        computing = 2 * widest * lazy.size + 2 * lazy.bytes
        writing = second if lazy.bytes == largest else largest
        peak = max(peak, computing + writing)
    return OVERHEAD + peak


def is_mapped(lazy: LazyTensor) -> bool:
    """Whether a tensor's bytes are those of a file."""
    return isinstance(getattr(lazy.read, "__self__", None), TensorEntry)


def token_flops(checkpoint: Checkpoint, context: int) -> int:
    """Forward FLOPs of decoding one token: matrix products, attention and state updates.

    Args:
        checkpoint: the model; of an encoder, one token of a row of all positions is counted.
        context: tokens before it.
    """
    if not checkpoint.anatomy.host(checkpoint.config).causal:
        return row_flops(checkpoint, context)["forward"]

    total = ledger.weight_flops(checkpoint.config, 1)[0]
    kept, sizes = kept_tokens(checkpoint, context), checkpoint.sizes
    heads = sizes["kv"] * sizes["group"]
    for layer, spec in enumerate(mixers_of(checkpoint)):
        if spec is None:
            # Scores and weighted values: a multiply-add each, per head, channel and kept token.
            value = sizes.get("value") or sizes["dim"]
            total += 2 * heads * (sizes["dim"] + value) * kept[layer]
            if sizes.get("latent"):  # whose keys and values are made again of every kept token's
                width = heads * expanded_width(attention_of(checkpoint, layer))
                total += 2 * sizes["latent"] * width * (kept[layer] - 1)
        else:
            attention = attention_of(checkpoint, layer)
            total += mixer_class(spec["name"]).mixing_flops(attention, spec)
    return total


def row_flops(checkpoint: Checkpoint, length: int) -> RowFlops:
    """FLOPs per position of a row of `length` tokens."""
    positions = ledger.count_positions(checkpoint, length)
    return {
        "forward": ledger.forward_flops(checkpoint, length) // positions,
        "training": ledger.training_flops(checkpoint, length) // positions,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """Show a plan to a person."""
    console.print(weight_map_table(plan))
    for name, reason in plan.dropped.items():
        console.print(f"dropped {name}: {reason}", soft_wrap=True, highlight=False)
    console.print(sizes_table(plan))
    console.print(cost_table(plan))

    for kind, layers in plan.layers.items():
        numbers = format_ranges(layers)
        state = plan.state_bytes.get(kind)
        weighs = "unchanged, not counted" if state is None else f"{format_megabytes(state)} MB"
        suffix = f"; state {weighs}" if keeps_state(plan) else ""
        console.print(f"{kind}: layers {numbers}{suffix}", soft_wrap=True, highlight=False)
    for note in [*plan.notes, *format_left_out(plan), *format_scan(plan)]:
        console.print(f"Note: {note}", soft_wrap=True, highlight=False)


def format_ranges(numbers: Sequence[int]) -> str:
    """Rising numbers with runs of neighbours drawn together, such as `0-3, 7, 9-11`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def format_left_out(plan: Plan) -> list[str]:
    """How many files beside the weights are not copied, the first of them with why."""
    if not plan.left_out:
        return []
    pairs = [f"{printable(name)} ({why})" for name, why in plan.left_out.items()]
    more = f" and {len(pairs) - FIRST} more, which lineage.json names" if pairs[FIRST:] else ""
    return [f"beside the weights, not copied: {', '.join(pairs[:FIRST])}{more}"]


def format_scan(plan: Plan) -> list[str]:
    """What a scan of the source's values found; nothing where there was none."""
    if plan.nonfinite is None:
        return []
    return [
        f"{name} holds {count['nan']} NaN and {count['infinite']} infinite numbers: writing "
        "refuses them without --allow-nonfinite"
        for name, count in plan.nonfinite.items()
    ] or ["all values of the source are finite"]


def weight_map_table(plan: Plan) -> Table:
    """Tensors and parameters by kind."""
    from rich.table import Table

    table = Table("tensors", "count", "parameters", "share", title="Weight map")
    for kind, row in plan.tensors.items():
        if row["count"]:
            share = f"{row['share']:.2%}" + (" of the source" if kind == "dropped" else "")
            table.add_row(kind, str(row["count"]), f"{row['parameters']:,}", share)
    return table


def sizes_table(plan: Plan) -> Table:
    """Sizes by axis, changed ones in bold."""
    from rich.table import Table

    table = Table("axis", "source", "target", title="Sizes")
    for axis in {**plan.source, **plan.target}:  # another class may have further ones
        sizes = [one.get(axis) for one in (plan.source, plan.target)]
        words = ["" if size is None else f"{size:,}" for size in sizes]
        table.add_row(axis, *words, style="bold" if sizes[0] != sizes[1] else "")
    return table


def cost_table(plan: Plan) -> Table:
    """Parameters, decoding state, FLOPs and bytes of source and target."""
    from rich.table import Table

    table = Table("", "source", "target", title=f"After {plan.context:,} tokens")
    table.add_row("parameters", f"{plan.source_parameters:,}", f"{plan.parameters:,}")
    if keeps_state(plan):
        source = format_megabytes(plan.source_state_bytes)
        table.add_row("state, MB", source, format_megabytes(sum(plan.state_bytes.values())))

    table.add_row("GFLOP per token", *map(format_gflop, plan.flops_per_token.values()))
    rows = plan.row_flops_per_token.values()
    table.add_row(
        f"GFLOP per token of a row of {plan.row_tokens:,}",
        *(format_gflop(row["forward"]) for row in rows),
    )
    table.add_row("GFLOP per token trained", *(format_gflop(row["training"]) for row in rows))

    # The source is there already: only the target is written.
    table.add_row("on disk, MB", "", format_megabytes(plan.bytes))
    table.add_row("memory to write it, MB", "", format_megabytes(plan.peak_bytes))
    return table


def keeps_state(plan: Plan) -> bool:
    """Whether the model keeps anything from token to token; encoders do not."""
    return plan.source_state_bytes > 0


def format_megabytes(count: int) -> str:
    """Bytes as megabytes (10^6)."""
    return f"{count / 1e6:,.1f}"


def format_gflop(count: int) -> str:
    """FLOPs in billions."""
    return f"{count / 1e9:.3f}"
