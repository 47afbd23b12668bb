"""Rows of an inferred table: what each tensor is over named axes, what it reads and writes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch.nn import Embedding

from .draft import (
    TIE,
    Draft,
    dim_law,
    ffn_law,
    find_own_role,
    first_name,
    is_gated,
    is_in_out,
    key_law,
    keys_of,
    module_name,
    module_of,
    query_axes,
    query_law,
)
from .experts import is_stacked, is_stored_output_first
from .inner import count_inner, find_scope, writes_stream
from .latent import NORMS, name_axis
from .roles import name_rest
from .shapes import Law, TensorName, list_groups, parse_name, power
from .stream_factors import multiplies_stream
from .table import Row, pack_law

GATED = ("attn.q", "attn.gate")
QKV = ("attn.q", "attn.k", "attn.v")


def name_apart(rows: list[Row]) -> list[Row]:
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


def write_row(draft: Draft, template: str) -> Row:
    """The row of a tensor."""
    parsed = parse_name(first_name(draft, template))
    role = find_own_role(draft, template)
    module = module_of(draft, template)
    laws, name = draft.laws.laws[template], module_name(draft, template)
    some = len(draft.laws.layers.get(template, ())) < draft.tiny.config[draft.keys["depth"] or ""]
    fields: dict[str, Any] = {
        "name": template.partition("#")[0],
        "in_some_layers": "{}" in template and some,
        "shapes": _pack_shapes(draft, template),
    }

    if module is draft.embedding and parsed.suffix == "weight":
        axes = _name_axis(draft, laws[0], ""), _name_axis(draft, laws[1], "")
        return Row("embed.weight", signature=f"{axes[0]} -> {axes[1]}", stored="in out", **fields)
    if name in draft.trace.norms:
        return _write_norm(draft, name, parsed.suffix, role, laws, fields)
    if module is not None and module is draft.head:
        role = "head"
    if template in draft.tied:
        fields["unless"] = TIE
    if parsed.suffix == "bias" and template in draft.tied:
        role = "head.own"  # as `model_tensors.TIES` calls it
    elif parsed.suffix == "bias" and template in draft.tied.values():
        role = "head"
    if isinstance(module, Embedding) and parsed.suffix == "weight":
        axes = _name_axis(draft, laws[0], "pos"), _name_axis(draft, laws[1], "")
        role = "pos" if axes[0] in ("pos", "place") else name_rest(parsed.module)
        return Row(f"{role}.weight", signature=f"{axes[0]} -> {axes[1]}", stored="in out", **fields)

    role = role or _name_other(draft, template)
    if multiplies_stream(draft.tiny, draft.names.by_name, first_name(draft, template), laws):
        fields |= {"reads": "stream", "writes": "stream"}
        return Row(f"{role}.{parsed.suffix}", signature=_write_axes(draft, laws), **fields)
    fields |= _find_streams(draft, name, laws)
    if "{e}" in template:
        fields["at"] = "routed"
    ending = "weight" if role == "attn.sinks" else parsed.suffix
    if is_stacked(draft, parsed, laws):
        return _write_stacked(draft, parsed, role, laws, fields)
    return _write_map(draft, template, f"{role}.{ending}", role, laws, fields)


def _pack_shapes(draft: Draft, template: str) -> tuple[Any, ...]:
    """(place of the row's own, laws of all shapes) where layers differ in it; else ()."""
    groups = list_groups(draft.laws, template)
    if len(groups) == 1:
        return ()
    packed = tuple(tuple(pack_law(law or {(): -1.0}) for law in laws) for laws in groups)
    return groups.index(draft.laws.laws[template]), packed


def is_beside_queries(draft: Draft, template: str) -> bool:
    """Whether a tensor is in the layers that have softmax attention, and in no others."""
    queries = draft.owners.get("attn.q") or draft.owners.get("attn.qkv")
    own = next((one for one in draft.laws.laws if parse_name(one).module == queries), template)
    return draft.laws.layers.get(own) == draft.laws.layers.get(template)


def _name_other(draft: Draft, template: str) -> str:
    """The role of a tensor by its own name; what belongs to the attention goes with it."""
    module = parse_name(first_name(draft, template)).module
    rest = name_rest(module)
    if draft.slot and module == draft.slot:
        return "attn.own"
    if draft.slot and f"{module}.".startswith(f"{draft.slot}."):
        inside = module.removeprefix(draft.slot).removeprefix(".").replace(".", "_")
        if re.fullmatch(r"(.*_)?(gate|g)(_proj)?", inside) and is_beside_queries(draft, template):
            return "attn.gate"
        return f"attn.{inside}".removesuffix(".")
    return rest


def _write_norm(
    draft: Draft,
    name: str,
    ending: str,
    role: str | None,
    laws: list[Law | None],
    fields: dict[str, Any],
) -> Row:
    """The row of a norm's gain or bias."""
    trace = draft.trace
    call = next((call for call in trace.stream_norms if call.name == name), None)
    inner = role in ("attn.q_norm", "attn.k_norm", *NORMS)
    axis = _name_axis(draft, laws[0], role or "") if len(laws) == 1 else _write_axes(draft, laws)
    streams: dict[str, Any] = {"reads": "stream", "writes": "normed"}
    if call is not None and axis == "hidden" and not inner:
        streams = {"reads": trace.find_norm_reads(call), "writes": trace.find_norm_writes(call)}
    if streams["writes"] == "head":
        role = "norm.final"
    elif not inner:
        role = "norm." + name_rest(parse_name(f"{name}.weight").module).removeprefix("other.")
    gain = "1+gain" if trace.norms[name].unit else "gain"
    signature = f"-> {axis}" if ending == "bias" else f"{gain} {axis}"
    fields["centered"] = trace.norms[name].mean and ending != "bias"
    return Row(f"{role}.{ending}", signature=signature, norm=True, **fields, **streams)


def _find_streams(draft: Draft, name: str, laws: list[Law | None]) -> dict[str, str]:
    """What a map with the hidden size among its dimensions reads and writes; {} for others."""
    if power(str(draft.keys["hidden"])) not in laws:
        return {}
    in_layer = "{}" in parse_name(f"{name}.x").template
    streams = {"reads": draft.trace.find_reads(name)}
    return streams | ({"writes": draft.trace.find_writes(name)} if in_layer else {})


def _write_map(
    draft: Draft,
    template: str,
    full_role: str,
    role: str,
    laws: list[Law | None],
    fields: dict[str, Any],
) -> Row:
    """The row of a matrix, a bias or a tensor of more dimensions."""
    if draft.inner and find_scope(draft, template):
        return _write_inner(draft, template, full_role, laws, fields)
    if len(laws) > 2 or not laws:
        return Row(full_role, signature=_write_axes(draft, laws) or "scalar", **fields)
    in_out = is_in_out(draft, template) and len(laws) == 2
    output, fused = _name_output(draft, laws[-1 if in_out else 0], role)
    if output != "hidden":
        fields.pop("writes", None)
    if fused == GATED:
        full_role = full_role.replace("attn.q.", "attn.q_gate.")
    fields |= {"fused": fused, "stored": "in out" if in_out else "out in"}
    fields["by_head"] = fused == QKV and draft.layout == "by head" and "group" in output
    if len(laws) == 1:
        fields.pop("reads", None)
        named = re.search("[a-z]", output)
        return Row(full_role, signature=f"-> {output}" if named else output, **fields)
    given = _name_axis(draft, laws[0 if in_out else 1], role, reads=True)
    if given != "hidden":
        fields.pop("reads", None)
    return Row(full_role, signature=f"{given} -> {output}", **fields)


def _write_stacked(
    draft: Draft, parsed: TensorName, role: str, laws: list[Law | None], fields: dict[str, Any]
) -> Row:
    """The row of a map or a bias of all experts."""
    ending = "bias" if parsed.suffix.endswith("bias") else "weight"
    output_first = len(laws) == 2 or is_stored_output_first(draft, parsed, laws)
    output, fused = _name_output(draft, laws[1 if output_first else 2], role)
    given = "" if ending == "bias" else _name_axis(draft, laws[2 if output_first else 1], role)
    if output != "hidden":
        fields.pop("writes", None)
    if given != "hidden":
        fields.pop("reads", None)
    outputs = " + ".join(f"expert {one}" for one in output.split(" + "))
    fields |= {"fused": fused, "stored": f"expert {'out in' if output_first else 'in out'}"}
    return Row(f"{role}.{ending}", signature=f"{given} -> {outputs}".strip(), at="routed", **fields)


def _write_inner(
    draft: Draft, template: str, full_role: str, laws: list[Law | None], fields: dict[str, Any]
) -> Row:
    """The row of a tensor of a layer with a state or a convolution."""
    if len(laws) > 2:
        named = [_name_inner(draft, law) for law in laws]
        axes = [
            one[0] if len(one) == 1 else _name_number(draft, law)
            for one, law in zip(named, laws, strict=True)
        ]
        return Row(full_role, signature=" ".join(axes), **fields)
    output = ["hidden"] if len(laws) == 2 and writes_stream(template) else None
    output = output or _name_inner(draft, laws[0])
    if len(output) > 1:
        role, _, ending = full_role.rpartition(".")
        fields["fused"] = tuple(f"{role}_{index}" for index in range(len(output)))
    if output != ["hidden"]:
        fields.pop("writes", None)
    right = " + ".join(output)
    if len(laws) == 1:
        fields.pop("reads", None)
        return Row(full_role, signature=f"-> {right}", **fields)
    reads_stream = laws[1] == power(str(draft.keys["hidden"])) and not writes_stream(template)
    given = "hidden" if reads_stream else _name_inner(draft, laws[1])[0]
    if given != "hidden":
        fields.pop("reads", None)
    return Row(full_role, signature=f"{given} -> {right}", **fields)


def _name_inner(draft: Draft, law: Law | None) -> list[str]:
    """The axes of a dimension, those of stacked maps one by one."""
    assert draft.inner is not None
    times, rest = count_inner(law, draft.inner)
    if not times or law is None:
        return [_name_number(draft, law)]
    return ["inner"] * times + ([_name_number(draft, rest)] if rest else [])


def _write_axes(draft: Draft, laws: list[Law | None]) -> str:
    return " ".join(_name_axis(draft, law, "") for law in laws)


def _name_output(draft: Draft, law: Law | None, role: str) -> tuple[str, tuple[str, ...]]:
    """(axes that a map writes, roles of the maps that are packed)."""
    if role == "attn.qkv" and role in draft.heads:
        if draft.layout == "interleaved" and query_axes(draft) == "kv":
            return "kv three dim", QKV
        return f"{query_axes(draft)} dim + kv dim + kv dim", QKV
    if role == "attn.q" and role in draft.heads and is_gated(draft, law):
        return f"{query_axes(draft)} two dim", GATED
    if role.endswith("gate_up") and law is not None and law == ffn_law(draft, 2.0):
        prefix = role.removesuffix("gate_up")
        return "ffn + ffn", (f"{prefix}gate", f"{prefix}up")
    return _name_axis(draft, law, role), ()


def _name_axis(draft: Draft, law: Law | None, role: str, reads: bool = False) -> str:
    """The named axes of a dimension, or a number in angle brackets.

    Args:
        draft: what is known.
        law: of the dimension.
        role: of the tensor.
        reads: whether a map reads the dimension.
    """
    if draft.latent and (name := name_axis(draft.latent, role, law, str(draft.keys["heads"]))):
        return name
    return _name_usual_axis(draft, law, role, reads)


def _name_usual_axis(draft: Draft, law: Law | None, role: str, reads: bool) -> str:
    """The same without latent attention."""
    keys = draft.keys
    wide = f"{query_axes(draft)} dim"
    if role in draft.heads and law is not None:
        if role in ("attn.q", "attn.q_norm") and not reads and law == query_law(draft):
            return wide
        if role == "attn.o" and reads and law == query_law(draft):
            return wide
        if role in ("attn.k", "attn.v", "attn.k_norm") and not reads and law == key_law(draft):
            return "kv dim"
        if role == "attn.sinks" and law == power(str(keys["heads"])):
            return wide.removesuffix(" dim")
        if "norm" in role and law == dim_law(draft):
            return "dim"
    if role.startswith("attn.") and role not in draft.heads and draft.heads:
        if name := _name_head_axes(draft, law):
            return name
    for axis in ("vocab", "hidden"):
        if law == power(str(keys[axis])):
            return axis
    if role == "pos" and law is not None and (name := _name_positions(draft, law)):
        return name
    if role.endswith("router") and law == power(str(draft.laws.expert)):
        return "expert"
    is_mlp = role.startswith(("mlp.", "shared.")) and not role.endswith("router")
    if is_mlp and draft.ffn_ratio and law == ffn_law(draft):
        return "ffn"
    if is_mlp and (times := _divide(law, draft.ffn, draft.ffn_share)):
        return "ffn" if times == {(): 1.0} else f"{_name_number(draft, times)} ffn"
    return _name_number(draft, law)


def _name_positions(draft: Draft, law: Law) -> str | None:
    """The axis of a table of positions; None when no key says its size."""
    positions = power(str(draft.keys["pos"]))
    if law == positions:
        return "pos"
    if law == positions | {(): law.get((), 0.0)}:  # with rows before the first
        draft.derived["_places"] = law
        return "place"
    return None


def _name_head_axes(draft: Draft, law: Law | None) -> str | None:
    """The axes of further tensors of attention, such as gates; None when they are not heads'."""
    keys = draft.keys
    queries = query_axes(draft)
    named = [(power(str(keys["heads"])), queries)]
    if not draft.coupled:
        named += [(query_law(draft), f"{queries} dim"), (key_law(draft), "kv dim")]
    return next((name for one, name in named if law == one), None)


def _divide(law: Law | None, key: str | None, share: float = 1.0) -> Law | None:
    """A product of keys over a share of one of them; None when it is no product with that key
    once.
    """
    if law is None or len(law) != 1 or key is None:
        return None
    ((monomial, factor),) = law.items()
    if dict(monomial).get(key) != 1:
        return None
    return {tuple(pair for pair in monomial if pair[0] != key): factor / share}


def _name_number(draft: Draft, law: Law | None) -> str:
    """The place of a number in a signature; axes that it follows are closed."""
    if law is None:
        for axis in ("hidden", "ffn", "kv", "group", "dim"):
            draft.closed.setdefault(axis, "a size follows the config in a way no table can say")
        law = {(): -1.0}
    keys = draft.keys
    axes = {keys["hidden"]: ["hidden"], draft.ffn: ["ffn"], keys["heads"]: ["group", "kv"],
            keys["kv"]: ["kv"], keys["dim"]: ["dim"]}  # fmt: skip
    for key in keys_of(law) & {key for key in axes if key}:
        for axis in axes[key]:
            draft.closed.setdefault(axis, f"{key} also sets sizes that the table has no axis for")
    if law not in draft.numbers:
        draft.numbers.append(law)
    return f"<{draft.numbers.index(law)}>"
