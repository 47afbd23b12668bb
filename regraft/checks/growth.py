"""Receipts of growth: the grown model against its source, output by output, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor

from .. import modeling
from ..core import axes
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..growth import build, depth

if TYPE_CHECKING:
    from pathlib import Path

GROWTH_STEPS = (
    "Widen",
    "Deepen",
    "Bridge",
    "Untie",
    "Tie",
    "Carry",
    "Adopt",
    "Learned",
    "Transplant",
)
# Relative differences of logits that rounding alone may cause, by the dtype weights are stored in.
EXACT = 2e-5
BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
POST_NORM_TOLERANCE = 1e-3  # layers behind post-norms are idle up to the norms' epsilon
GREEDY_TOKENS = 24


class ModelDifferences(TypedDict):
    """A model against its source, on the same random input."""

    # Largest difference of any output, relative to that output's largest value.
    rel_logit_diff: float
    max_abs_logit_diff: float
    # Decoding through the cache against all tokens at once, relative; None for encoders.
    parallel_vs_recurrent: float | None
    # Greedy tokens, of GREEDY_TOKENS, that agree from the start; None for encoders.
    greedy: int | None


class Step0(TypedDict):
    """What growth that does not keep the function costs before training."""

    rel_logit_diff: float
    # Next-token losses in nats, of models that predict the next token.
    loss_source: NotRequired[float]
    loss_grown: NotRequired[float]


def growth_steps(after: Checkpoint, before: Checkpoint) -> list[dict[str, Any]]:
    """The growth steps that lie between two checkpoints; empty when nothing grew."""
    steps = list(after.history)[len(before.history) :]
    return [step for step in steps if step.get("step") in GROWTH_STEPS]


def is_exact(steps: list[dict[str, Any]]) -> bool:
    """Whether every step between source and output keeps the function."""
    return all(keeps_function(step) for step in steps)


def keeps_function(step: dict[str, Any]) -> bool:
    """Whether a step of lineage.json keeps the function; steps that are no growth do not."""
    name = step.get("step")
    if name not in ("Widen", "Deepen"):
        return name in ("Bridge", "Store", "Untie", "Tie", "Carry")

    how = step.get("arguments", {}).get("how")
    if not isinstance(how, str):
        raise RegraftError(
            f"the step {name} in lineage.json has how = {how!r}: make the model again"
        )
    return "aki" not in how if name == "Widen" else how in depth.EXACT


def difference_bound(before: Checkpoint, after: Checkpoint) -> float:
    """Largest relative difference of outputs that counts as equal.

    By storage dtype, and wider for families whose new layers stand behind post-norms.
    """
    dtypes = {lazy.dtype for lazy in (*before.tensors.values(), *after.tensors.values())}
    rounding = max([EXACT, *(BOUNDS.get(dtype, EXACT) for dtype in dtypes)])

    # A post-norm normalises the stream once more: where a new layer adds nothing, what is
    # normalised already comes out the same up to the norm's epsilon.
    parts = [placed.part for placed in after.anatomy.place(after.config).values()]
    has_post_norm = any(
        part.norm and part.writes == "stream" and part.axes.kind == "bias" for part in parts
    )
    is_deeper = any(step.get("step") == "Deepen" for step in after.history)
    return max(rounding, POST_NORM_TOLERANCE) if has_post_norm and is_deeper else rounding


@torch.no_grad()
def compute_outputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor that a model gives, by name, in float32.

    Args:
        model: a transformers model.
        inputs: its arguments.
    """
    outputs: dict[str, Tensor] = {}
    for name, value in model(**inputs).items():
        if torch.is_tensor(value) and value.ndim:
            outputs[name] = value.float()
        elif name == "feature_maps":
            outputs |= {f"{name}.{index}": item.float() for index, item in enumerate(value)}
    return outputs


def stream_index(before: Checkpoint, after: Checkpoint) -> Tensor:
    """For every coordinate of the grown stream the old one that it copies, if any, (new,).

    Only operators that draw their copies need it: the draw is repeated with the step's seed. For
    the others the old coordinates are taken in turn, which is where their copies are.
    """
    index = torch.arange(before.sizes["hidden"])
    for step in list(after.history)[len(before.history) :]:
        arguments, old = step.get("arguments", {}), len(index)
        new = arguments.get("hidden") or old
        if new <= old:
            continue
        operator = build.parse_width_operators(arguments.get("how", "pad"))["hidden"]
        if operator in ("duplicate", "aki"):
            index = index[axes.duplicate(old, new, arguments["seed"]).index]
        else:
            index = index[torch.arange(new) % old]
    return index


def max_difference(before: Tensor, after: Tensor, index: Tensor) -> tuple[float, float]:
    """(relative, absolute) largest difference of an output.

    Where the stream itself comes out, wider than it was, its first coordinates must hold the old
    values and every other one those that it copies or, being silent, zeros.

    Args:
        before: output of the source.
        after: the same output of the grown model.
        index: the old coordinate that each new one copies, (new,).
    """
    wider = [axis for axis in range(before.ndim) if before.shape[axis] != after.shape[axis]]
    if not wider:
        worst = float((after - before).abs().max())
        return worst / float(before.abs().max()), worst

    # The stream first: (hidden, ...).
    axis = wider[0]
    width = before.shape[axis]
    old = before.transpose(0, axis)
    first, new = after.transpose(0, axis).split([width, after.shape[axis] - width])

    from_copy = (new - old[index[width:]]).flatten(1).abs().amax(1)
    from_zero = new.flatten(1).abs().amax(1)
    worst = max(float((first - old).abs().max()), float(torch.minimum(from_copy, from_zero).max()))
    return worst / float(before.abs().max()), worst


def compare_models(before: Checkpoint, after: Checkpoint, seed: int) -> ModelDifferences:
    """Run both on the same random input; causal ones also write GREEDY_TOKENS tokens each.

    RegraftError when the grown model lacks an output of its source.

    Args:
        before: the source.
        after: the grown model.
        seed: of the input.
    """
    inputs = modeling.random_inputs(before, seed=seed)
    causal = before.anatomy.continues_text(before.config)

    # One model is in memory at a time.
    model = modeling.materialize(before)
    reference = compute_outputs(model, inputs)
    text = generate_greedy(model, inputs) if causal else None
    del model
    model = modeling.materialize(after)
    outputs = compute_outputs(model, inputs)
    if missing := sorted(set(reference) - set(outputs)):
        raise RegraftError(
            f"'{after.origin}' gives no '{missing[0]}' as its source does: "
            "name the source it came from"
        )

    # The cache is wider with the model; decoding through it is compared instead.
    index = stream_index(before, after)
    pairs = [
        max_difference(value, outputs[name], index)
        for name, value in reference.items()
        if name != modeling.CACHE
    ]
    differences: ModelDifferences = {
        "rel_logit_diff": max(relative for relative, _ in pairs),
        "max_abs_logit_diff": max(absolute for _, absolute in pairs),
        "parallel_vs_recurrent": None,
        "greedy": None,
    }
    if text is not None:
        differences["parallel_vs_recurrent"] = cached_decoding_difference(
            model, inputs, outputs["logits"]
        )
        differences["greedy"] = count_agreeing(text, generate_greedy(model, inputs))
    return differences


@torch.no_grad()
def generate_greedy(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """GREEDY_TOKENS greedy tokens after the first row of the input, (tokens,)."""
    ids = inputs["input_ids"][:1]
    sequence: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY_TOKENS,
        min_new_tokens=GREEDY_TOKENS,
        do_sample=False,
    )
    return sequence[0, ids.shape[1] :]


def count_agreeing(left: Tensor, right: Tensor) -> int:
    """How many tokens agree before the first that differs."""
    equal = (left == right).long()
    return int(equal.cumprod(0).sum())


@torch.no_grad()
def cached_decoding_difference(model: Any, inputs: dict[str, Tensor], logits: Tensor) -> float:
    """Half of the tokens at once, the rest one by one through the cache, against all at once.

    Args:
        model: what is run.
        inputs: with `input_ids`.
        logits: of all tokens at once, (batch, time, vocab).
    """
    ids = inputs["input_ids"]
    half = ids.shape[1] // 2
    cache, pieces = None, []
    for piece in [ids[:, :half], *ids[:, half:].split(1, dim=1)]:
        out = model(input_ids=piece, **modeling.cache_kwargs(cache), use_cache=True)
        cache = modeling.cache_of(out)
        pieces.append(out.logits.float())
    return float((torch.cat(pieces, 1) - logits).abs().max() / logits.abs().max())


def measure_step0(source: str | Path, out: str | Path, length: int = 256) -> Step0:
    """What an operator that does not keep the function costs before training.

    Args:
        source: the model that grew.
        out: the grown model.
        length: tokens of held-out text, or random ones without a tokenizer.
    """
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    # An encoder may count positions from two.
    length = min(length, before.sizes.get("pos", length + 2) - 2)
    inputs = load_held_out_tokens(before, length) or modeling.random_inputs(before, length=length)

    first, second = (
        compute_outputs(modeling.materialize(each), inputs) for each in (before, after)
    )
    name = next(iter(first))
    relative, _ = max_difference(first[name], second[name], stream_index(before, after))
    step0: Step0 = {"rel_logit_diff": relative}
    if before.anatomy.continues_text(before.config):
        step0["loss_source"] = next_token_loss(first, inputs)
        step0["loss_grown"] = next_token_loss(second, inputs)
    return step0


def format_step0(step0: Step0) -> str:
    """What growth cost, in words."""
    words = f"Not exact: outputs move by {step0['rel_logit_diff']:.2g} of their largest"
    if "loss_source" in step0:
        words += (
            f"; next-token loss {step0['loss_source']:.3f} before, "
            f"{step0['loss_grown']:.3f} after growth"
        )
    return words


def load_held_out_tokens(checkpoint: Checkpoint, length: int) -> dict[str, Tensor] | None:
    """The beginning of the held-out documentation as token ids; None without a tokenizer."""
    from ..data.default_text import heldout_topics

    if checkpoint.anatomy.inputs != "tokens":
        return None
    try:
        tokenizer = modeling.load_tokenizer(checkpoint.path)
    except RegraftError:
        return None
    ids = tokenizer(heldout_topics()[0], return_tensors="pt")["input_ids"][:, :length]
    return {"input_ids": ids}


def next_token_loss(outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> float:
    """Mean next-token cross-entropy in nats."""
    logits, ids = outputs["logits"][:, :-1], inputs["input_ids"][:, 1:]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def find_unaccounted(before: Checkpoint, after: Checkpoint) -> list[str]:
    """Source tensors that no tensor of the output comes from, nor were dropped with a reason."""
    had, has = (
        {name for lazy in each.tensors.values() for name in lazy.provenance.sources}
        for each in (before, after)
    )
    return sorted(had - has - set(after.dropped))
