"""Receipts of growth: the grown model against its source, output by output, token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import modeling
from ..core import axes
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..growth import build, depth

if TYPE_CHECKING:
    from pathlib import Path

STEPS = {
    "Widen": lambda arguments: "aki" not in arguments["how"],
    "Deepen": lambda arguments: arguments["how"] in depth.EXACT,
    "Bridge": lambda arguments: True,
    "Store": lambda arguments: True,
    "Learned": lambda arguments: False,
    "Transplant": lambda arguments: False,
}
BOUNDS = {
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}  # what rounding the stored weights may move logits by
EXACT = 2e-5
POST_NORM_TOLERANCE = 1e-3  # layers behind post-norms are idle up to the norms' epsilon
GREEDY_TOKENS = 24


def growth_steps(after: Checkpoint, before: Checkpoint) -> list[dict[str, Any]]:
    """The growth steps that lie between two checkpoints; empty when nothing grew."""
    steps = list(after.history)[len(before.history) :]
    return [
        step
        for step in steps
        if step.get("step") in ("Widen", "Deepen", "Bridge", "Learned", "Transplant")
    ]


def is_exact(steps: list[dict[str, Any]]) -> bool:
    """Whether every step between source and output keeps the function."""
    return all(
        step.get("step") in STEPS and STEPS[step["step"]](step["arguments"]) for step in steps
    )


def difference_bound(before: Checkpoint, after: Checkpoint) -> float:
    """Largest relative difference that counts as equal: by storage dtype, and by the norms of post-norm families."""
    dtype = {lazy.dtype for lazy in (*before.tensors.values(), *after.tensors.values())}
    rounded = max([EXACT, *[BOUNDS.get(one, EXACT) for one in dtype]])
    parts = [spot.part for spot in after.anatomy.place(after.config).values()]
    post = any(part.norm and part.writes == "stream" and part.axes.kind == "bias" for part in parts)
    deeper = any(step.get("step") == "Deepen" for step in after.history)
    return max(rounded, POST_NORM_TOLERANCE) if post and deeper else rounded


@torch.no_grad()
def compute_outputs(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor a model gives, by name, in float32."""
    found: dict[str, Tensor] = {}
    for name, value in model(**given).items():
        if torch.is_tensor(value) and value.ndim:
            found[name] = value.float()
        elif name == "feature_maps":
            found |= {f"{name}.{index}": item.float() for index, item in enumerate(value)}
    return found


def stream_index(before: Checkpoint, after: Checkpoint) -> Tensor:
    """For every coordinate of the grown stream the old one that it copies, if it copies any, (new,)."""
    index = torch.arange(before.sizes["hidden"])
    for step in list(after.history)[len(before.history) :]:
        arguments, old = step.get("arguments", {}), len(index)
        new = arguments.get("hidden") or old
        if new > old:
            drawn = build.parse_width_operators(arguments.get("how", "pad"))["hidden"] in (
                "duplicate",
                "aki",
            )
            index = index[
                axes.duplicate(old, new, arguments["seed"]).index
                if drawn
                else torch.arange(new) % old
            ]
    return index


def max_difference(before: Tensor, after: Tensor, index: Tensor) -> tuple[float, float]:
    """(relative, absolute) largest difference. Where the stream itself comes out, wider than it was, its first
    coordinates must hold the old values and every other one those that it copies (`index`) or, being silent, zeros.
    """
    axis = next(
        (axis for axis in range(before.ndim) if before.shape[axis] != after.shape[axis]), None
    )
    if axis is None:
        worst = float((after - before).abs().max())
    else:
        width = before.shape[axis]
        first, new = after.transpose(0, axis).split([width, after.shape[axis] - width])
        old = before.transpose(0, axis)
        copied, silent = (
            (new - value).flatten(1).abs().amax(1)
            for value in (old[index[width:]], torch.zeros(()))
        )
        worst = max(float((first - old).abs().max()), float(torch.minimum(copied, silent).max()))
    return worst / float(before.abs().max()), worst


def compare_models(before: Checkpoint, after: Checkpoint, seed: int) -> dict[str, Any]:
    """Run both on the same random input, one model in memory at a time; causal ones also write `NEW` tokens each.

    Returns rel_logit_diff, max_abs_logit_diff, parallel_vs_recurrent, greedy (how many of NEW greedy tokens agree from
    the start, None for encoders).
    """
    given = modeling.random_inputs(before, seed=seed)
    causal = before.anatomy.causal
    model = modeling.materialize(before)
    reference, text = (
        compute_outputs(model, given),
        generate_greedy(model, given) if causal else None,
    )
    del model
    model = modeling.materialize(after)
    ours = compute_outputs(model, given)
    if missing := sorted(set(reference) - set(ours)):
        raise RegraftError(
            f"'{after.origin}' gives no '{missing[0]}' as its source does: name the source it came from"
        )
    index = stream_index(before, after)
    pairs = [
        max_difference(value, ours[name], index)
        for name, value in reference.items()
        if name != modeling.CACHE
    ]
    found: dict[str, Any] = {
        "rel_logit_diff": max(relative for relative, _ in pairs),
        "max_abs_logit_diff": max(absolute for _, absolute in pairs),
        "parallel_vs_recurrent": None,
        "greedy": None,
    }
    if text is not None:
        found["parallel_vs_recurrent"] = cached_decoding_difference(model, given, ours["logits"])
        found["greedy"] = count_agreeing(text, generate_greedy(model, given))
    return found


@torch.no_grad()
def generate_greedy(model: Any, given: dict[str, Tensor]) -> Tensor:
    """NEW greedy tokens after the given ones."""
    ids = given["input_ids"][:1]
    made: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=GREEDY_TOKENS,
        min_new_tokens=GREEDY_TOKENS,
        do_sample=False,
    )
    return made[0, ids.shape[1] :]


def count_agreeing(left: Tensor, right: Tensor) -> int:
    """How many tokens agree before the first that differs."""
    equal = (left == right).long()
    return int(equal.cumprod(0).sum())


@torch.no_grad()
def cached_decoding_difference(model: Any, given: dict[str, Tensor], logits: Tensor) -> float:
    """Half of the tokens at once, the rest one by one through the cache: relative difference to all at once."""
    ids = given["input_ids"]
    half = ids.shape[1] // 2
    cache, pieces = None, []
    for piece in [ids[:, :half], *ids[:, half:].split(1, dim=1)]:
        out = model(input_ids=piece, **modeling.cache_kwargs(cache), use_cache=True)
        cache = modeling.cache_of(out)
        pieces.append(out.logits.float())
    return float((torch.cat(pieces, 1) - logits).abs().max() / logits.abs().max())


def measure_step0(source: str | Path, out: str | Path, length: int = 256) -> dict[str, float]:
    """Next-token loss of source and output on held-out text (random tokens without a tokenizer), and the relative
    difference of their outputs: what an operator that does not keep the function costs before training.
    """
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    length = min(
        length, before.sizes.get("pos", length + 2) - 2
    )  # an encoder may count positions from two
    given = load_held_out_tokens(before, length) or modeling.random_inputs(before, length=length)
    first, second = (compute_outputs(modeling.materialize(each), given) for each in (before, after))
    name = next(iter(first))
    found = {
        "rel_logit_diff": max_difference(first[name], second[name], stream_index(before, after))[0]
    }
    if before.anatomy.causal:
        found |= {
            "loss_source": next_token_loss(first, given),
            "loss_grown": next_token_loss(second, given),
        }
    return found


def format_step0(found: dict[str, float]) -> str:
    """`step0` in words."""
    words = f"Not exact: outputs move by {found['rel_logit_diff']:.2g} of their largest"
    if "loss_source" in found:
        words += f"; next-token loss {found['loss_source']:.3f} before, {found['loss_grown']:.3f} after growth"
    return words


def load_held_out_tokens(checkpoint: Checkpoint, length: int) -> dict[str, Tensor] | None:
    """The beginning of the held-out documentation as token ids, None without a tokenizer."""
    from ..data.default_text import heldout_topics

    if checkpoint.anatomy.inputs != "tokens":
        return None
    try:
        tokenizer = modeling.load_tokenizer(checkpoint.path)
    except RegraftError:
        return None
    ids = tokenizer(heldout_topics()[0], return_tensors="pt")["input_ids"][:, :length]
    return {"input_ids": ids}


def next_token_loss(found: dict[str, Tensor], given: dict[str, Tensor]) -> float:
    """Mean next-token cross-entropy in nats."""
    logits, ids = found["logits"][:, :-1], given["input_ids"][:, 1:]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def find_unaccounted(before: Checkpoint, after: Checkpoint) -> list[str]:
    """Source tensors that no tensor of the output comes from and that were not dropped with a reason."""
    had, has = (
        {name for lazy in each.tensors.values() for name in lazy.story.sources}
        for each in (before, after)
    )
    return sorted(had - has - set(after.dropped))
