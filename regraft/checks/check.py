"""Receipts: what can be proved about an output against its source, by reading and running both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from .. import modeling
from ..core import lineage
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..mixers.attention import Attention
from ..mixers.registry import weights
from ..mixers.remix import Remix
from ..mixers.weight_spec import WeightSpec
from ..progress import ProgressCallback
from . import conversion, growth, liveness
from .images import cached_image_difference, draw_image_inputs
from .outputs import (
    cached_difference,
    compare_models,
    compute_outputs,
    find_kept_tokens,
    keep_known_tokens,
    relative_difference,
    steps_between,
)
from .reach import find_reach
from .receipts import Receipts, find_failures, print_receipts
from .replay import find_config_differences, find_unequal, replay_steps

__all__ = ["Receipts", "check", "print_receipts"]

# Largest relative differences of logits that count as equal.
EXACT = 1e-6
WINDOW_END = 1e-5
RECURRENT = 1e-4


class ForwardChecks(TypedDict):
    """The receipts of a linearized model that need forward passes; see `Receipts`."""

    reached_tokens: int
    reach_limited: str | None
    compared: list[str]
    rel_logit_diff: float | None
    max_abs_logit_diff: float | None
    zero_layers: float | None
    window_end: float | None
    window_vs_stock: float | None
    window_vs_stock_layer: int | None
    image_vs_stock: float | None
    parallel_vs_recurrent: float


class ReplayChecks(TypedDict):
    """The receipts of what the recorded steps make of the source; see `Receipts`."""

    unequal: list[str] | None
    config_differs: list[str] | None
    not_replayed: str | None


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


def check(
    source: str | Path,
    out: str | Path,
    seed: int = 0,
    progress: ProgressCallback = lambda share, words: None,
) -> Receipts:
    """Every receipt of an output against the source it was made from.

    Both are read as transformers' own classes read them, and run on random tokens in float32; then
    the steps that lineage.json names are done again on the source. A trained output has moved its
    weights on purpose: only its shapes, its source's hash and its own consistency count.

    RegraftError when the output was not made from this source, or when files are damaged.

    Args:
        source: directory or GGUF file of the source.
        out: directory of the output.
        seed: of the random tokens.
        progress: told the share of a phase that is done, and what it does.
    """
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    before.verify()
    after.verify()
    has_grown = bool(growth.growth_steps(after, before))
    # A form that models are served in has axes of its own, and may have wider heads.
    shared = ("vocab", "hidden", "ffn", "depth") if after.anatomy.served_only else after.sizes
    if not has_grown and any(after.sizes[one] != before.sizes.get(one) for one in shared):
        raise RegraftError(
            f"'{out}' was not made from '{source}': axes {after.sizes} against {before.sizes}; "
            "name its source"
        )
    if after.config["model_type"] == "regraft" and not has_grown:
        return check_linearized(before, after, seed, progress)
    return check_growth(before, after, seed, progress)


def check_linearized(
    before: Checkpoint, after: Checkpoint, seed: int, progress: ProgressCallback
) -> Receipts:
    """Receipts of a linearized model: moved tensors, its branches, its decoding.

    Args:
        before: the source.
        after: a linearized model of the same sizes.
        seed: of the random tokens.
        progress: told how far it is.
    """
    trained = lineage.is_trained(lineage.read_lineage(after.path))
    replayed = run_replay(before, after, progress)
    # Steps of another version: values that were moved can still be compared one by one.
    values = replayed["unequal"] is None and not trained
    unaccounted, unequal = compare_tensors(before, after, values=values)
    if values:
        replayed["unequal"] = unequal
    receipts: Receipts = {
        "holds": False,
        "failed": [],
        "reference": "stock",
        "trained": trained,
        "unaccounted": unaccounted,
        **replayed,
        "source_matches": source_matches(before, after),
        **run_forward_checks(before, after, trained, seed, progress),
    }

    bounds = {
        "zero_layers": EXACT,
        "window_end": WINDOW_END,
        "window_vs_stock": conversion.BOUND,
        "image_vs_stock": conversion.BOUND,
        "parallel_vs_recurrent": bound_cached_difference(before, after, seed, receipts),
    }
    # A linearized model differs from its source, and a trained one: only a moved one must not.
    if not mixer_layers(after) and not trained:
        bounds["rel_logit_diff"] = EXACT
    return conclude(receipts, bounds)


def check_growth(
    before: Checkpoint, after: Checkpoint, seed: int, progress: ProgressCallback
) -> Receipts:
    """Receipts of a grown or moved model: outputs, layers, greedy text, cached decoding, tensors,
    dead and duplicate units.

    Steps that do not keep the function, and training, leave the difference of outputs unbound; it
    is measured all the same.

    Args:
        before: the source.
        after: the result.
        seed: of the input.
        progress: told how far it is.
    """
    trained = lineage.is_trained(lineage.read_lineage(after.path))
    exact = growth.is_exact(steps_between(before, after))
    bound = growth.difference_bound(before, after)
    receipts: Receipts = {
        "holds": False,
        "failed": [],
        "reference": "stock",
        "trained": trained,
        **run_replay(before, after, progress),
        "unaccounted": growth.find_unaccounted(before, after),
        "source_matches": source_matches(before, after),
        "exact": exact,
        "zero_layers": None,
        "window_end": None,
        **conversion.NO_WINDOW,
        **compare_models(before, after, seed, exact, progress),
        "bound": bound,
        "dead": None,
        "dead_source": None,
        "dead_in": [],
        "locked": None,
        "locked_in": [],
    }
    bounds = {"parallel_vs_recurrent": bound_cached_difference(before, after, seed, receipts)}
    if exact:
        # Two scores may each be off by the bound.
        bounds |= {"rel_logit_diff": bound, "hidden_diff": bound}
        if growth.keeps_choices(steps_between(before, after)):
            bounds["greedy_gap"] = 2 * bound
    conclude(receipts, bounds)

    # Training separates and wakes units: only a model that was just grown shows what growth did.
    if receipts["holds"] and growth.growth_steps(after, before) and not trained:
        progress(0.8, "a few steps of training")
        alive = liveness.check_liveness(after, source=before)
        receipts["dead"] = alive["dead"]["entries"]
        receipts["dead_source"] = alive["dead"].get("source")
        receipts["dead_in"] = alive["dead"]["tensors"]
        receipts["locked"] = alive["locked"]["units"]
        receipts["locked_in"] = alive["locked"]["tensors"]
    return receipts


def bound_cached_difference(
    before: Checkpoint, after: Checkpoint, seed: int, receipts: Receipts
) -> float:
    """How far decoding through the cache may be from all tokens at once.

    Some classes do not go on from a cache with several tokens as they should (Jamba, Bamba). Where
    the result is above RECURRENT, the source is measured, too; its difference is put into
    `receipts`, and twice of it is allowed.

    Args:
        before: the source.
        after: the result.
        seed: of the input.
        receipts: of the result.
    """
    found = receipts["parallel_vs_recurrent"]
    if found is None or found <= RECURRENT or before.config["model_type"] == "regraft":
        return RECURRENT
    model = modeling.load_stored(before)
    reach = find_reach(before, after, model)
    inputs = modeling.random_inputs(before, length=reach.length, seed=seed)
    tokens = keep_known_tokens(inputs, find_kept_tokens(before, after))["input_ids"]
    with torch.no_grad():
        own = cached_difference(model, tokens, compute_logits(model, tokens), reach)
    receipts["parallel_vs_recurrent_source"] = own
    return max(RECURRENT, 2 * own)


def conclude(receipts: Receipts, bounds: dict[str, float]) -> Receipts:
    """Receipts with the verdict filled in; `bounds` as of `find_failures`."""
    receipts["failed"] = find_failures(receipts, bounds)
    receipts["holds"] = not receipts["failed"]
    return receipts


def run_replay(before: Checkpoint, after: Checkpoint, progress: ProgressCallback) -> ReplayChecks:
    """The receipts of doing the recorded steps again.

    Args:
        before: the source.
        after: the output.
        progress: told how far it is.
    """
    made, reason = replay_steps(before, after)
    if made is None:
        return {"unequal": None, "config_differs": None, "not_replayed": reason}
    return {
        "unequal": find_unequal(made, after, progress),
        "config_differs": find_config_differences(made, after),
        "not_replayed": None,
    }


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
    before: Checkpoint, after: Checkpoint, trained: bool, seed: int, progress: ProgressCallback
) -> ForwardChecks:
    """The receipts that need forward passes; one extra model is in memory at a time.

    Args:
        before: the source.
        after: a linearized model of the same sizes.
        trained: whether the output's weights moved on purpose.
        seed: of the random tokens.
        progress: told how far it is.
    """
    progress(0.0, "the source")
    teacher = modeling.load_stored(before)
    reach = find_reach(before, after, teacher)
    tokens = modeling.random_inputs(before, length=reach.length, seed=seed)["input_ids"]
    reference = compute_logits(teacher, tokens)
    images = draw_image_inputs(before, after, teacher, seed)
    image_reference = compute_outputs(teacher, images)["logits"] if images else None
    del teacher

    progress(0.3, "the result")
    model = modeling.load_stored(after)
    logits = compute_logits(model, tokens)
    checks: ForwardChecks = {
        "reached_tokens": reach.length,
        "reach_limited": reach.limited,
        "compared": ["logits", "cache"],
        "rel_logit_diff": None if trained else relative_difference(logits, reference),
        "max_abs_logit_diff": None if trained else float((logits - reference).abs().max()),
        "zero_layers": None,
        "window_end": None,
        **conversion.NO_WINDOW,
        "image_vs_stock": None,
        "parallel_vs_recurrent": cached_difference(model, tokens, logits, reach),
    }
    if images:
        checks["compared"] += ["logits with an image", "cache with an image"]
        cached = cached_image_difference(model, images)
        checks["parallel_vs_recurrent"] = max(checks["parallel_vs_recurrent"], cached)

    # A source that is regraft's own has been through this when it was made.
    if before.config["model_type"] == "regraft":
        return checks
    progress(0.6, "no layer linearized")
    unchanged = modeling.materialize(Remix(keep="all")(before))
    checks["zero_layers"] = relative_difference(compute_logits(unchanged, tokens), reference)
    del unchanged
    if image_reference is not None:
        windows = modeling.materialize(see_all(before, after, images["input_ids"].shape[1]))
        given = compute_outputs(windows, images)["logits"]
        checks["image_vs_stock"] = relative_difference(given, image_reference)
        del windows

    if not trained:
        checks.update(conversion.compare_windows(before, after, model, tokens))
    if (window := window_only_remix(after)) and not trained:
        progress(0.8, "the window alone")
        with modeling.force_branch(model, "window"):
            shut = compute_logits(model, tokens)
        window_logits = compute_logits(modeling.materialize(window(before)), tokens)
        checks["window_end"] = relative_difference(shut, window_logits)
    return checks


def see_all(before: Checkpoint, after: Checkpoint, length: int) -> Checkpoint:
    """The source with a window of `length` tokens in every layer that has a mixer in the output."""
    kept = set(range(after.layers)) - set(mixer_layers(after))
    names = ",".join(map(str, sorted(kept))) or "none"
    return Remix(mixer="window", window=length, sinks=0, keep=names)(before)


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
