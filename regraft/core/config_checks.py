"""Whether a config.json can be what it says: types of its keys, and counts within bounds.

Checked before anything is built from it, since a wrong count costs memory and time without end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from ..errors import RegraftError, explain_errors
from ..io.safetensors import TensorEntry
from ..io.schema import find_mismatch, join_key, shorten
from .stock_config import CHECKED_LISTS, check_length

if TYPE_CHECKING:
    from .anatomy import Anatomy

# The deepest models that were published have 1,000 layers (DeepNet, arXiv 2203.00555), those with
# the most experts 2,048 (Switch, arXiv 2101.03961), in 15 layers.
MAX_LAYERS, MAX_EXPERTS, MAX_EXPERTS_IN_ALL = 4096, 4096, 1 << 17
# Of any other axis: more than any vocabulary or context has. And of numbers such as `num_labels`,
# for which transformers makes a table, whatever the tensors are.
MAX_SIZE, MAX_COUNT = 1 << 24, 1_000_000
# Axes that growth changes.
GROWING_AXES = ("depth", "hidden", "ffn", "kv", "group", "dim")
TokenIds = int | list[int] | None
Sides = int | tuple[int, int] | None  # one number, or height and width


class ConfigFields(TypedDict, total=False):
    """Keys of config.json that regraft reads, besides those in a family's table."""

    model_type: str
    architectures: list[str] | None
    dtype: str | None
    torch_dtype: str | None
    rope_parameters: dict[str, Any] | None
    rope_scaling: dict[str, Any] | None
    rope_theta: float | None
    rope_local_base_freq: float | None
    rotary_emb_base: float | None
    rotary_pct: float | None
    partial_rotary_factor: float | None
    query_pre_attn_scalar: float | None
    sliding_window: int | None
    sliding_window_pattern: int | None
    layer_types: list[str] | None
    mlp_layer_types: list[str] | None
    per_layer_config: dict[str, Any] | None
    image_size: Sides
    patch_size: Sides
    mlp_ratio: float | None
    initializer_range: float | None
    id2label: dict[str, Any] | None
    label2id: dict[str, Any] | None
    num_labels: int | None
    stage_names: list[str] | None
    out_features: list[str] | None
    bos_token_id: TokenIds
    eos_token_id: TokenIds
    pad_token_id: TokenIds


POSITIVE = (
    "query_pre_attn_scalar sliding_window_pattern image_size patch_size mlp_ratio rope_theta"
    " rope_local_base_freq rotary_emb_base"
).split()
SHARES = ("partial_rotary_factor", "rotary_pct")  # of a head's dimensions, at most all of them


@contextmanager
def explain_config_errors(file: Path) -> Iterator[None]:
    """Inside, whatever a config causes becomes a RegraftError that names the file."""
    try:
        with explain_errors("its settings do not go together", "fetch it again"):
            yield
    except RegraftError as error:
        raise RegraftError(f"'{file}': {error}") from error


def check_config(config: Mapping[str, Any], anatomy: Anatomy) -> None:
    """RegraftError when a key that regraft reads is of a wrong type, or a count out of bounds."""
    family = anatomy.family
    problem = find_mismatch(config, ConfigFields) or next(_find_wrong_keys(config, anatomy), None)
    if problem:
        raise RegraftError(f"{family} config: {problem}: fix it, or fetch it again")

    check_sizes(
        family, {text: config[key] for key, text in anatomy.sizes if config.get(key) is not None}
    )
    for key, value in iter_numbers(config):
        name = key.rpartition(".")[2]
        if name.startswith(("num_", "n_")) and value > MAX_COUNT and not _is_axis(name, anatomy):
            problem = f"the limit is {MAX_COUNT:,}"
        elif name in POSITIVE and value <= 0:
            problem = "it must be positive"
        elif name in SHARES and not 0 < value <= 1:
            problem = "it is a share above 0 and at most 1"
        elif ("dropout" in name or "pdrop" in name) and not 0 <= value <= 1:
            problem = "it is a share, 0 to 1"
        else:
            continue
        raise RegraftError(f"{family} config has {key} = {shorten(value)}: {problem}, fix it")
    _check_attention_keys(config, anatomy)


def _check_attention_keys(config: Mapping[str, Any], anatomy: Anatomy) -> None:
    """RegraftError when keys are of the right types, but the model could not run with them."""
    if any(config.get(key) is None for key in anatomy.required_keys()):
        return  # `Anatomy.solve` says which
    full = anatomy.fill_defaults(config)
    _check_window(full, anatomy.family)

    experts = full.get(anatomy.routed, 1)
    count = next((full.get(key) for key, axis in anatomy.sizes if axis == "expert"), 1)
    is_bad = experts is not None and count is not None and not 1 <= experts <= count
    parts = anatomy.parts.values()
    if is_bad and any(part.at == "routed" and part.is_present(full) for part in parts):
        raise RegraftError(
            f"{anatomy.family} config has {anatomy.routed} = {experts}: give 1 to {count}"
        )

    depth = next((full[key] for key, axis in anatomy.sizes if axis == "depth"), 0)
    for key in CHECKED_LISTS:
        if config.get(key) is not None:
            check_length(anatomy.family, key, config[key], depth)
    if config.get("per_layer_config") and not anatomy.reads_layer_settings:
        layers = ", ".join(map(str, config["per_layer_config"]))
        raise RegraftError(
            f"{anatomy.family} config has per_layer_config for layers {layers}: its table"
            " does not read settings of single layers, so give a model without them"
        )


def _check_window(config: Mapping[str, Any], family: str) -> None:
    """RegraftError when some layer has a window, but no size of it."""
    window = config.get("sliding_window", 1)
    sliding = "sliding_attention" in (config.get("layer_types") or ())
    has_window = config.get("use_sliding_window", True)
    if (window is None and sliding) or (window is not None and window < 1 and has_window):
        raise RegraftError(
            f"{family} config has sliding_window = {window!r}: it must be positive, fix it"
        )


def _is_axis(name: str, anatomy: Anatomy) -> bool:
    return any(key == name for key, _ in anatomy.sizes)


def _find_wrong_keys(config: Mapping[str, Any], anatomy: Anatomy) -> Iterator[Any]:
    """Mismatches of the keys that a family's table names."""
    kinds: dict[str, Any] = {anatomy.eps: float, anatomy.activation: str}
    for part in anatomy.parts.values():
        kinds |= {key: bool for key in (part.when, part.unless) if key}
    for key, default in anatomy.defaults.items():
        if isinstance(default, (bool, str)):
            kinds[key] = type(default)
    kinds |= {anatomy.routed: int} if anatomy.routed else {}
    # Last: sizes that may be left out have a default too.
    kinds |= {key: int for key, _ in anatomy.sizes}
    for key, kind in kinds.items():
        if config.get(key) is not None:
            yield from filter(None, [find_mismatch(config[key], kind, key)])


def iter_numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """(path, number) of every number in a config."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from iter_numbers(item, join_key(key, name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from iter_numbers(item, key)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def check_sizes(family: str, sizes: Mapping[str, int]) -> None:
    """RegraftError when a model would be larger than any can be."""
    experts = sizes.get("depth", 1) * sizes.get("expert", 0)
    limits = {
        "depth": MAX_LAYERS,
        "encoder_depth": MAX_LAYERS,
        "expert": MAX_EXPERTS,
        "depth * expert": MAX_EXPERTS_IN_ALL,
    }
    for axis, size in {**sizes, "depth * expert": experts}.items():
        limit = limits.get(axis, MAX_SIZE)
        if size > limit:
            raise RegraftError(
                f"{family} with {axis} {shorten(size)}: the limit is {limit:,}, give less"
            )


def check_counts(
    anatomy: Anatomy, sizes: Mapping[str, int], entries: Mapping[str, TensorEntry]
) -> None:
    """RegraftError when files do not have as many tensors as layers and experts need."""
    # Many classes hold all experts of a layer in one tensor.
    apart = any("{e}" in part.name for part in anatomy.parts.values())
    layers, experts = sizes.get("depth", 1), sizes.get("expert", 1) if apart else 1
    if layers * experts > len(entries):
        count = f"{layers:,} layers" + (f" of {experts:,} experts" if apart else "")
        raise RegraftError(
            f"{anatomy.family} config says {count}, the files hold {len(entries):,} tensors: "
            "config.json and weights do not belong together"
        )


def check_family(config: Mapping[str, Any]) -> str:
    """The `model_type` of a config; RegraftError when it is no name."""
    family = config.get("model_type")
    if not isinstance(family, str) or not family:
        raise RegraftError(
            f"config has model_type = {family!r}: it must be the name of a model type, such as "
            "llama"
        )
    return family


def check_numbers(family: str, config: Mapping[str, Any]) -> None:
    """RegraftError when a config without a table has counts for which its class would need memory
    without end.
    """
    for key, value in iter_numbers(config):
        name = key.rpartition(".")[2]
        limit = MAX_LAYERS if "layer" in name else MAX_COUNT
        if name.startswith(("num_", "n_")) and value > limit:
            raise RegraftError(
                f"{family} config has {key} = {shorten(value)}: the limit is {limit:,}, fix it"
            )


def check_open(anatomy: Anatomy, config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """RegraftError when an axis would grow that the table keeps closed.

    Args:
        anatomy: the table.
        config: of the model as it is.
        sizes: all axis sizes of the new model.
    """
    before = anatomy.solve(config) if anatomy.closed else {}
    for axis, why in anatomy.closed.items():
        if axis == "ffn" and anatomy.ffn_ratio:
            continue  # it follows another axis, which is open or closed itself
        if sizes.get(axis) != before.get(axis):
            others = [
                name for name in GROWING_AXES if name not in {*anatomy.closed, *anatomy.fixed}
            ]
            raise RegraftError(
                f"{anatomy.family} cannot grow its {axis} ({why}): "
                f"growth is proven for {', '.join(others) or 'no axis'}"
            )


def check_divisors(anatomy: Anatomy, config: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    """RegraftError when the class requires a multiple and does not get one.

    Args:
        anatomy: the table.
        config: of the model as it is.
        keys: of the new model.
    """
    for key, divisor_key in anatomy.divides:
        value, divisor = keys[key], keys[divisor_key]
        if value % divisor:
            below, above = value // divisor * divisor, -(-value // divisor) * divisor
            raise RegraftError(
                f"{anatomy.family} wants {key} to be a multiple of {divisor_key}, "
                f"got {value} and {divisor}: choose {below} or {above}"
                + anatomy.bridge_hint(config)
            )


def check_multiples(anatomy: Anatomy, sizes: Mapping[str, int]) -> None:
    """RegraftError when an axis is not a multiple of what the class needs."""
    for axis, step in anatomy.multiples.items():
        if sizes[axis] % step:
            below = sizes[axis] // step * step
            raise RegraftError(
                f"{anatomy.family} needs {axis} to be a multiple of {step}, got {sizes[axis]}: "
                f"use {below or step} or {below + step}"
            )
