"""Receipts: what can be proved about an output against its source, by reading both and running both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import modeling
from ..core import lineage
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..mixers.base import Attention, WeightSpec
from ..mixers.registry import weights
from ..mixers.remix import Remix
from . import growth, liveness

if TYPE_CHECKING:
    from rich.console import Console

LENGTH = 96
EXACT = 1e-6
WINDOW_END = 1e-5
RECURRENT = 1e-4


def check(source: str | Path, out: str | Path, seed: int = 0) -> dict[str, Any]:
    """Every receipt of `out` against the `source` it was made from, on random tokens in float32.

    `holds` is the conjunction. Values that a trained output cannot keep are None: its weights moved on purpose, so only
    its shapes, its source's hash and its own consistency count. Differences are relative to the largest logit.

    Returns holds, trained, unaccounted (source tensors found nowhere), unequal (moved tensors whose bits changed; None
    for grown models, whose outputs are compared instead), source_matches, rel_logit_diff,
    max_abs_logit_diff, zero_layers, window_end, parallel_vs_recurrent.
    """
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    before.verify()
    after.verify()
    if steps := growth.growth_steps(after, before):
        return check_growth(before, after, steps, seed)
    if after.sizes != before.sizes:
        raise RegraftError(
            f"'{out}' was not made from '{source}': axes {after.sizes} against {before.sizes}; name its source"
        )
    known = lineage.read_lineage(after.path)
    trained = lineage.is_trained(known)
    unaccounted, unequal = compare_tensors(before, after, values=not trained)
    result: dict[str, Any] = {
        "holds": False,
        "trained": trained,
        "unaccounted": unaccounted,
        "unequal": unequal,
    }
    result["source_matches"] = lineage.origin(before)["sha256"] == known.get("source", {}).get(
        "sha256"
    )
    result |= run_forward_checks(before, after, trained, seed)
    bounds = {"zero_layers": EXACT, "window_end": WINDOW_END, "parallel_vs_recurrent": RECURRENT}
    if not mixer_layers(after) and not trained:
        bounds["rel_logit_diff"] = EXACT
    within = all(result[name] is None or result[name] <= bound for name, bound in bounds.items())
    result["holds"] = within and result["source_matches"] and not unaccounted and not unequal
    return result


def check_growth(
    before: Checkpoint, after: Checkpoint, steps: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """Receipts of a grown model: parity of all outputs, greedy text, cached decoding, dead and locked entries.

    Steps that do not keep the function (and training) leave parity unbound; it is measured all the same.
    """
    known = lineage.read_lineage(after.path)
    result: dict[str, Any] = {"holds": False, "trained": lineage.is_trained(known), "unequal": None}
    result["unaccounted"] = growth.find_unaccounted(before, after)
    result["source_matches"] = lineage.origin(before)["sha256"] == known.get("source", {}).get(
        "sha256"
    )
    result["exact"] = growth.is_exact(list(after.history)[len(before.history) :])
    result |= {"zero_layers": None, "window_end": None} | growth.compare_models(before, after, seed)
    result["bound"] = growth.difference_bound(before, after)
    result |= {"dead": None, "dead_source": None, "dead_in": [], "locked": None, "locked_in": []}
    if not result["trained"]:
        alive = liveness.check_liveness(after, source=before)
        result |= {"dead": alive["dead"]["entries"], "locked": alive["locked"]["units"]}
        result["dead_source"] = alive["dead"].get("source")
        result |= {f"{kind}_in": alive[kind]["tensors"] for kind in ("dead", "locked")}
    same = not result["exact"] or result["rel_logit_diff"] <= result["bound"]
    steady = result["parallel_vs_recurrent"] is None or result["parallel_vs_recurrent"] <= RECURRENT
    result["holds"] = same and steady and result["source_matches"] and not result["unaccounted"]
    return result


def mixer_layers(checkpoint: Checkpoint) -> list[int]:
    """Layers that hold a mixer."""
    return [layer for layer, spec in enumerate(checkpoint.config.get("mixers") or []) if spec]


def compare_tensors(
    before: Checkpoint, after: Checkpoint, values: bool = True
) -> tuple[list[str], list[str]]:
    """Source tensors that are nowhere in the output and not dropped with a reason; output tensors changed in moving.

    With `values`, every output tensor that comes from the source is read and compared: bit-equal, or per head for
    broadcast ones. Without, only shapes are.
    """
    seen: set[str] = set()
    unequal = []
    for names, name, moved, theirs in iter_inherited_tensors(before, after):
        seen.update(names)
        if values and not is_same_tensor(theirs(), moved(), after.sizes):
            unequal.append(name)
    return sorted(set(before.names.values()) - seen - set(after.dropped)), unequal


def iter_inherited_tensors(
    before: Checkpoint, after: Checkpoint
) -> Iterator[tuple[tuple[str, ...], str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """(source names, output name, read output, read source) of every output tensor that comes from the source."""
    for key, lazy in after.tensors.items():
        role, layer = key
        if key in before.tensors:
            yield (before.names[key],), after.names[key], lazy.read, before.tensors[key].read
        elif layer is not None and (inherited := mixer_weight(after, role, layer).source):
            theirs = before[inherited, layer]
            yield theirs.story.sources, after.names[key], lazy.read, theirs.read


def mixer_weight(checkpoint: Checkpoint, role: str, layer: int) -> WeightSpec:
    """The declaration of the parameter that the anatomy calls ("mixer.<local name>", layer)."""
    spec, attention = checkpoint.config["mixers"][layer], checkpoint.config["attention"][layer]
    return weights(spec, Attention(**attention))[role.removeprefix("mixer.")]


def is_same_tensor(source: Tensor, moved: Tensor, sizes: dict[str, int]) -> bool:
    """Bit-equal, or each query head of `moved` (kv * group * dim, ...) has its head of `source` (kv * dim, ...)."""
    if source.shape == moved.shape:
        return torch.equal(source, moved)
    kv, group, dim = sizes["kv"], sizes["group"], sizes["dim"]
    if source.shape[0] != kv * dim or moved.shape[0] != kv * group * dim:
        return False
    heads = moved.reshape(kv, group, dim, -1)
    return all(torch.equal(heads[:, query], source.reshape(kv, dim, -1)) for query in range(group))


def run_forward_checks(
    before: Checkpoint, after: Checkpoint, trained: bool, seed: int
) -> dict[str, Any]:
    """The receipts that need forward passes; one extra model is in memory at a time."""
    length = min(LENGTH, before.sizes.get("pos", LENGTH))
    tokens = torch.randint(
        0, before.sizes["vocab"], (1, length), generator=torch.Generator().manual_seed(seed)
    )
    reference = compute_logits(modeling.materialize(before), tokens)
    model = modeling.materialize(after)
    ours = compute_logits(model, tokens)
    found: dict[str, Any] = {
        "rel_logit_diff": None if trained else relative_difference(ours, reference),
        "max_abs_logit_diff": None if trained else float((ours - reference).abs().max()),
        "zero_layers": None,
        "window_end": None,
        "parallel_vs_recurrent": relative_difference(compute_recurrent_logits(model, tokens), ours),
    }
    if before.config["model_type"] != "regraft":
        found["zero_layers"] = relative_difference(
            compute_logits(modeling.materialize(Remix(keep="all")(before)), tokens), reference
        )
        if (window := window_only_remix(after)) and not trained:
            with modeling.force_branch(model, "window"):
                shut = compute_logits(model, tokens)
            found["window_end"] = relative_difference(
                shut, compute_logits(modeling.materialize(window(before)), tokens)
            )
    return found


def window_only_remix(after: Checkpoint) -> Remix | None:
    """The pure-window remix that gated layers become when their gates close; None without gated layers."""
    specs = after.config.get("mixers") or []
    gated = [spec for spec in specs if spec and spec["name"] == "gated"]
    if not gated:
        return None
    kept = ",".join(str(layer) for layer, spec in enumerate(specs) if not spec) or "none"
    window = gated[0]["window"]
    return Remix(mixer="window", keep=kept, window=window["window"], sinks=window["sinks"])


@torch.no_grad()
def compute_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """tokens: (batch, time) -> logits (batch, time, vocab), all tokens at once."""
    found: Tensor = model(input_ids=tokens, use_cache=False).logits.float()
    return found


@torch.no_grad()
def compute_recurrent_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The same logits with a cache: a third of the tokens at once, a third at once on top, the rest one by one."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    third = tokens.shape[1] // 3
    pieces = [
        tokens[:, :third],
        tokens[:, third : 2 * third],
        *tokens[:, 2 * third :].split(1, dim=1),
    ]
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
    "parallel_vs_recurrent": "token by token against all at once",
    "exact": "every step keeps the function",
    "bound": "largest relative difference that counts as equal",
    "dead": "entries that no gradient reaches",
    "dead_source": "the source's own that its first gradient misses",
    "locked": "units that stay like another for ever",
    "greedy": f"greedy tokens that agree, of {growth.GREEDY_TOKENS}",
}


def print_receipts(receipts: dict[str, Any], console: Console) -> None:
    """Show receipts to a person."""
    from rich.table import Table

    table = Table("receipt", "value", title="holds" if receipts["holds"] else "does NOT hold")
    for name, meaning in MEANINGS.items():
        if name not in receipts or ("exact" in receipts and receipts[name] is None):
            continue
        table.add_row(meaning, format_receipt(receipts[name]))
    console.print(table)
    for row in [*receipts.get("dead_in", []), *receipts.get("locked_in", [])][:8]:
        count = f"{row['dead']:,} dead" if "dead" in row else "locked"
        console.print(f"{count}: {row['name']}, {row['where']}", soft_wrap=True, highlight=False)


def format_receipt(value: Any) -> str:
    """A receipt's value in a few characters."""
    if value is None:
        return "does not apply"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return (
            ", ".join(value[:3]) + (f" and {len(value) - 3} more" if len(value) > 3 else "")
            if value
            else "none"
        )
    return f"{value:.2e}" if isinstance(value, float) else {True: "yes", False: "NO"}[value]
