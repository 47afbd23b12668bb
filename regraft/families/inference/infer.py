"""Infer the table of a model type: shapes, probes and a trace put together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .roles import find_role, name_rest
from .shapes import Law, ShapeLaws, find_laws, list_tensors, parse_name, power
from .table import InferredTable, Row, check_has_depth, pack_law
from .tiny_model import TinyModel
from .trace import Trace, trace_forward

QKV = ("attn.q", "attn.k", "attn.v")
GATE_UP = ("mlp.gate", "mlp.up")
TIE = "tie_word_embeddings"
# Attributes of attention modules that hold the factor on the scores.
SCALES = ("scaling", "scale", "softmax_scale", "inv_norm_factor", "scale_attn")


@dataclass
class _Names:
    """Where a tensor of a file comes from in the model."""

    # Module by the name of the tensor in a file.
    modules: dict[str, str]
    # Names of all modules -> modules.
    by_name: dict[str, Any]


@dataclass
class _Draft:
    """What is known while rows are written."""

    tiny: TinyModel
    laws: ShapeLaws
    trace: Trace
    names: _Names
    embedding: Any
    # Config keys by what they count.
    keys: dict[str, str | None]
    # Whether the heads have no size of their own: hidden = heads x size.
    coupled: bool
    # How queries, keys and values are packed: "stacked" or "interleaved".
    layout: str
    # Roles of attention whose sizes are those of heads.
    heads: set[str] = field(default_factory=set)
    numbers: list[Law] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    ffn: str | None = None
    # Name of the attention module with "{}" for its layer; empty without softmax attention.
    slot: str = ""


def infer_tables(tiny: TinyModel) -> Iterator[InferredTable]:
    """The tables that a class may have, the likelier first; only a proof says which is right.

    Args:
        tiny: a tiny model of the type.

    RegraftError when no table can hold the type.
    """
    untied = replace(tiny, config=_untie(tiny))
    check_has_depth(untied.config, untied.aliases, untied.family)
    laws = find_laws(untied)
    model = untied.build_random()
    names = _find_names(model)
    width = untied.config[untied.key("hidden") or ""]
    trace = trace_forward(untied, model, width, _find_inner_norms(names))
    for layout in ("stacked", "interleaved"):
        draft = _start_draft(untied, laws, trace, names, model, layout)
        table = _write_table(draft)
        yield table
        if not any(row.fused == QKV and row.signature.count("+") for row in table.rows):
            return


def _untie(tiny: TinyModel) -> dict[str, Any]:
    """The tiny config with an output embedding of its own, if the class has such a switch."""
    if TIE not in tiny.full or not tiny.full[TIE]:
        return dict(tiny.config)
    changed = tiny.config | {TIE: False}
    try:
        tied, untied = (
            len(list(tiny.build({TIE: value}, "meta").named_parameters()))
            for value in (True, False)
        )
    except Exception:  # a class that is always tied
        return dict(tiny.config)
    return changed if untied > tied else dict(tiny.config)


def _find_names(model: Any) -> _Names:
    """The module that each tensor of a file belongs to."""
    from transformers.core_model_loading import revert_weight_conversion

    modules = {}
    for name, value in list_tensors(model).items():
        try:
            stored = revert_weight_conversion(model, {name: value.detach()})
        except Exception:  # tensors that are converted together with others
            stored = {name: value}
        modules |= {other: name.rpartition(".")[0] for other in stored}
    return _Names(modules, dict(model.named_modules()))


def _find_inner_norms(names: _Names) -> frozenset[str]:
    """Modules that are norms of queries and keys by their names."""
    inner = set()
    for name in names.by_name:
        role = find_role(parse_name(f"{name}.weight").module)
        if role in ("attn.q_norm", "attn.k_norm"):
            inner.add(name)
    return frozenset(inner)


def _start_draft(
    tiny: TinyModel, laws: ShapeLaws, trace: Trace, names: _Names, model: Any, layout: str
) -> _Draft:
    keys = {kind: tiny.key(kind) for kind in ("hidden", "depth", "heads", "kv", "vocab", "pos")}
    keys["dim"] = tiny.key("dim") or ("head_dim" if "head_dim" in tiny.config else None)
    if keys["kv"] not in laws.sizes:
        keys["kv"] = None
    in_use = {key for found in laws.laws.values() for law in found for key in _keys_of(law)}
    draft = _Draft(
        tiny,
        laws,
        trace,
        names,
        model.get_input_embeddings(),
        keys,
        coupled=keys["dim"] not in in_use,
        layout=layout,
    )
    draft.ffn = _find_ffn_key(draft)
    draft.heads = _find_head_roles(draft)
    draft.slot = _find_slot(draft)
    return draft


def _keys_of(law: Law | None) -> set[str]:
    """The config keys in a law."""
    return {key for monomial in law or {} for key, _ in monomial}


def _query_law(draft: _Draft) -> Law:
    """The size of all queries together."""
    keys = draft.keys
    if draft.coupled:
        return power(str(keys["hidden"]))
    return power(str(keys["heads"]), str(keys["dim"]))


def _key_law(draft: _Draft) -> Law:
    """The size of all keys together."""
    keys = draft.keys
    if keys["kv"] is None:
        return _query_law(draft)
    if draft.coupled:
        return power(str(keys["hidden"]), (str(keys["heads"]), -1), keys["kv"])
    return power(keys["kv"], str(keys["dim"]))


def _find_ffn_key(draft: _Draft) -> str | None:
    """The config key of the width of the MLP; of that of its experts where it has any."""
    known = set(draft.keys.values())
    counts: dict[str, int] = {}
    for template, found in draft.laws.laws.items():
        role = find_role(parse_name(template).module) or ""
        if not role.startswith("mlp.") or role == "mlp.router":
            continue
        for law in found:
            (monomial,) = law if law and len(law) == 1 else ((),)
            if len(monomial) == 1 and monomial[0][1] == 1 and monomial[0][0] not in known:
                if monomial[0][0] != draft.laws.expert:
                    weight = 100 if "{e}" in role else 1
                    counts[monomial[0][0]] = counts.get(monomial[0][0], 0) + weight
    return max(counts, key=lambda key: counts[key], default=None)


def _find_head_roles(draft: _Draft) -> set[str]:
    """Roles of attention whose tensors have the sizes of heads; empty without such attention."""
    if draft.keys["heads"] is None:
        return set()
    query, key = _query_law(draft), _key_law(draft)
    found: dict[str, Law | None] = {}
    for template, laws in draft.laws.laws.items():
        role = find_role(parse_name(template).module)
        if role in ("attn.q", "attn.k", "attn.v", "attn.qkv", "attn.o") and len(laws) == 2:
            is_output = (role != "attn.o") != _is_in_out(draft, template)
            found[role] = laws[0 if is_output else 1]
    packed = [_add(query, key, 2.0)]
    fits = {
        "attn.q": [query],
        "attn.k": [key],
        "attn.v": [key],
        "attn.o": [query],
        "attn.qkv": packed,
    }
    roles = {role for role, law in found.items() if law in fits[role]}
    whole = {"attn.qkv", "attn.o"} <= roles or {"attn.q", "attn.k", "attn.v", "attn.o"} <= roles
    if not whole:
        return set()
    return roles | {"attn.q_norm", "attn.k_norm", "attn.sinks"}


def _add(first: Law, second: Law, factor: float) -> Law:
    """One law plus `factor` times another."""
    total = dict(first)
    for monomial, value in second.items():
        total[monomial] = total.get(monomial, 0.0) + factor * value
    return total


def _is_in_out(draft: _Draft, template: str) -> bool:
    """Whether a matrix is stored input first, as GPT-2's Conv1D is."""
    module = _module_of(draft, template)
    return type(module).__name__ == "Conv1D"


def _first_name(draft: _Draft, template: str) -> str:
    """The first tensor of a template."""
    return next(name for name in draft.laws.base if parse_name(name).template == template)


def _module_name(draft: _Draft, template: str) -> str:
    name = _first_name(draft, template)
    return draft.names.modules.get(name, name.rpartition(".")[0])


def _module_of(draft: _Draft, template: str) -> Any:
    return draft.names.by_name.get(_module_name(draft, template))


def _write_table(draft: _Draft) -> InferredTable:
    rows = _name_apart([_write_row(draft, template) for template in draft.laws.laws])
    rows.sort(key=lambda row: 0 if row.role == "embed.weight" else 1)
    sizes, fixed, filled = _write_sizes(draft)
    for template in draft.laws.uneven:
        for axis in ("hidden", "depth", "ffn", "kv", "group", "dim"):
            draft.closed[axis] = f"layers differ in the shape of '{template}'"
    if not draft.heads:
        why = "no softmax attention with queries, keys and values of equal heads was found"
        draft.closed |= dict.fromkeys(("kv", "group", "dim", "attention"), why)
    elif draft.keys["kv"] is None:
        draft.closed["group"] = "every query head has a key/value head of its own"
    if draft.ffn is None:
        draft.closed["ffn"] = "no config key sets the width of the MLP alone"

    config = draft.tiny.config
    return InferredTable(
        family=draft.tiny.family,
        kind=draft.tiny.kind.__name__,
        rows=tuple(rows),
        numbers=tuple(map(pack_law, draft.numbers)),
        sizes=sizes,
        fixed=fixed,
        slot=draft.slot,
        eps=_find_eps(draft),
        activation=next((k for k in config if re.fullmatch(r"hidden_act\w*|\w*activation\w*", k)
                         and isinstance(config[k], str)), "hidden_act"),
        rotary=any("rotary" in name for name in draft.names.by_name),
        embed_scale=_has_embed_scale(draft),
        causal=draft.tiny.kind.__name__.endswith(("ForCausalLM", "LMHeadModel")),
        scale=_find_scale(draft),
        softcap=next((k for k in config if "attn_logit_softcap" in k), None),
        routed=_find_routed(draft),
        divides=_find_divisors(draft),
        multiples={"hidden": 8, "ffn": 8} if draft.laws.expert else {},
        filled=filled,
        closed=draft.closed,
    )  # fmt: skip


def _name_apart(rows: list[Row]) -> list[Row]:
    """Rows with a role each: of several with the same, the first keeps it."""
    taken: set[str] = set()
    apart = []
    for row in rows:
        if row.role in taken:
            ending = row.name.rpartition(".")[2]
            row = replace(row, role=f"{name_rest(parse_name(row.name).module)}.{ending}")
        taken.add(row.role)
        apart.append(row)
    return apart


def _write_row(draft: _Draft, template: str) -> Row:
    """The row of a tensor."""
    parsed = parse_name(_first_name(draft, template))
    role, module = find_role(parsed.module, parsed.ending), _module_of(draft, template)
    laws, name = draft.laws.laws[template], _module_name(draft, template)
    some = len(draft.laws.layers.get(template, ())) < draft.tiny.config[draft.keys["depth"] or ""]
    fields: dict[str, Any] = {"name": template, "in_some_layers": "{}" in template and some}

    if module is draft.embedding and parsed.ending == "weight":
        axes = _name_axis(draft, laws[0], ""), _name_axis(draft, laws[1], "")
        return Row("embed.weight", signature=f"{axes[0]} -> {axes[1]}", stored="in out", **fields)
    if name in draft.trace.norms:
        return _write_norm(draft, name, parsed.ending, role, laws, fields)
    if role == "head":
        fields["unless"] = TIE if TIE in draft.tiny.full else None
    if type(module).__name__ == "Embedding":
        axes = _name_axis(draft, laws[0], "pos"), _name_axis(draft, laws[1], "")
        role = "pos" if axes[0] == "pos" else name_rest(parsed.module)
        return Row(f"{role}.weight", signature=f"{axes[0]} -> {axes[1]}", stored="in out", **fields)

    role = role or _name_other(draft, parsed.module)
    fields |= _find_streams(draft, name, laws)
    if "{e}" in template:
        fields["at"] = "routed"
    ending = "weight" if role == "attn.sinks" else parsed.ending
    return _write_map(draft, template, f"{role}.{ending}", role, laws, fields)


def _name_other(draft: _Draft, module: str) -> str:
    """The role of a tensor by its own name; what belongs to the attention goes with it."""
    rest = name_rest(module)
    if draft.slot and f"{module}.".startswith(f"{draft.slot}."):
        return "attn." + module.removeprefix(f"{draft.slot}.").replace(".", "_")
    return rest


def _write_norm(
    draft: _Draft,
    name: str,
    ending: str,
    role: str | None,
    laws: list[Law | None],
    fields: dict[str, Any],
) -> Row:
    """The row of a norm's gain or bias."""
    trace = draft.trace
    call = next((call for call in trace.stream_norms if call.name == name), None)
    inner = role in ("attn.q_norm", "attn.k_norm")
    axis = _name_axis(draft, laws[0], role or "") if len(laws) == 1 else _write_axes(draft, laws)
    streams = {"reads": "stream", "writes": "normed"}
    if call is not None and axis == "hidden" and not inner:
        streams = {"reads": trace.find_norm_reads(call), "writes": trace.find_norm_writes(call)}
    if streams["writes"] == "head":
        role = "norm.final"
    elif not inner:
        role = "norm." + name_rest(parse_name(f"{name}.weight").module).removeprefix("other.")
    gain = "1+gain" if trace.norms[name].unit else "gain"
    signature = f"-> {axis}" if ending == "bias" else f"{gain} {axis}"
    return Row(f"{role}.{ending}", signature=signature, norm=True, **fields, **streams)


def _find_streams(draft: _Draft, name: str, laws: list[Law | None]) -> dict[str, str]:
    """What a map with the hidden size among its dimensions reads and writes; {} for others."""
    if power(str(draft.keys["hidden"])) not in laws:
        return {}
    in_layer = "{}" in parse_name(f"{name}.x").template
    streams = {"reads": draft.trace.find_reads(name)}
    return streams | ({"writes": draft.trace.find_writes(name)} if in_layer else {})


def _write_map(
    draft: _Draft,
    template: str,
    full_role: str,
    role: str,
    laws: list[Law | None],
    fields: dict[str, Any],
) -> Row:
    """The row of a matrix, a bias or a tensor of more dimensions."""
    if len(laws) > 2 or not laws:
        return Row(full_role, signature=_write_axes(draft, laws) or "one", **fields)
    in_out = _is_in_out(draft, template) and len(laws) == 2
    output, fused = _name_output(draft, laws[-1 if in_out else 0], role)
    if output != "hidden":
        fields.pop("writes", None)
    fields |= {"fused": fused, "stored": "in out" if in_out else "out in"}
    if len(laws) == 1:
        fields.pop("reads", None)
        named = re.search("[a-z]", output)
        return Row(full_role, signature=f"-> {output}" if named else output, **fields)
    given = _name_axis(draft, laws[0 if in_out else 1], role, reads=True)
    if given != "hidden":
        fields.pop("reads", None)
    return Row(full_role, signature=f"{given} -> {output}", **fields)


def _write_axes(draft: _Draft, laws: list[Law | None]) -> str:
    return " ".join(_name_axis(draft, law, "") for law in laws)


def _name_output(
    draft: _Draft, law: Law | None, role: str
) -> tuple[str, tuple[str, ...]]:
    """(axes that a map writes, roles of the maps that are packed)."""
    if role == "attn.qkv" and role in draft.heads:
        queries = "kv group dim" if draft.keys["kv"] else "kv dim"
        if draft.layout == "interleaved" and not draft.keys["kv"]:
            return "kv three dim", QKV
        return f"{queries} + kv dim + kv dim", QKV
    if role.endswith("gate_up") and draft.ffn and law == power(draft.ffn, factor=2.0):
        prefix = role.removesuffix("gate_up")
        return "ffn + ffn", (f"{prefix}gate", f"{prefix}up")
    return _name_axis(draft, law, role), ()


def _name_axis(draft: _Draft, law: Law | None, role: str, reads: bool = False) -> str:
    """The named axes of a dimension, or a number in angle brackets.

    Args:
        draft: what is known.
        law: of the dimension.
        role: of the tensor.
        reads: whether a map reads the dimension.
    """
    keys = draft.keys
    wide = "kv group dim" if keys["kv"] else "kv dim"
    if role in draft.heads and law is not None:
        if role in ("attn.q", "attn.q_norm") and not reads and law == _query_law(draft):
            return wide
        if role == "attn.o" and reads and law == _query_law(draft):
            return wide
        if role in ("attn.k", "attn.v", "attn.k_norm") and not reads and law == _key_law(draft):
            return "kv dim"
        if role == "attn.sinks" and law == power(str(keys["heads"])):
            return wide.removesuffix(" dim")
        if "norm" in role and law == _dim_law(draft):
            return "dim"
    if role.startswith("attn.") and role not in draft.heads and draft.heads:
        if name := _name_head_axes(draft, law):
            return name
    for axis in ("vocab", "hidden"):
        if law == power(str(keys[axis])):
            return axis
    if role == "pos" and law == power(str(keys["pos"])):
        return "pos"
    if role.endswith("router") and law == power(str(draft.laws.expert)):
        return "expert"
    is_mlp = role.startswith(("mlp.", "shared.")) and not role.endswith("router")
    if is_mlp and (times := _divide(law, draft.ffn)):
        return "ffn" if times == {(): 1.0} else f"{_name_number(draft, times)} ffn"
    return _name_number(draft, law)


def _name_head_axes(draft: _Draft, law: Law | None) -> str | None:
    """The axes of further tensors of attention, such as gates; None when they are not heads'."""
    keys = draft.keys
    queries = "kv group" if keys["kv"] else "kv"
    named = [(power(str(keys["heads"])), queries)]
    if not draft.coupled:
        named += [(_query_law(draft), f"{queries} dim"), (_key_law(draft), "kv dim")]
    return next((name for one, name in named if law == one), None)


def _divide(law: Law | None, key: str | None) -> Law | None:
    """A product of keys without one of them; None when it is no product with that key once."""
    if law is None or len(law) != 1 or key is None:
        return None
    ((monomial, factor),) = law.items()
    if dict(monomial).get(key) != 1:
        return None
    return {tuple(pair for pair in monomial if pair[0] != key): factor}


def _dim_law(draft: _Draft) -> Law:
    """The size of a head."""
    keys = draft.keys
    if draft.coupled:
        return power(str(keys["hidden"]), (str(keys["heads"]), -1))
    return power(str(keys["dim"]))


def _name_number(draft: _Draft, law: Law | None) -> str:
    """The place of a number in a signature; axes that it follows are closed."""
    if law is None:
        for axis in ("hidden", "ffn", "kv", "group", "dim"):
            draft.closed.setdefault(axis, "a size follows the config in a way no table can say")
        law = {(): -1.0}
    keys = draft.keys
    axes = {keys["hidden"]: ["hidden"], draft.ffn: ["ffn"], keys["heads"]: ["group", "kv"],
            keys["kv"]: ["kv"], keys["dim"]: ["dim"]}  # fmt: skip
    for key in _keys_of(law) & {key for key in axes if key}:
        for axis in axes[key]:
            draft.closed.setdefault(axis, f"{key} also sets sizes that the table has no axis for")
    if law not in draft.numbers:
        draft.numbers.append(law)
    return f"<{draft.numbers.index(law)}>"


def _write_sizes(
    draft: _Draft,
) -> tuple[tuple[tuple[str, str], ...], dict[str, int], dict[str, tuple[tuple[str, int], ...]]]:
    """(sizes, fixed, filled) of the table."""
    keys, filled = draft.keys, {}
    hidden, heads, kv, dim = (keys[kind] for kind in ("hidden", "heads", "kv", "dim"))
    sizes = [(keys["vocab"], "vocab"), (hidden, "hidden"), (keys["depth"], "depth")]
    fixed = {}
    if draft.ffn:
        sizes.append((draft.ffn, "ffn"))
    else:
        fixed["ffn"] = 1
    if draft.laws.expert:
        sizes.append((draft.laws.expert, "expert"))
    if keys["pos"] in draft.laws.sizes:
        sizes.append((keys["pos"], "pos"))
    if not draft.heads:
        fixed |= {"kv": 1, "group": 1, "dim": 1}
    else:
        wide = "kv group" if kv else "kv"
        sizes += [(kv, "kv")] if kv else []
        sizes.append((heads, wide))
        sizes.append((hidden, f"{wide} dim") if draft.coupled else (dim, "dim"))
        fixed |= {} if kv else {"group": 1}
        if not draft.coupled:
            filled[str(dim)] = ((str(hidden), 1), (str(heads), -1))
        if kv:
            filled[kv] = ((str(heads), 1),)
    stated = tuple((str(key), axes) for key, axes in sizes if key)
    return stated, fixed, filled


def _find_slot(draft: _Draft) -> str:
    """Name of the attention module; empty without softmax attention."""
    for template in draft.laws.laws:
        role = find_role(parse_name(template).module)
        if role in ("attn.q", "attn.qkv") and role in draft.heads:
            return parse_name(template).module.rpartition(".")[0]
    return ""


def _find_eps(draft: _Draft) -> str:
    """Config key of the epsilon that the norms of the stream have."""
    config = draft.tiny.config
    found = [key for key, value in config.items() if "eps" in key and isinstance(value, float)]
    norms = [call.module for call in draft.trace.stream_norms]
    held = {
        getattr(module, name, None) for module in norms for name in ("eps", "variance_epsilon")
    }
    return next((key for key in found if config[key] in held), next(iter(found), "norm_eps"))


def _has_embed_scale(draft: _Draft) -> bool:
    """Whether the table of embeddings is multiplied by the root of the hidden size."""
    root = draft.trace.width**0.5
    factor = draft.trace.find_embedding_factor(draft.embedding)
    own = getattr(draft.embedding, "scalar_embed_scale", getattr(draft.embedding, "embed_scale", 1))
    return any(abs(float(one) - root) < 1e-2 * root for one in (factor, own))


def _find_scale(draft: _Draft) -> tuple[str, float] | None:
    """Config key and exponent of the factor on the scores; None for one over the root of dim."""
    module = draft.names.by_name.get(draft.slot.replace("{}", "0"))
    value = next((float(v) for v in (getattr(module, name, None) for name in SCALES)
                  if isinstance(v, int | float)), None)  # fmt: skip
    config = draft.tiny.config
    dim = config.get(draft.keys["dim"] or "") or draft.trace.width // config.get(
        draft.keys["heads"] or "", 1
    )
    if value is None:
        return None
    # Other numbers may happen to be equal: names that speak of attention come first.
    for words in ("att|query", "scal|multiplier"):
        for key, given in config.items():
            is_number = isinstance(given, int | float) and not isinstance(given, bool)
            is_size = key in draft.laws.sizes or key == draft.keys["depth"]
            if not is_number or is_size or given <= 0 or not re.search(words, key):
                continue
            for exponent in (1.0, -0.5, -1.0):
                if abs(float(given) ** exponent - value) < 1e-6:
                    return key, exponent
        if abs(value - dim**-0.5) < 1e-6:
            return None
    draft.closed.setdefault("dim", f"the factor {value:g} on the scores follows no config key")
    return None


def _find_routed(draft: _Draft) -> str:
    """Config key of the number of experts that a token is sent to."""
    key = draft.tiny.key("routed") if draft.laws.expert else None
    return key or ""


def _find_divisors(draft: _Draft) -> tuple[tuple[str, str], ...]:
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
