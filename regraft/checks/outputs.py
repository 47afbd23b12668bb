"""Two models on the same random input: what each gives, layer by layer, as text, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from .. import modeling
from ..core import axes
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError, explain_errors
from ..growth import build, depth
from ..progress import ProgressCallback
from .images import draw_image_inputs
from .reach import LENGTH, Reach, find_reach

GREEDY_TOKENS = 24
AROUND_ROLL = range(-4, 8)  # tokens decoded one by one where a cache begins to roll over
LAST_TOKENS = 16  # and at the end
SHOWN = ("logits", "last_hidden_state")  # what is compared of a text with an image


class ModelDifferences(TypedDict):
    """A model against its source, on the same random input."""

    # Largest difference of any output, relative to that output's largest value.
    rel_logit_diff: float
    max_abs_logit_diff: float
    # The same of the residual stream between layers; None where it cannot be compared.
    hidden_diff: float | None
    # Decoding through the cache against all tokens at once, relative; None for encoders.
    parallel_vs_recurrent: float | None
    # Greedy tokens that agree from the start, of how many; None for encoders.
    greedy: int | None
    greedy_tokens: int | None
    # Where texts part: how far the source's choice was ahead of the model's, relative to logits.
    greedy_gap: float | None
    # Tokens of the rows, what lies beyond them and why, and what was compared on them.
    reached_tokens: int
    reach_limited: str | None
    compared: list[str]


@dataclass(frozen=True)
class Behaviour:
    """What a model gives on random input, in float32.

    Attributes:
        outputs: every output tensor by name.
        hidden: the residual stream before the first layer and after each, (batch, time, hidden).
        text: greedy tokens, (tokens,); None for encoders.
        scores: of each greedy token among all, (tokens, vocab).
    """

    outputs: dict[str, Tensor]
    hidden: list[Tensor]
    text: Tensor | None = None
    scores: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def compute_outputs(model: Any, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Every tensor that a model gives, by name, in float32; those of a tuple as `name.index`.

    Args:
        model: a transformers model.
        inputs: its arguments.
        options: further arguments, such as `output_hidden_states`.
    """
    outputs: dict[str, Tensor] = {}
    for name, value in model(**inputs, **options).items():
        if torch.is_tensor(value) and value.ndim:
            outputs[name] = value.float()
        elif name in ("feature_maps", "hidden_states"):
            outputs |= {f"{name}.{index}": item.float() for index, item in enumerate(value)}
    return outputs


def observe(
    model: Any,
    inputs: dict[str, Tensor],
    reach: Reach,
    causal: bool,
    images: dict[str, Tensor] | None = None,
) -> Behaviour:
    """What a model gives on an input; RegraftError when it cannot run on it.

    Args:
        model: a transformers model.
        inputs: its arguments.
        reach: of the comparison.
        causal: whether it continues text.
        images: arguments with an image among the tokens, for models that take one.
    """
    what = f"{type(model).__name__} cannot run on {reach.length} tokens"
    with explain_errors(what, "config.json and weights do not belong together, make it again"):
        outputs = compute_outputs(model, inputs, output_hidden_states=True)
        hidden = [outputs.pop(name) for name in list(outputs) if name.startswith("hidden_states.")]
        if images:
            shown = compute_outputs(model, images)
            outputs |= {f"{name} with an image": shown[name] for name in SHOWN if name in shown}
        if not causal:
            return Behaviour(outputs, hidden)
        text, scores = generate_greedy(model, inputs["input_ids"], reach.positions)
        return Behaviour(outputs, hidden, text, scores)


@torch.no_grad()
def generate_greedy(model: Any, ids: Tensor, positions: int | None) -> tuple[Tensor, Tensor]:
    """(greedy tokens after the beginning of the first row (tokens,), scores (tokens, vocab)).

    Args:
        model: a causal transformers model.
        ids: (rows, time).
        positions: most tokens that the model takes; None: there is no limit.
    """
    room = ids.shape[1] + GREEDY_TOKENS if positions is None else positions
    count = min(GREEDY_TOKENS, room // 2)
    prompt = ids[:1, : min(LENGTH, room - count)]
    if not count:
        return ids.new_empty(0), torch.empty(0)
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        num_beams=1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return found.sequences[0, prompt.shape[1] :], torch.cat(found.scores).float()


def compare_models(
    before: Checkpoint,
    after: Checkpoint,
    seed: int,
    exact: bool = True,
    progress: ProgressCallback = lambda share, words: None,
) -> ModelDifferences:
    """Run both as transformers loads them, on the same random input.

    Causal ones also write up to GREEDY_TOKENS tokens each and decode through the cache.

    RegraftError when the result lacks an output of its source, or cannot run.

    Args:
        before: the source, as opened.
        after: the result, as opened.
        seed: of the input.
        exact: whether the steps between them keep the function; else layers are not compared.
        progress: told how far it is.
    """
    causal = before.anatomy.continues_text(before.config)

    # One model is in memory at a time.
    progress(0.0, "the source")
    model = modeling.load_stored(before)
    reach = find_reach(before, after, model)
    inputs = modeling.random_inputs(before, length=reach.length, seed=seed)
    kept = find_kept_tokens(before, after)
    inputs = keep_known_tokens(inputs, kept)
    images = draw_image_inputs(before, after, model, seed)
    reference = observe(model, inputs, reach, causal, images)
    del model
    progress(0.3, "the result")
    model = modeling.load_stored(after)
    found = observe(model, inputs, reach, causal, images)
    if missing := sorted(set(reference.outputs) - set(found.outputs)):
        raise RegraftError(
            f"'{after.origin}' gives no '{missing[0]}' as its source does: "
            "name the source it came from"
        )

    for name, value in reference.outputs.items():
        if before.anatomy.inputs == "texts and images" and name.endswith("_embeds"):
            found.outputs[name] = lengthen(found.outputs[name], value.shape[-1])

    # The cache is wider with the model; decoding through it is compared instead.
    index = stream_index(before, after)
    pairs = {
        name: max_difference(
            *select_tokens((value, found.outputs[name]), before, after, kept), index
        )
        for name, value in reference.outputs.items()
        if name != modeling.CACHE
    }
    hidden = hidden_difference(reference.hidden, found.hidden, layer_order(before, after))
    differences: ModelDifferences = {
        "rel_logit_diff": max(relative for relative, _ in pairs.values()),
        "max_abs_logit_diff": max(absolute for _, absolute in pairs.values()),
        "hidden_diff": hidden if exact else None,
        "parallel_vs_recurrent": None,
        "greedy": None,
        "greedy_tokens": None,
        "greedy_gap": None,
        "reached_tokens": reach.length,
        "reach_limited": reach.limited,
        "compared": list(pairs),
    }
    if differences["hidden_diff"] is not None:
        differences["compared"].append("hidden states")
    if reference.text is not None and found.text is not None:
        progress(0.6, "token by token")
        differences["greedy"] = count_agreeing(reference.text, found.text)
        differences["greedy_tokens"] = len(reference.text)
        differences["greedy_gap"] = greedy_gap(reference, found)
        differences["parallel_vs_recurrent"] = cached_difference(
            model, inputs["input_ids"], found.outputs["logits"], reach
        )
        differences["compared"] += ["greedy text", "cache"]
    return differences


def lengthen(vectors: Tensor, width: int) -> Tensor:
    """Vectors of length one as long as the copies in them make them, if each were of length one.

    Args:
        vectors: (batch, new width).
        width: of each copy.
    """
    return vectors * (vectors.shape[-1] / width) ** 0.5


def steps_between(before: Checkpoint, after: Checkpoint) -> list[dict[str, Any]]:
    """The steps of a result that its source does not have.

    The source may be opened with a step of its own, such as `OpenUntied`, that the result lacks.
    """
    shared = 0
    for ours, theirs in zip(before.history, after.history, strict=False):
        if ours != theirs:
            break
        shared += 1
    return list(after.history)[shared:]


def find_kept_tokens(before: Checkpoint, after: Checkpoint) -> Tensor | None:
    """Ids of the source whose rows the result has kept, (tokens,); None where no row changed.

    Rows that growth adds are left out, and those of the source that no token had and new ones took.
    """
    steps = [step for step in steps_between(before, after) if step.get("step") == "GrowVocab"]
    if not steps:
        return None
    overwritten = {row for step in steps for row in step.get("overwritten", ())}
    return torch.tensor([row for row in range(before.sizes["vocab"]) if row not in overwritten])


def keep_known_tokens(inputs: dict[str, Tensor], kept: Tensor | None) -> dict[str, Tensor]:
    """Inputs in which ids that are not kept are replaced by some that are."""
    if kept is None:
        return inputs
    ids = inputs["input_ids"]
    known = torch.isin(ids, kept)
    return inputs | {"input_ids": torch.where(known, ids, kept[ids % len(kept)])}


def select_tokens(
    outputs: tuple[Tensor, Tensor], before: Checkpoint, after: Checkpoint, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """An output of source and result, of logits over the vocabulary only those of kept tokens.

    Args:
        outputs: of the source and of the result.
        before: the source.
        after: the result.
        kept: ids of tokens that both have; None: all.
    """
    sizes = tuple(one.sizes.get("vocab") for one in (before, after))
    if kept is None or sizes != tuple(value.shape[-1] for value in outputs):
        return outputs
    return outputs[0][..., kept], outputs[1][..., kept]


def stream_index(before: Checkpoint, after: Checkpoint) -> Tensor:
    """For every coordinate of the grown stream the old one that it copies, if any, (new,).

    Only operators that draw their copies need it: the draw is repeated with the step's seed. For
    the others the old coordinates are taken in turn, which is where their copies are.
    """
    index = torch.arange(before.sizes["hidden"])
    for step in steps_between(before, after):
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


def layer_order(before: Checkpoint, after: Checkpoint) -> list[int]:
    """For every layer of the result how many layers of the source are done after it, (new,)."""
    done = list(range(1, before.layers + 1))
    for step in steps_between(before, after):
        arguments = step.get("arguments", {})
        if step.get("step") == "Deepen":
            first = before.anatomy.first_layers(before.config)
            layers = arguments["layers"] or arguments.get("decoder_layers") or len(done)
            order = depth.build_layer_order(arguments["how"], len(done), layers, first)
            counts = step.get("layers_done") or [origin.source + 1 for origin in order]
            done = [done[count - 1] for count in counts]
    return done


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a - b).abs().max() / b.abs().max())


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


def hidden_difference(before: list[Tensor], after: list[Tensor], order: list[int]) -> float | None:
    """Largest difference of the stream between layers, relative to its largest value there.

    A wider stream may hold the old coordinates, which are its first ones, times a factor. Its other
    coordinates are not compared, nor is what the source shows only behind its last norm.

    Args:
        before: of the source, before its first layer and after each, (batch, time, hidden).
        after: of the result.
        order: for every layer of the result how many layers of the source are done after it.
    """
    if len(before) < 2 or len(after) != len(order) + 1 or len(before) != order[-1] + 1:
        return None
    # Behind several layers of which all but one are new, the last state: between them a post-norm's
    # gain may still be missing.
    last = {0: after[0], **dict(zip(order, after[1:], strict=True))}
    pairs = [(before[done], state) for done, state in last.items() if done < order[-1]]
    # The last entries are the outputs of the last norm.
    worst = 0.0
    for states in (pairs, [(before[-1], after[-1])]):
        width = states[0][0].shape[-1]
        if any(old.ndim != 3 or new.shape[-1] < width for old, new in states):
            return None
        factor = 1.0
        if states[0][1].shape[-1] > width:
            old, new = states[0]
            factor = float((old * new[..., :width]).sum() / old.square().sum())
        for old, new in states:
            error = (new[..., :width] - factor * old).abs().max()
            worst = max(worst, float(error / (factor * old).abs().max().clamp(min=1e-30)))
    return worst


def count_agreeing(left: Tensor, right: Tensor) -> int:
    """How many tokens agree before the first that differs."""
    equal = (left == right).long()
    return int(equal.cumprod(0).sum())


def greedy_gap(reference: Behaviour, found: Behaviour) -> float:
    """How far the source's token was ahead of the result's where their texts part, 0 if nowhere.

    Relative to the source's largest score: two tokens that rounding may swap are close. A token
    that the source does not have is ahead by the result's own scores.
    """
    assert reference.text is not None and found.text is not None
    place = count_agreeing(reference.text, found.text)
    if place == len(reference.text):
        return 0.0
    scores, chosen = reference.scores[place], found.text[place]
    if chosen >= len(scores):
        scores = found.scores[place]
    ahead = (scores[reference.text[place]] - scores[chosen]).abs()
    return float(ahead / scores[scores.isfinite()].abs().max())


@torch.no_grad()
def cached_difference(model: Any, ids: Tensor, logits: Tensor, reach: Reach) -> float:
    """Decoding through the cache against all tokens at once, relative to the largest logit.

    A prefill, one that goes on from it, single tokens around each place where the cache rolls over
    and at the end.

    Args:
        model: what is run.
        ids: (rows, time).
        logits: of all tokens at once, (rows, time, vocab).
        reach: of the comparison.
    """
    if reach.cached < ids.shape[1]:
        ids = ids[:, : reach.cached]
        logits = model(input_ids=ids, use_cache=False).logits.float()

    cache, worst, start = None, 0.0, 0
    for count in split_row(ids.shape[1], reach.rolls):
        piece = slice(start, start + count)
        out = model(input_ids=ids[:, piece], **modeling.cache_kwargs(cache), use_cache=True)
        cache, start = modeling.cache_of(out), start + count
        worst = max(worst, float((out.logits.float() - logits[:, piece]).abs().max()))
    return worst / float(logits.abs().max())


def split_row(length: int, rolls: tuple[int, ...]) -> list[int]:
    """Lengths of the pieces in which a row is decoded, see `cached_difference`.

    Args:
        length: of the row.
        rolls: lengths at which the cache begins to roll over.
    """
    single = {roll + near for roll in rolls for near in AROUND_ROLL}
    single |= set(range(max(length - LAST_TOKENS, 2 * length // 3), length))
    cuts = {0, length // 3, *single, *(place + 1 for place in single)}
    places = sorted(place for place in cuts if 0 <= place < length)
    return [end - start for start, end in zip(places, [*places[1:], length], strict=True)]
