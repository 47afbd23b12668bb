"""An inferred table as the file that it would be in `regraft/families`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...core.anatomy import Anatomy
from ...core.part import Config, Part
from .table import InferredTable, build_anatomy, read_full

DEFAULT_FIELDS = {
    name: parameter.default
    for name, parameter in inspect.signature(Anatomy).parameters.items()
    if parameter.default is not inspect.Parameter.empty
}
# Fields of a table that are written as they are.
PLAIN = (
    "rotary_pairs",
    "rotary_tables",
    "norms_rotated",
    "divides",
    "inner_ratio",
    "multiples",
    "embed_scale",
    "causal",
    "activation",
    "routed",
)
LINE = 96  # characters of a line


def format_table(table: InferredTable, config: Config) -> str:
    """Python source of a table, valid for models of this config's settings.

    Sizes without a named axis stand as the numbers that this config gives.

    Args:
        table: as inferred.
        config: of the model.
    """
    import transformers

    anatomy = build_anatomy(table, config)
    head = f'"""{table.family}: as inferred from {table.kind} of transformers '
    lines = [f'{head}{transformers.__version__}."""', ""]
    lines += ["from ..core.anatomy import Anatomy, Part", "", "anatomy = Anatomy("]
    missing = {key for key, _ in anatomy.sizes if config.get(key) is None} - set(table.filled)
    full = read_full(table, config)
    own = {key: full[key] for key in sorted(missing) if full.get(key) is not None}
    lines += [f"    {line}" for line in _iter_fields(table, anatomy, own, full)]
    return "\n".join([*lines, ")", ""])


def _iter_fields(
    table: InferredTable, anatomy: Anatomy, sizes: dict[str, Any], full: Config
) -> Iterator[str]:
    """The lines of a table.

    Args:
        table: as inferred.
        anatomy: the same for a config.
        sizes: config keys that the class fills in itself.
        full: the config as its class reads it.
    """
    yield f"family={_quote(table.family)},"
    yield "parts={"
    some = {row.role for row in table.rows if row.in_some_layers}
    for role, part in anatomy.parts.items():
        if role in some:
            yield "    # In some layers only: `in_layer` has to say in which."
        yield from (f"    {line}" for line in _format_part(role, part))
    yield "},"
    yield "sizes=("
    yield from (f"    ({_quote(key)}, {_quote(axes)})," for key, axes in anatomy.sizes)
    yield "),"
    yield f"slot={_quote(anatomy.slot)},"
    yield "defaults={"
    for key, value in (sizes | anatomy.defaults).items():
        if key == "_inner":
            hidden, times = value.args
            yield f"    {_quote(key)}: lambda config: {times} * config[{_quote(hidden)}],"
            continue
        yield f"    {_quote(key)}: {_format(value)},"
    for key, factors in table.filled.items():
        yield f"    {_quote(key)}: lambda config: {_format_product(factors)},"
    yield "},"
    if table.rotates and anatomy.rotary:
        key, values = table.rotates
        yield f"rotates=lambda config, layer: config[{_quote(key)}][layer] in {_format(values)},"
    for name in ("fixed", "eps", "latent_eps", "rotary", *PLAIN):
        value = getattr(anatomy, name)
        if (
            name not in DEFAULT_FIELDS
            or (value and value != DEFAULT_FIELDS[name])
            or (isinstance(value, bool) and value != DEFAULT_FIELDS[name])
        ):
            yield f"{name}={_format(value)},"
    if table.softcap:
        yield f"softcap=({_quote(table.softcap)}, None),"
    if table.scale_name:
        value = anatomy.scale(full, anatomy.solve(full)["dim"], 0)
        yield f"scale=lambda config, dim, layer: {value!r},"
    if table.scale or table.key_factor:
        key, exponent = table.scale or ("", 0.0)
        base = f"float(config[{_quote(key)}]) ** {exponent}" if key else "dim**-0.5"
        factor = f" * config[{_quote(table.key_factor)}]" if table.key_factor else ""
        yield f"scale=lambda config, dim, layer: {base}{factor},"


def _format_part(role: str, part: Part) -> list[str]:
    """A row of a table, on one line if it fits."""
    fields = [_quote(part.name), _quote(part.signature)]
    defaults = {name: one.default for name, one in inspect.signature(Part).parameters.items()}
    for name in (
        "stored",
        "fused",
        "by_head",
        "unless",
        "reads",
        "writes",
        "norm",
        "centered",
        "at",
    ):
        value = getattr(part, name)
        if value != defaults[name]:
            fields.append(f"{name}={_format(value)}")
    line = f"{_quote(role)}: Part({', '.join(fields)}),"
    if len(line) <= LINE - 8:
        return [line]
    return [f"{_quote(role)}: Part(", *(f"    {field}," for field in fields), "),"]


def _format_product(factors: tuple[tuple[str, int], ...]) -> str:
    """A product of config keys as an expression."""
    over = [
        key if key.isdigit() else f"config[{_quote(key)}]"
        for key, exponent in factors
        if exponent > 0
    ]
    under = [f" // config[{_quote(key)}]" for key, exponent in factors if exponent < 0]
    return " * ".join(over) + "".join(under)


def _format(value: Any) -> str:
    """A literal with double quotes."""
    if isinstance(value, str):
        return _quote(value)
    if isinstance(value, tuple):
        inside = ", ".join(map(_format, value))
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_format(k)}: {_format(v)}" for k, v in value.items()) + "}"
    return repr(value)


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def read_family_file(family: str) -> str:
    """The text of a table in `regraft/families`."""
    return (Path(__file__).parents[1] / f"{family}.py").read_text(encoding="utf-8")
