"""Receipts: what can be proved about an output against its source, by reading and running both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from .. import modeling
from ..core import lineage
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..mixers.base import Attention, WeightSpec
from ..mixers.registry import weights
from ..mixers.remix import Remix
from . import conversion, growth, liveness
from .growth import ModelDifferences
from .liveness import DeadTensor, LockedTensor

if TYPE_CHECKING:
    from rich.console import Console

LENGTH = 96  # random tokens that both models run on
# Largest relative differences of logits that count as equal.
EXACT = 1e-6
WINDOW_END = 1e-5
RECURRENT = 1e-4


class Receipts(TypedDict):
    """The result of `check`. Differences of logits are relative to the largest logit."""

    # Whether everything that can be asked of the output is so.
    holds: bool
    # Whether a step changed weights by training. What training moves on purpose is then None.
    trained: bool
    # Source tensors found nowhere in the output, nor dropped with a reason.
    unaccounted: list[str]
    # Moved tensors whose bits changed; None for grown models, whose outputs are compared instead.
    unequal: list[str] | None
    # Whether lineage.json names this source by its hash.
    source_matches: bool
    # Outputs against the source's.
    rel_logit_diff: float | None
    max_abs_logit_diff: float | None
    # The source in regraft's own classes, with no layer linearized, against the source itself.
    zero_layers: float | None
    # Gated layers with their gates shut against the pure-window model.
    window_end: float | None
    # Windows against the stock attention in their place, and the layer that differs most.
    window_vs_stock: float | None
    window_vs_stock_layer: int | None
    # Token by token against all tokens at once; None for encoders.
    parallel_vs_recurrent: float | None

    # Of grown models only, from here on. Whether every step keeps the function.
    exact: NotRequired[bool]
    # Greedy tokens that agree with the source's from the start; None for encoders.
    greedy: NotRequired[int | None]
    # The largest `rel_logit_diff` that counts as equal.
    bound: NotRequired[float]
    # Entries that no gradient reaches, and those that the source has itself.
    dead: NotRequired[int | None]
    dead_source: NotRequired[int | None]
    dead_in: NotRequired[list[DeadTensor]]
    # Duplicate units that training cannot separate.
    locked: NotRequired[int | None]
    locked_in: NotRequired[list[LockedTensor]]


class ForwardChecks(TypedDict):
    """The receipts of a linearized model that need forward passes; see `Receipts`."""

    rel_logit_diff: float | None
    max_abs_logit_diff: float | None
    zero_layers: float | None
    window_end: float | None
    window_vs_stock: float | None
    window_vs_stock_layer: int | None
    parallel_vs_recurrent: float


@dataclass(frozen=True)
class InheritedTensor:
    """An output tensor that comes from the source.

    Attributes:
        sources: names of the source's tensors.
        name: of the output's.
        read_source: reads the source's.
        read_output: reads the output's.
    """

    sources: tuple[str, ...]
    name: str
    read_source: Callable[[], Tensor]
    read_output: Callable[[], Tensor]


def check(source: str | Path, out: str | Path, seed: int = 0) -> Receipts:
    """Every receipt of an output against the source it was made from, on random tokens in float32.

    A trained output has moved its weights on purpose: only its shapes, its source's hash and its
    own consistency count. RegraftError when the output was not made from this source, or when
    files are damaged.

    Args:
        source: directory or GGUF file of the source.
        out: directory of the output.
        seed: of the random tokens.
    """
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    before.verify()
    after.verify()
    if growth.growth_steps(after, before):
        return check_growth(before, after, seed)
    if after.sizes != before.sizes:
        raise RegraftError(
            f"'{out}' was not made from '{source}': axes {after.sizes} against {before.sizes}; "
            "name its source"
        )

    trained = lineage.is_trained(lineage.read_lineage(after.path))
    unaccounted, unequal = compare_tensors(before, after, values=not trained)
    matches = source_matches(before, after)
    forward = run_forward_checks(before, after, trained, seed)

    within = (
        is_within(forward["zero_layers"], EXACT)
        and is_within(forward["window_end"], WINDOW_END)
        and is_within(forward["window_vs_stock"], conversion.BOUND)
        and is_within(forward["parallel_vs_recurrent"], RECURRENT)
    )
    # A linearized model differs from its source, and a trained one: only a moved one must not.
    if not mixer_layers(after) and not trained:
        within = within and is_within(forward["rel_logit_diff"], EXACT)
    return {
        "holds": within and matches and not unaccounted and not unequal,
        "trained": trained,
        "unaccounted": unaccounted,
        "unequal": unequal,
        "source_matches": matches,
        **forward,
    }


def check_growth(before: Checkpoint, after: Checkpoint, seed: int) -> Receipts:
    """Receipts of a grown model: outputs, greedy text, cached decoding, dead and duplicate units.

    Steps that do not keep the function, and training, leave the difference of outputs unbound; it
    is measured all the same.

    Args:
        before: the source.
        after: the grown model.
        seed: of the input.
    """
    trained = lineage.is_trained(lineage.read_lineage(after.path))
    unaccounted = growth.find_unaccounted(before, after)
    matches = source_matches(before, after)
    exact = growth.is_exact(list(after.history)[len(before.history) :])
    differences = growth.compare_models(before, after, seed)
    bound = growth.difference_bound(before, after)

    # Training separates and wakes units: only a model that was just grown shows what growth did.
    alive = None if trained else liveness.check_liveness(after, source=before)
    return {
        "holds": is_grown_right(differences, exact, bound) and matches and not unaccounted,
        "trained": trained,
        "unequal": None,
        "unaccounted": unaccounted,
        "source_matches": matches,
        "exact": exact,
        "zero_layers": None,
        "window_end": None,
        **conversion.NO_WINDOW,
        **differences,
        "bound": bound,
        "dead": None if alive is None else alive["dead"]["entries"],
        "dead_source": None if alive is None else alive["dead"].get("source"),
        "dead_in": [] if alive is None else alive["dead"]["tensors"],
        "locked": None if alive is None else alive["locked"]["units"],
        "locked_in": [] if alive is None else alive["locked"]["tensors"],
    }


def is_grown_right(differences: ModelDifferences, exact: bool, bound: float) -> bool:
    """Whether outputs agree as they must, and decoding with all tokens at once."""
    same = not exact or differences["rel_logit_diff"] <= bound
    return same and is_within(differences["parallel_vs_recurrent"], RECURRENT)


def is_within(value: float | None, bound: float) -> bool:
    """Whether a difference is small enough; None does not apply and is."""
    return value is None or value <= bound


def source_matches(before: Checkpoint, after: Checkpoint) -> bool:
    """Whether the output's lineage names this source by its hash."""
    recorded = lineage.read_lineage(after.path).get("source", {}).get("sha256")
    return lineage.origin(before)["sha256"] == recorded


def mixer_layers(checkpoint: Checkpoint) -> list[int]:
    """Layers that hold a mixer."""
    return [layer for layer, spec in enumerate(checkpoint.config.get("mixers") or []) if spec]


def compare_tensors(
    before: Checkpoint, after: Checkpoint, values: bool = True
) -> tuple[list[str], list[str]]:
    """Tensors that were lost, and tensors that changed while they were moved.

    Args:
        before: the source.
        after: the output.
        values: whether tensors are read and compared: bit-equal, or per head for broadcast ones.

    Returns:
        Source tensors that are nowhere in the output nor dropped with a reason; output tensors
        whose values are not the source's, none without `values`.
    """
    # `values=False` still goes through all tensors: a trained model must not lose any either.
    seen: set[str] = set()
    unequal = []
    for tensor in iter_inherited_tensors(before, after):
        seen.update(tensor.sources)
        if not values:
            continue
        if not is_same_tensor(tensor.read_source(), tensor.read_output(), after.sizes):
            unequal.append(tensor.name)
    return sorted(set(before.names.values()) - seen - set(after.dropped)), unequal


def iter_inherited_tensors(before: Checkpoint, after: Checkpoint) -> Iterator[InheritedTensor]:
    """Every output tensor that comes from the source: by its own role, or into a mixer."""
    for key, lazy in after.tensors.items():
        role, layer = key
        if key in before.tensors:
            sources, read = (before.names[key],), before.tensors[key].read
            yield InheritedTensor(sources, after.names[key], read, lazy.read)
        elif layer is not None and (inherited := mixer_weight(after, role, layer).source):
            source = before[inherited, layer]
            yield InheritedTensor(
                source.provenance.sources, after.names[key], source.read, lazy.read
            )


def mixer_weight(checkpoint: Checkpoint, role: str, layer: int) -> WeightSpec:
    """The declaration of the parameter that the anatomy calls ("mixer.<local name>", layer)."""
    spec, attention = checkpoint.config["mixers"][layer], checkpoint.config["attention"][layer]
    return weights(spec, Attention(**attention))[role.removeprefix("mixer.")]


def is_same_tensor(source: Tensor, moved: Tensor, sizes: dict[str, int]) -> bool:
    """Whether a tensor was moved unchanged, or each of its query heads is its group's head.

    Args:
        source: (kv * dim, ...), or any shape.
        moved: (kv * group * dim, ...), or the same shape.
        sizes: by axis.
    """
    if source.shape == moved.shape:
        return torch.equal(source, moved)
    kv, group, dim = sizes["kv"], sizes["group"], sizes["dim"]
    if source.shape[0] != kv * dim or moved.shape[0] != kv * group * dim:
        return False
    heads = moved.reshape(kv, group, dim, -1)
    return all(torch.equal(heads[:, query], source.reshape(kv, dim, -1)) for query in range(group))


def run_forward_checks(
    before: Checkpoint, after: Checkpoint, trained: bool, seed: int
) -> ForwardChecks:
    """The receipts that need forward passes; one extra model is in memory at a time.

    Args:
        before: the source.
        after: a model of the same sizes.
        trained: whether the output's weights moved on purpose.
        seed: of the random tokens.
    """
    length = min(LENGTH, before.sizes.get("pos", LENGTH))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, before.sizes["vocab"], (1, length), generator=generator)

    reference = compute_logits(modeling.materialize(before), tokens)
    model = modeling.materialize(after)
    logits = compute_logits(model, tokens)
    checks: ForwardChecks = {
        "rel_logit_diff": None if trained else relative_difference(logits, reference),
        "max_abs_logit_diff": None if trained else float((logits - reference).abs().max()),
        "zero_layers": None,
        "window_end": None,
        **conversion.NO_WINDOW,
        "parallel_vs_recurrent": relative_difference(
            compute_recurrent_logits(model, tokens), logits
        ),
    }

    # A source that is regraft's own has been through this when it was made.
    if before.config["model_type"] == "regraft":
        return checks
    unchanged = modeling.materialize(Remix(keep="all")(before))
    checks["zero_layers"] = relative_difference(compute_logits(unchanged, tokens), reference)

    if not trained:
        checks.update(conversion.compare_windows(before, after, model, tokens))
    if (window := window_only_remix(after)) and not trained:
        with modeling.force_branch(model, "window"):
            shut = compute_logits(model, tokens)
        window_logits = compute_logits(modeling.materialize(window(before)), tokens)
        checks["window_end"] = relative_difference(shut, window_logits)
    return checks


def window_only_remix(after: Checkpoint) -> Remix | None:
    """The pure-window remix that gated layers become when their gates close; None without any."""
    specs = after.config.get("mixers") or []
    gated = [spec for spec in specs if spec and spec["name"] == "gated"]
    if not gated:
        return None
    kept = ",".join(str(layer) for layer, spec in enumerate(specs) if not spec) or "none"
    # Layers that slide in the source have less than what was asked for, in either model.
    window = max((spec["window"] for spec in gated), key=lambda window: window["window"])
    return Remix(mixer="window", keep=kept, window=window["window"], sinks=window["sinks"])


@torch.no_grad()
def compute_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """tokens: (batch, time) -> logits (batch, time, vocab), all tokens at once."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return logits


@torch.no_grad()
def compute_recurrent_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The same logits through the cache.

    A third of the tokens at once, a third at once on top, the rest one by one: prefill, prefill
    that continues, and decoding.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    third = tokens.shape[1] // 3
    single = tokens[:, 2 * third :].split(1, dim=1)
    pieces = [tokens[:, :third], tokens[:, third : 2 * third], *single]
    outputs = [
        model(input_ids=piece, **modeling.cache_kwargs(cache), use_cache=True).logits.float()
        for piece in pieces
    ]
    return torch.cat(outputs, dim=1)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())


MEANINGS = {
    "unaccounted": "source tensors found nowhere in the output",
    "unequal": "moved tensors whose bits changed",
    "source_matches": "the source is the one that lineage.json names",
    "rel_logit_diff": "outputs against the source's, relative",
    "max_abs_logit_diff": "outputs against the source's, largest difference",
    "zero_layers": "linearizing no layer: logits against the source's",
    "window_end": "gates shut: logits against the pure-window model's",
    "window_vs_stock": "windows: outputs against the stock attention's, relative",
    "window_vs_stock_layer": "the layer that differs most",
    "parallel_vs_recurrent": "token by token against all at once",
    "exact": "every step keeps the function",
    "bound": "largest relative difference that counts as equal",
    "dead": "entries that no gradient reaches",
    "dead_source": "the source's own that its first gradient misses",
    "locked": "duplicate units that training cannot separate",
    "greedy": f"greedy tokens that agree, of {growth.GREEDY_TOKENS}",
}


def print_receipts(receipts: Mapping[str, Any], console: Console) -> None:
    """Show the result of `check` to a person."""
    from rich.table import Table

    table = Table("receipt", "value", title="holds" if receipts["holds"] else "does NOT hold")
    is_grown = "exact" in receipts
    for name, meaning in MEANINGS.items():
        # Of a grown model, what does not apply is about linearization and left out.
        if name in receipts and not (is_grown and receipts[name] is None):
            table.add_row(meaning, format_receipt(receipts[name]))
    console.print(table)

    for row in [*receipts.get("dead_in", []), *receipts.get("locked_in", [])][:8]:
        kind = f"{row['dead']:,} dead" if "dead" in row else "duplicates"
        console.print(f"{kind}: {row['name']}, {row['where']}", soft_wrap=True, highlight=False)


def format_receipt(value: Any) -> str:
    """A receipt's value in a few characters."""
    if value is None:
        return "does not apply"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.2e}"
    if isinstance(value, list):
        more = f" and {len(value) - 3} more" if len(value) > 3 else ""
        return ", ".join(value[:3]) + more if value else "none"
    return str(value)
