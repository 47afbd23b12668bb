"""A target's config beside the source's: what growth carries over, and what it refuses.

Both are read with the defaults of transformers' class, so a missing key is its default. Every key
of the target whose value is neither the source's nor what growth gives anyway has its place here:
`NEUTRAL`, `CARRIED`, `is_carried`, or it is refused by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.anatomy import Config, find_anatomy, read_as_auto
from ..core.checkpoint import Checkpoint
from ..errors import RegraftError, explain_errors
from ..io.files import read_json
from ..io.schema import shorten
from ..modeling.meta import build_stock_config
from .steps.adopt import ROPE, Adopt, Carry
from .steps.untie import TIE, Tie, Untie, has_equal_head

FIXED_AXES = ("pos", "expert", "label", "type")  # growth never changes them
ALL = "all"
FIRST, LIST = 8, 300  # keys whose values a refusal gives, and characters that it lists keys with

# Keys, as regular expressions, that say nothing about what the model computes -> why. The result
# keeps the source's; the target's is not read.
NEUTRAL = {
    r"transformers_version|_.*": "who wrote the file, and values derived from other keys",
    r"dtype|torch_dtype": "how numbers are stored, which --dtype says",
    r"auto_map": "names code of the target's repository, which is not copied",
    r"(attn|experts)_implementation": "which kernel computes the same values",
    r"use_cache|return_dict|output_attentions|output_hidden_states": "what a call returns beside",
    r"chunk_size_feed_forward|pretraining_tp": "how much is computed at a time",
}
# Keys that change nothing at step 0 -> why. The result has the target's.
CARRIED = {
    r".*(dropout|pdrop).*|drop_path_rate|router_jitter_noise": "noise of training alone",
    r"initializer_\w+|layerscale_value": "how new weights are drawn",
    r"\w+_token_id": "which ids end, begin and fill a text",
    r"id2label|label2id": "what labels are called; their number is a size",
    r"problem_type|router_aux_loss_coef|output_router_logits": "a loss of training",
    r"summary_\w+|encoder_stride": "of a head that the supported classes do not have",
}
# Rotary types whose frequencies do not depend on the number of positions.
FREE_ROPE_TYPES = ("default", "linear")
Difference = tuple[Any, Any]  # of a key: what the source and what the target has; MISSING for none


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()


@dataclass(frozen=True)
class Target:
    """A target's config.

    Attributes:
        name: the path that it was given as.
        config: its content.
        sizes: its axis sizes.
    """

    name: str
    config: dict[str, Any]
    sizes: dict[str, int]


def read_target(source: Checkpoint, to: str) -> Target:
    """A target's config.

    RegraftError when it is another kind of model, or differs in sizes that growth never changes.

    Args:
        source: the checkpoint to grow.
        to: a config.json, or the directory that has it.
    """
    file = Path(to) / "config.json" if Path(to).is_dir() else Path(to)
    if not file.is_file():
        raise RegraftError(f"no config.json at '{to}': give a directory with the target's config")
    config = read_json(file)
    if quantised := config.pop("quantization_config", None):
        raise RegraftError(
            f"'{to}' is quantised ({shorten(quantised)}): growth writes plain weights, remove the"
            " key quantization_config"
        )

    # Axis sizes of two families do not compare: the same name may be another thing.
    config = read_as_auto(config)
    anatomy = find_anatomy(config)
    if anatomy.family != source.anatomy.family:
        raise RegraftError(
            f"'{to}' is a {anatomy.family}, the source a {source.anatomy.family}: growth stays in a"
            f" family, give a {source.anatomy.family} config"
        )

    sizes = anatomy.solve(config)
    for axis, size in sizes.items():
        if axis in FIXED_AXES and source.sizes[axis] != size:
            raise RegraftError(
                f"'{to}' has {axis} {size}, the source {source.sizes[axis]}: growth does not change"
                f" {axis}"
            )
    if sizes.get("vocab", 0) < source.sizes.get("vocab", 0):
        raise RegraftError(
            f"'{to}' has vocab {sizes['vocab']}, the source {source.sizes['vocab']}: growth never"
            " shrinks"
        )
    return Target(to, config, sizes)


def match_ties(source: Checkpoint, target: Target) -> list[Callable[[Checkpoint], Checkpoint]]:
    """The step that ties or unties the output embedding as the target has it, where it is exact."""
    tied, wanted = (
        bool(each.anatomy.fill_defaults(each.config).get(TIE))
        for each in (source, target_checkpoint(source, target))
    )
    untied = source.anatomy.place(source.anatomy.untie_embeddings(source.config))
    if tied and not wanted and len(untied) > len(source.tensors):
        return [Untie()]
    return [Tie()] if wanted and not tied and has_equal_head(source) else []


def match_target(
    source: Checkpoint, target: Target, adopt: Sequence[str]
) -> Callable[[Checkpoint], Checkpoint]:
    """A step, the last one, that gives the grown checkpoint the target's other settings.

    Args:
        source: the checkpoint before growth.
        target: what it grows to.
        adopt: keys whose values are taken although the function changes; `all` for every one.
    """

    def match(grown: Checkpoint) -> Checkpoint:
        found = find_differences(source, grown, target)
        weights = replace(grown, holds="weights")  # Adam's moments follow what the weights do
        carried = {key for key in found if is_carried(weights, target, key)}
        adopted = {key for key in found if key not in carried and is_named(key, adopt)}
        check_adopted(found, adopt, target)
        if refused := [key for key in found if key not in carried | adopted]:
            raise RegraftError(format_refusal(found, refused, target))

        for step, keys in ((Carry, carried), (Adopt, adopted)):
            if keys:
                grown = step(collect_values(grown, target, keys))(grown)
        return grown

    return match


def find_differences(
    source: Checkpoint, grown: Checkpoint, target: Target
) -> dict[str, Difference]:
    """Keys of the target with a value that is neither the source's nor the grown one's.

    Keys inside the rotary parameters stand alone, with dots; keys of NEUTRAL are left out.
    RegraftError when a linearized target has other mixers.

    Args:
        source: the checkpoint before growth.
        grown: the same after it.
        target: what it grows to.
    """
    if target.config.get("mixers") != grown.config.get("mixers"):
        raise RegraftError(
            f"'{target.name}' has mixers {shorten(target.config['mixers'])}, growth gives"
            f" {shorten(grown.config['mixers'])}: linearize after growing"
        )
    before, after, wanted = (
        flatten(read_with_defaults(each.anatomy.host_config(each.config)))
        for each in (source, grown, target_checkpoint(source, target))
    )
    # A class that the target does not name is the source's.
    if not (wanted["architectures"] and before["architectures"]):
        del wanted["architectures"]

    # Rotary keys that only the source has count too: without them it turns in another way.
    keys = {*wanted, *(key for key in before if key.startswith(f"{ROPE}."))}
    found = {}
    for key in sorted(key for key in keys if find_reason(key, NEUTRAL) is None):
        old, new, value = (each.get(key, MISSING) for each in (before, after, wanted))
        if value not in (old, new):
            # What a list by layer must be is what growth makes of the source's.
            found[key] = (new if isinstance(old, list) else old, value)
    return found


def target_checkpoint(source: Checkpoint, target: Target) -> Checkpoint:
    """The target as a checkpoint without tensors."""
    return Checkpoint(
        Path(target.name), target.config, source.anatomy, target.sizes, {}, {}, source.folder
    )


def read_with_defaults(config: Config) -> dict[str, Any]:
    """A stock config as transformers' class reads it, with what its table derives filled in."""
    read = build_stock_config(config)
    with explain_errors("transformers cannot write its config.json out", "fix it"):
        return find_anatomy(config).fill_defaults(read.to_dict())


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the rotary parameters' keys beside the others, with dots, and of
    `architectures` the first.
    """
    flat = {key: value for key, value in config.items() if key != ROPE}
    flat["architectures"] = (config.get("architectures") or [""])[0]
    nested = [(ROPE, config.get(ROPE))]
    for key, value in nested:
        if isinstance(value, dict):
            nested += [(f"{key}.{name}", inner) for name, inner in value.items()]
        elif value is not None:
            flat[key] = value
    return flat


def find_reason(key: str, table: Mapping[str, str]) -> str | None:
    """What a table of regular expressions says about a key."""
    return next((why for pattern, why in table.items() if re.fullmatch(pattern, key)), None)


def is_carried(grown: Checkpoint, target: Target, key: str) -> bool:
    """Whether the grown model computes the same with the target's value of a key."""
    family = grown.anatomy.host(grown.config)
    full = read_with_defaults(grown.anatomy.host_config(grown.config))
    if key in family.not_null:  # the class reads this id
        return False
    if find_reason(key, CARRIED):
        return True

    if key == "max_position_embeddings":
        types = [value for name, value in flatten(full).items() if name.endswith(".rope_type")]
        return family.rotary and all(kind in FREE_ROPE_TYPES for kind in types)
    # Which layers have a window stands in `layer_types`, which is compared by itself.
    if key in ("max_window_layers", "use_sliding_window", "sliding_window"):
        kinds = full.get("layer_types") or ["sliding_attention"]
        return "sliding_attention" not in kinds and "chunked_attention" not in kinds

    # A tie that no tensor knows of, and biases, which begin with zeros.
    is_switch = key == TIE or any(part.when == key for part in family.parts.values())
    if not is_switch:
        return False
    try:
        Carry(collect_values(grown, target, {key}))(grown)
    except RegraftError:
        return False
    return True


def is_named(key: str, names: Sequence[str]) -> bool:
    """Whether names such as `rope_theta`, or ALL, mean a key (`rope_parameters.rope_theta`)."""
    return ALL in names or any(f".{name}." in f".{key}." for name in names)


def check_adopted(found: Mapping[str, Difference], adopt: Sequence[str], target: Target) -> None:
    """RegraftError for a name that means no key that differs."""
    for name in adopt:
        if not any(is_named(key, [name]) for key in found) and name != ALL:
            others = ", ".join(map(shorten_key, found)) or "nothing"
            raise RegraftError(
                f"--adopt {name}: '{target.name}' does not differ from the source there, but in"
                f" {others}: leave it out"
            )


def format_refusal(found: Mapping[str, Difference], refused: Sequence[str], target: Target) -> str:
    """The line that names the keys that growth cannot take over, with both values."""
    pairs = [
        f"{shorten_key(key)} {shorten(found[key][1])} (without --to: {shorten(found[key][0])})"
        for key in refused
    ]
    more = f" and {len(pairs) - FIRST} more" if pairs[FIRST:] else ""
    names = ",".join(shorten_key(key) for key in refused)
    return (
        f"'{target.name}' has {', '.join(pairs[:FIRST])}{more}, which changes the function: set"
        " what the source has there, or take the target's although outputs change with --adopt"
        f" {names if len(names) < LIST else ALL}"
    )


def shorten_key(key: str) -> str:
    """A key as `--adopt` takes it."""
    return key.removeprefix(f"{ROPE}.")


def collect_values(grown: Checkpoint, target: Target, keys: set[str]) -> dict[str, Any]:
    """The target's values of keys, as config.json has them.

    Args:
        grown: has the other rotary parameters.
        target: what it grows to.
        keys: of `find_differences`.
    """
    host = grown.anatomy.host_config
    wanted = read_with_defaults(host(target.config))
    values = {key: wanted.get(key) for key in sorted(keys) if "." not in key}
    if "architectures" in values:
        values["architectures"] = target.config["architectures"]
    rope: dict[str, Any] = copy.deepcopy(read_with_defaults(host(grown.config)).get(ROPE) or {})

    for key in sorted(key for key in keys if "." in key):
        _, *path, last = key.split(".")
        there, new = rope, wanted[ROPE]
        for name in path:
            there, new = there.setdefault(name, {}), new.get(name, {})
        if last in new:
            there[last] = new[last]
        else:
            there.pop(last, None)
        values[ROPE] = rope
    return values
