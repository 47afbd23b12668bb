"""A config as transformers reads it: the class that Auto takes, null, and settings of layers.

The classes are asked, not copied. Importing them takes seconds, so it happens where needed only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import RegraftError, explain_errors
from .part import Config

if TYPE_CHECKING:
    from .anatomy import Anatomy

# Keys that every class takes as null, often seen so: there is no need to ask the class.
TAKEN_AS_NULL = frozenset(
    "architectures bos_token_id classifier_dropout dtype eos_token_id layer_types n_inner"
    " pad_token_id problem_type rope_parameters rope_scaling sliding_window torch_dtype".split()
)
# Lists of some classes that have nothing to do with layers; other classes do not know the names.
OTHER_LISTS = frozenset(
    "image_mean image_size image_std out_features out_indices patch_size stage_names tags".split()
)
# transformers checks the length of lists of these names in every class, whether it reads them.
CHECKED_LISTS = ("layer_types", "mlp_layer_types")


def fill_nulls(config: Config, anatomy: Anatomy) -> dict[str, Any]:
    """The config with a value for each key whose null the stock class does not take.

    The value is the one that the class takes when the key is missing, or that the family's table
    says. Keys that the class does not know go: to the class, null is a value like any other.

    Args:
        config: the mapping in a config.json of a stock family.
        anatomy: its table.
    """
    # Sizes that have no default stay null: `Anatomy.solve` says which.
    leave = (TAKEN_AS_NULL | anatomy.required_keys()) - set(anatomy.not_null)
    nulls = [key for key, value in config.items() if value is None and key not in leave]
    if not nulls:
        return dict(config)

    kind, base, filled = config_class(anatomy.family), config_class(None), dict(config)
    known, stock, full = dir(kind), kind(), anatomy.fill_defaults(config)
    for key in nulls:
        # Keys that all classes share are taken as null, but not run with.
        runs = getattr(base(), key, None) is None and key not in anatomy.not_null
        if key not in known:
            del filled[key]
        elif not (runs and _takes(kind, {key: None})):
            filled[key] = full[key] if key in anatomy.defaults else getattr(stock, key)
    return filled


def find_layer_lists(config: Config, anatomy: Anatomy) -> dict[str, list[Any]]:
    """Lists with one entry per layer: those in a config, and those its class derives.

    A list belongs to the layers when the class makes it as long as the depth or refuses another
    length, or when it is that long and no class of transformers knows its name.

    RegraftError for such a list of another length, and for layers with a window of no size.

    Args:
        config: the mapping in a config.json of a stock family.
        anatomy: its table.
    """
    depth_key = next(key for key, axis in anatomy.sizes if axis == "depth")
    depth = config[depth_key]
    stated = {key: list(value) for key, value in config.items() if isinstance(value, list | tuple)}
    plain = {key: value for key, value in config.items() if key not in stated}

    # The same model with one layer more: lists that grew by one entry follow the depth. A class
    # that takes no depth without a list of its own derives none.
    kind = config_class(anatomy.family)
    if _takes(kind, plain):
        stock = read_stock_config(plain, anatomy)
        deeper = read_stock_config(plain | {depth_key: depth + 1}, anatomy)
    else:
        stock = deeper = read_stock_config(config, anatomy)
    lists = {
        key: list(value)
        for key, value in vars(stock).items()
        if not key.startswith("_")
        and _follows(value, vars(deeper).get(key), depth)
        and list(value) != list(range(depth))  # layers by their numbers, all of them
    }

    for key, value in stated.items():
        if key in lists or key in CHECKED_LISTS:
            check_length(anatomy.family, key, value, depth)
        elif len(value) != depth:
            continue
        elif _sets_depth(kind, config, key, depth):
            lists[key] = value
            continue
        elif _is_known(kind, key) and _takes(kind, plain | {key: value, depth_key: depth + 1}):
            continue
        lists[key] = value

    if getattr(stock, "sliding_window", None) is None and "sliding_attention" in lists.get(
        "layer_types", ()
    ):
        raise RegraftError(
            f"{anatomy.family} config has layer_types {lists['layer_types']} and no sliding_window"
            " in use: give its size, or full_attention for every layer"
        )
    return lists


def check_length(family: str, key: str, value: Sequence[Any], depth: int) -> None:
    """RegraftError when a list does not have one entry per layer."""
    if len(value) != depth:
        raise RegraftError(
            f"{family} config has {len(value)} {key} for {depth} layers: give one for each layer"
        )


def decode_floats(value: Any) -> Any:
    """A value of a config.json with the numbers that JSON lacks: {"__float__": "Infinity"}, as
    transformers writes infinity, becomes that number.
    """
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: decode_floats(one) for key, one in value.items()}
    return [decode_floats(one) for one in value] if isinstance(value, list) else value


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Inside, transformers shows no progress bar, message or table of what it did not find; what is
    wrong is raised as well.
    """
    from transformers.utils import logging

    had_bar, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def read_stock_config(config: Config, anatomy: Anatomy) -> Any:
    """transformers' config object of a stock family; RegraftError when the class refuses a key."""
    what = f"transformers cannot read this {anatomy.family} config"
    with silence_transformers(), explain_errors(what, "fix it"):
        return config_class(anatomy.family).from_dict(decode_floats(config))


def find_activation(config: Config, anatomy: Anatomy) -> str | None:
    """The MLP's activation function, by the config or by the table; None when neither says.

    Args:
        config: of a stock model.
        anatomy: its table.
    """
    key = anatomy.activation
    stock = read_stock_config(config, anatomy)
    found: str | None = getattr(stock, key, anatomy.fill_defaults(config).get(key))
    return found


def config_class(family: str | None) -> Any:
    """transformers' config class of a `model_type`; None: the one that all others extend."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[family] if family else PreTrainedConfig


def _follows(value: Any, deeper: Any, depth: int) -> bool:
    """Whether an attribute has one entry per layer, by its values at `depth` and one layer more."""
    are_lists = isinstance(value, list | tuple) and isinstance(deeper, list | tuple)
    return are_lists and (len(value), len(deeper)) == (depth, depth + 1)


def _sets_depth(kind: Any, config: Config, key: str, depth: int) -> bool:
    """Whether the number of layers is the length of a list, whatever else the config says."""
    if isinstance(vars(kind).get("num_hidden_layers"), property):
        longer = {**config, key: [*config[key], config[key][-1]]}
        if _takes(kind, longer):
            stock = kind.from_dict(decode_floats(longer))
            return bool(stock.num_hidden_layers == depth + 1)
    return False


def _is_known(kind: Any, key: str) -> bool:
    """Whether transformers gives a config key a meaning of its own, which is not one per layer."""
    from transformers import GenerationConfig

    has_meaning = key in dir(kind) or hasattr(GenerationConfig(), key) or key in OTHER_LISTS
    return has_meaning or "token_id" in key


def _takes(kind: Any, keys: Mapping[str, Any]) -> bool:
    """Whether a config class takes these keys, the others left out."""
    try:
        kind.from_dict(decode_floats(keys))
    except Exception:  # whatever its checks raise
        return False
    return True
