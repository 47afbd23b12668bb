"""What a table says besides its rows: sizes, epsilon, factors, and what the class demands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .draft import Draft, query_axes
from .shapes import parse_name, power, read_shapes

# Attributes of attention modules that hold the factor on the scores.
SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor", "scale_attn")


def write_sizes(
    draft: Draft,
) -> tuple[tuple[tuple[str, str], ...], dict[str, int], dict[str, tuple[tuple[str, int], ...]]]:
    """(sizes, fixed, filled) of the table."""
    keys = draft.keys
    filled: dict[str, tuple[tuple[str, int], ...]] = {}
    hidden, heads, kv, dim = (keys[kind] for kind in ("hidden", "heads", "kv", "dim"))
    sizes = [(keys["vocab"], "vocab"), (hidden, "hidden"), (keys["depth"], "depth")]
    fixed: dict[str, int] = {}
    if draft.ffn:
        sizes.append((draft.ffn, "ffn" if draft.ffn_share == 1 else "two ffn"))
        fixed |= {} if draft.ffn_share == 1 else {"two": 2}
        filled |= {} if draft.ffn_ratio else _find_filled_ffn(draft, draft.ffn)
    else:
        fixed["ffn"] = 1
    if draft.laws.expert:
        sizes.append((draft.laws.expert, "expert"))
    if keys["pos"] in draft.laws.sizes:
        sizes.append((keys["pos"], "pos"))
    if "_places" in draft.derived:
        sizes.append(("_places", "place"))
    if draft.latent:
        sizes.append((heads, "kv"))
        fixed["group"] = 1
    elif not draft.heads:
        fixed |= {"kv": 1, "group": 1, "dim": 1}
    else:
        wide = query_axes(draft)
        sizes += [(kv, "kv")] if kv else []
        sizes.append((heads, wide))
        sizes.append((hidden, f"{wide} dim") if draft.coupled else (dim, "dim"))
        fixed |= {} if kv else {"kv" if draft.single_kv else "group": 1}
        if not draft.coupled:
            filled[str(dim)] = ((str(hidden), 1), (str(heads), -1))
        if kv:
            filled[kv] = ((str(heads), 1),)
    stated = tuple((str(key), axes) for key, axes in sizes if key)
    return stated, fixed, filled


def _find_filled_ffn(draft: Draft, key: str) -> dict[str, tuple[tuple[str, int], ...]]:
    """The width of the MLP that a class takes when its key is null, a multiple of hidden; {} for a
    class that does not take null.
    """
    try:
        shapes = read_shapes(draft.tiny, {key: None})
    except Exception:  # classes raise anything for null
        return {}
    for name, shape in shapes.items():
        laws = draft.laws.laws[parse_name(name).template]
        for size, law in zip(shape, laws, strict=True):
            if law == power(key) and size % draft.trace.width == 0:
                times = str(size // draft.trace.width)
                return {key: ((times, 1), (str(draft.keys["hidden"]), 1))}
    return {}


def find_eps(draft: Draft) -> tuple[str, float | None]:
    """(config key of the epsilon that the norms of the stream have, its value where the class
    fixes it and the key is a derived one).
    """
    config = draft.tiny.config
    found = [key for key, value in config.items() if "eps" in key and isinstance(value, float)]
    norms = [call.module for call in draft.trace.stream_norms]
    held = {getattr(module, name, None) for module in norms for name in ("eps", "variance_epsilon")}
    stated = next((key for key in found if config[key] in held), None)
    fixed = next((value for value in held if isinstance(value, float)), None)
    if stated is None and fixed is not None:
        return "_eps", fixed
    return stated or next(iter(found), "norm_eps"), None


def has_embed_scale(draft: Draft) -> bool:
    """Whether the table of embeddings is multiplied by the root of the hidden size."""
    root = draft.trace.width**0.5
    factor = draft.trace.find_embedding_factor(draft.embedding)
    own = getattr(draft.embedding, "scalar_embed_scale", getattr(draft.embedding, "embed_scale", 1))
    return any(abs(float(one) - root) < 1e-2 * root for one in (factor, own))


def find_scale(draft: Draft) -> tuple[str, float] | None:
    """Config key and exponent of the factor on the scores; None for one over the root of dim."""
    if draft.latent:
        return None  # see `find_scale_name`
    value = _read_scale(draft.names.by_name.get(draft.slot_module.replace("{}", "0")))
    config = draft.tiny.config
    dim = config.get(draft.keys["dim"] or "") or draft.trace.width // config.get(
        draft.keys["heads"] or "", 1
    )
    if value is None:
        return None
    # Other numbers may happen to be equal: the factor has to follow the key.
    for words in ("att|query", "scal|multiplier"):
        for key, given in config.items():
            is_number = isinstance(given, int | float) and not isinstance(given, bool)
            is_size = key in draft.laws.sizes or key in draft.keys.values()
            if not is_number or is_size or given <= 0 or not re.search(words, key):
                continue
            for exponent in (1.0, -0.5, -1.0):
                if abs(float(given) ** exponent - value) < 1e-6 and _follows(draft, key, exponent):
                    return key, exponent
        if abs(value - dim**-0.5) < 1e-6:
            return None
    draft.closed.setdefault("dim", f"the factor {value:g} on the scores follows no config key")
    return None


def find_scale_name(draft: Draft) -> str:
    """Attribute of a module with latent attention that holds the factor on the scores, which
    depends on several keys (YaRN's are among them); empty where it is one over the root of a head.
    """
    if not draft.latent:
        return ""
    name = draft.slot.format(draft.latent.layers[0])
    module = draft.names.by_name.get(name)
    return next((one for one in SCALES if isinstance(getattr(module, one, None), float)), "")


def find_key_factor(draft: Draft) -> str:
    """Config key of a factor that the attention multiplies keys by; empty without one."""
    module = draft.names.by_name.get(draft.slot_module.replace("{}", "0"))
    found = (key for key in draft.tiny.config if key == "key_multiplier" and hasattr(module, key))
    return next(found, "")


def _read_scale(module: Any) -> float | None:
    """The factor on the scores that an attention module holds; None when it has none."""
    held = (getattr(module, name, None) for name in SCALES)
    numbers = (v for v in held if isinstance(v, int | float) and not isinstance(v, bool))
    return next(map(float, numbers), None)


def _follows(draft: Draft, key: str, exponent: float) -> bool:
    """Whether the factor on the scores is a power of a config key's value, whatever that is."""
    changed = 2 * draft.tiny.config[key]
    try:
        model = draft.tiny.build({key: changed}, "meta")
        value = _read_scale(model.get_submodule(draft.slot_module.replace("{}", "0")))
    except Exception:  # classes raise anything for values that they do not take
        return False
    return value is not None and abs(float(changed) ** exponent - value) < 1e-6


def find_routed(draft: Draft) -> str:
    """Config key of the number of experts that a token is sent to."""
    key = draft.tiny.key("routed") if draft.laws.expert else None
    return key or ""


def find_divisors(draft: Draft) -> tuple[tuple[str, str], ...]:
    """(hidden, heads) where the class wants the first to be a multiple of the second."""
    hidden, heads = draft.keys["hidden"], draft.keys["heads"]
    if draft.coupled or not (hidden and heads and draft.heads):
        return ()
    odd: Mapping[str, int] = {hidden: draft.trace.width + draft.tiny.config[heads] // 2}
    try:
        draft.tiny.build(odd, "meta")
    except Exception:  # classes raise anything for sizes that do not go together
        return ((hidden, heads),)
    return ()
