"""Types of models around a language model: what each of them adds to the language model's table.

The language model's own table is that of its type (`text_config`), written or inferred. Tensors
that no row here names are carried along unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...core.part import Config

# Modules whose outputs have the width of the language model's stream, as regular expressions.
TWO_MAPS = {
    r"multi_modal_projector\.linear_1": "inner",
    r"multi_modal_projector\.linear_2": "stream",
}
CONNECTOR = {r"connector\.modality_projection\.proj": "stream"}
MERGER = {r"visual\.merger\.linear_fc2": "stream"}
DEEPSTACK = MERGER | {r"visual\.deepstack_merger_list\.\d+\.linear_fc2": "stream"}
OUT = ("vision_config.out_hidden_size",)


@dataclass(frozen=True)
class Wrapper:
    """What a model has around its language model.

    Attributes:
        writers: regular expression of a module's name, without the base model's prefix -> "stream"
            when what it gives stands in the place of embeddings, "inner" when a map of the same
            projector reads it.
        follows: config keys, dotted, that are the width of the stream too.
        first_layers: config -> layers that have to stay the first ones, since the model adds to
            what they give by their numbers.
        closed: axes that do not grow -> why.
        images: how an image is given: "pixels", "sized" with its height and width beside, "several"
            in a row, as "patches" with their numbers beside, or "placed" patches with the row and
            column of each.
        keeps_softmax: why no mixer can take the place of the language model's attention; empty:
            some can.
    """

    writers: Mapping[str, str] = field(default_factory=dict)
    follows: tuple[str, ...] = ()
    first_layers: Callable[[Config], int] = lambda config: 0
    closed: Mapping[str, str] = field(default_factory=dict)
    images: Literal["pixels", "sized", "several", "patches", "placed"] = "pixels"
    keeps_softmax: str = ""


def count_deepstack(config: Config) -> int:
    """Layers behind which features of the vision tower are added (DeepStack, arXiv 2406.04334)."""
    vision: Mapping[str, Any] = config.get("vision_config") or {}
    return len(vision.get("deepstack_visual_indexes", (8, 16, 24)))


SECTIONS = {"dim": "M-RoPE shares the pairs of a head out among time, height and width"}
BOTH_WAYS = "reads images in both directions"
STATES = (
    "has layers with a state beside its other parts (regraft convert --part text takes its language"
    " model out, which is linearized)"
)
APART = f"{BOTH_WAYS} (regraft convert --part text takes its language model out, which does not)"
# By the config's `model_type`.
WRAPPERS = {
    "gemma3": Wrapper(
        {r"multi_modal_projector\.mm_input_projection_weight": "stream"}, keeps_softmax=APART
    ),
    "gemma4": Wrapper(
        {r"embed_(vision|audio)\.embedding_projection": "stream"},
        images="placed",
        keeps_softmax=BOTH_WAYS,
    ),
    "idefics3": Wrapper(CONNECTOR, images="several"),
    "internvl": Wrapper(TWO_MAPS),
    "llava": Wrapper(TWO_MAPS),
    "mistral3": Wrapper(TWO_MAPS, images="sized"),
    "paligemma": Wrapper(
        {r"multi_modal_projector\.linear": "stream"},
        ("vision_config.projection_dim", "projection_dim"),
        keeps_softmax=BOTH_WAYS,
    ),
    "qwen2_5_vl": Wrapper(
        {r"visual\.merger\.mlp\.2": "stream"}, OUT, closed=SECTIONS, images="patches"
    ),
    "qwen2_vl": Wrapper(
        {r"visual\.merger\.mlp\.2": "stream"},
        ("vision_config.hidden_size",),
        closed=SECTIONS,
        images="patches",
    ),
    "qwen3_5": Wrapper(MERGER, OUT, closed=SECTIONS, images="patches", keeps_softmax=STATES),
    "qwen3_vl": Wrapper(DEEPSTACK, OUT, count_deepstack, SECTIONS, "patches"),
    "smolvlm": Wrapper(CONNECTOR, images="several"),
    "vipllava": Wrapper(TWO_MAPS),
}
