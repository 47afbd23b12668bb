"""What growth promises: which steps keep the function, how close outputs must then be, and what it
costs at step 0 where they do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import torch
from torch import Tensor

from .. import modeling
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError
from ..growth import depth
from ..growth.sizes_to_steps import DTYPES
from .outputs import (
    compute_outputs,
    find_kept_tokens,
    keep_known_tokens,
    max_difference,
    select_tokens,
    steps_between,
    stream_index,
)
from .reach import count_positions

if TYPE_CHECKING:
    from pathlib import Path

GROWTH_STEPS = (
    "Widen",
    "Deepen",
    "GrowTower",
    "Bridge",
    "Untie",
    "Tie",
    "Carry",
    "Adopt",
    "Learned",
    "Transplant",
    "GrowVocab",
    "TakeText",
    "AddExperts",
)
# Relative differences of logits that rounding alone may cause, by the dtype weights are stored in.
EXACT = 2e-5
BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
POST_NORM_TOLERANCE = 1e-3  # layers behind post-norms are idle up to the norms' epsilon
# Steps that keep the function whatever their arguments are.
EXACT_STEPS = ("Bridge", "Store", "Untie", "Tie", "Carry", "Export", "GrowVocab", "TakeText")
STEP0_LENGTH = 256  # tokens


class Step0(TypedDict):
    """What growth that does not keep the function costs before training."""

    rel_logit_diff: float
    # Next-token losses in nats, of models that predict the next token.
    loss_source: NotRequired[float]
    loss_grown: NotRequired[float]


def growth_steps(after: Checkpoint, before: Checkpoint) -> list[dict[str, Any]]:
    """The growth steps that lie between two checkpoints; empty when nothing grew."""
    steps = steps_between(before, after)
    return [step for step in steps if step.get("step") in GROWTH_STEPS]


def is_exact(steps: list[dict[str, Any]]) -> bool:
    """Whether every step between source and output keeps the function."""
    return all(keeps_function(step) for step in steps)


def keeps_function(step: dict[str, Any]) -> bool:
    """Whether a step of lineage.json keeps the function; steps that are no growth do not."""
    name = step.get("step")
    if name == "AddExperts":
        arguments = step.get("arguments", {})
        return not (arguments.get("noise") or arguments.get("reinit"))
    if name == "GrowTower":
        arguments = step.get("arguments", {})
        parts = [("Widen", arguments.get("how")), ("Deepen", arguments.get("depth_how"))]
        return all(keeps_function({"step": one, "arguments": {"how": how}}) for one, how in parts)
    if name not in ("Widen", "Deepen"):
        return name in EXACT_STEPS

    how = step.get("arguments", {}).get("how")
    if not isinstance(how, str):
        raise RegraftError(
            f"the step {name} in lineage.json has how = {how!r}: make the model again"
        )
    return "aki" not in how if name == "Widen" else how in depth.EXACT


def keeps_choices(steps: list[dict[str, Any]]) -> bool:
    """Whether the token with the largest logit stays: rows of zeros may give a larger one."""
    return not any(
        step.get("step") == "GrowVocab" and step.get("arguments", {}).get("init") == "zero"
        for step in steps
    )


def difference_bound(before: Checkpoint, after: Checkpoint) -> float:
    """Largest relative difference of outputs that counts as equal.

    By the dtypes that growth was stored in, and wider for families whose new layers stand behind
    post-norms.
    """
    current = {lazy.dtype for lazy in before.tensors.values()}
    dtypes = {lazy.dtype for lazy in after.tensors.values()}
    for step in steps_between(before, after):
        if step.get("step") == "Store":
            current = {DTYPES.get(step["arguments"]["dtype"], torch.float32)}
        elif step.get("step") in GROWTH_STEPS:
            dtypes |= current
    rounding = max([EXACT, *(BOUNDS.get(dtype, EXACT) for dtype in dtypes)])

    # A post-norm normalises the stream once more: where a new layer adds nothing, what is
    # normalised already comes out the same up to the norm's epsilon.
    parts = [placed.part for placed in after.anatomy.place(after.config).values()]
    has_post_norm = any(
        part.norm and part.writes == "stream" and part.axes.kind == "bias" for part in parts
    )
    is_deeper = any(step.get("step") == "Deepen" for step in after.history)
    return max(rounding, POST_NORM_TOLERANCE) if has_post_norm and is_deeper else rounding


def measure_step0(source: str | Path, out: str | Path, length: int = STEP0_LENGTH) -> Step0:
    """What an operator that does not keep the function costs before training.

    Both are read as transformers loads them.

    Args:
        source: the model that grew.
        out: the grown model.
        length: tokens of held-out text, or random ones without a tokenizer.
    """
    before, after = Checkpoint.open(source), Checkpoint.open(out)
    model = modeling.load_stored(before)
    length = min(length, count_positions(before, after, model) or length)
    inputs = load_held_out_tokens(before, length) or modeling.random_inputs(before, length=length)
    kept = find_kept_tokens(before, after)
    inputs = keep_known_tokens(inputs, kept)

    first = compute_outputs(model, inputs)
    del model
    second = compute_outputs(modeling.load_stored(after), inputs)
    name = next(iter(first))
    pair = select_tokens((first[name], second[name]), before, after, kept)
    relative, _ = max_difference(*pair, stream_index(before, after))
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
