"""Multi-head latent attention (MLA) in a class: which tensors are its maps, and its sizes.

Names say which map is which, the laws of shapes whether they go together as in DeepSeek's classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .roles import find_attention
from .shapes import Law, parse_name, power

if TYPE_CHECKING:
    from .draft import Draft

# Role of a tensor -> its name inside the attention module.
NAMES = {
    "attn.q": r"q_proj",
    "attn.q_a": r"q_a_proj",
    "attn.q_a_norm": r"q_a_layernorm",
    "attn.q_b": r"q_b_proj",
    "attn.kv_a": r"kv_a_proj(_with_mqa)?",
    "attn.kv_a_norm": r"kv_a_layernorm",
    "attn.kv_b": r"kv_b_proj",
    "attn.o": r"o_proj|dense",
}
NORMS = ("attn.q_a_norm", "attn.kv_a_norm")
WITH_BIAS = ("attn.q_a", "attn.kv_a", "attn.o")
CLOSED = "all heads make keys and values of one latent: the table has no axis for them"


@dataclass(frozen=True)
class LatentAttention:
    """Latent attention as a class has it."""

    # Role by template.
    roles: dict[str, str]
    # Law of the size of each axis of the heads.
    sizes: dict[str, Law]
    # Name of the attention module, with "{}" for its layer.
    slot: str
    # Layers of the tiny model that have it.
    layers: tuple[int, ...]
    # Why no mixer can replace it; empty: some can.
    why_not: str = ""
    # Epsilon of its norms where the class fixes it; None: that of the other norms.
    eps: float | None = None


@dataclass
class _Group:
    """Tensors of one attention module in the same layers."""

    slot: str
    layers: tuple[int, ...]
    # Template and laws by role.
    templates: dict[str, str] = field(default_factory=dict)
    laws: dict[str, list[Law | None]] = field(default_factory=dict)


def find_latent(draft: Draft) -> LatentAttention | None:
    """The latent attention of a class; None when it has none, or other maps than DeepSeek's."""
    heads = draft.keys["heads"]
    for group in _group_maps(draft):
        sizes = find_sizes(group.laws, power(str(heads))) if heads else None
        if sizes is None:
            continue
        roles = {template: role for role, template in group.templates.items()}
        biases, others = _find_rest(draft, group)
        why = ""
        if others:
            inside = others[0].removeprefix(f"{group.slot}.").partition("#")[0]
            why = f"latent attention with '{inside}' beside it is not carried over"
        eps, known = _find_eps(draft, group)
        if not why and not known:
            why = "its norms over latents do not say their epsilon"
        return LatentAttention(roles | biases, sizes, group.slot, group.layers, why, eps)
    return None


def _group_maps(draft: Draft) -> list[_Group]:
    """Weights with the names of latent attention, by module and the layers that have them."""
    groups: dict[tuple[str, tuple[int, ...]], _Group] = {}
    for template, laws in draft.laws.laws.items():
        parsed = parse_name(template.partition("#")[0])
        slot = find_attention(parsed.module)
        role = _find_role(parsed.module.removeprefix(f"{slot}."))
        if role is None or parsed.suffix != "weight" or "{}" not in slot:
            continue
        layers = tuple(draft.laws.layers.get(template, ()))
        group = groups.setdefault((slot, layers), _Group(slot, layers))
        group.templates[role], group.laws[role] = template, laws
    return list(groups.values())


def _find_role(name: str) -> str | None:
    return next((role for role, known in NAMES.items() if re.fullmatch(known, name)), None)


def find_sizes(laws: dict[str, list[Law | None]], heads: Law) -> dict[str, Law] | None:
    """The law of each axis where the shapes are those of latent attention, else None.

    Args:
        laws: of a weight's dimensions, by role.
        heads: the number of heads.
    """
    given = {role: found for role, found in laws.items() if None not in found}
    read: dict[str, Any] = given
    if not {"attn.kv_a", "attn.kv_a_norm", "attn.kv_b", "attn.o"} <= set(read):
        return None
    if ("attn.q" in read) == ({"attn.q_a", "attn.q_a_norm", "attn.q_b"} <= set(read)):
        return None
    latent, queries = read["attn.kv_a_norm"][0], read["attn.q" if "attn.q" in read else "attn.q_b"]
    sizes = {
        "latent": latent,
        "rope": _subtract(read["attn.kv_a"][0], latent),
        "dim": divide(queries[0], heads),
        "value": divide(read["attn.o"][1], heads),
    }
    if not all(sizes.values()):
        return None
    # What each head makes of the latent: its own part of the keys, and values.
    expanded = _subtract(_add(sizes["dim"], sizes["value"]), sizes["rope"])
    if divide(read["attn.kv_b"][0], heads) != expanded or read["attn.kv_b"][1] != latent:
        return None
    if "attn.q_b" in read:
        sizes["query_latent"] = read["attn.q_a_norm"][0]
        widths = read["attn.q_a"][0], read["attn.q_b"][1]
        if widths != (sizes["query_latent"],) * 2:
            return None
    return sizes


def _add(first: Law, second: Law, factor: float = 1.0) -> Law:
    total = dict(first)
    for monomial, value in second.items():
        total[monomial] = total.get(monomial, 0.0) + factor * value
    return {monomial: value for monomial, value in total.items() if value}


def _subtract(first: Law, second: Law) -> Law:
    return _add(first, second, -1.0)


def divide(law: Law, heads: Law) -> Law:
    """A law over the number of heads; {} where that is no factor of all of it."""
    (((key, _),),) = heads
    divided: Law = {}
    for monomial, value in law.items():
        if dict(monomial).get(key) != 1:
            return {}
        divided[tuple(pair for pair in monomial if pair[0] != key)] = value
    return divided


def _find_rest(draft: Draft, group: _Group) -> tuple[dict[str, str], list[str]]:
    """(roles of the biases by template, templates that no table of latent attention has a role
    for), of the same module and some of the same layers.
    """
    biases, others = {}, []
    for template in draft.laws.laws:
        parsed = parse_name(template.partition("#")[0])
        shared = set(draft.laws.layers.get(template, ())) & set(group.layers)
        if not f"{parsed.module}.".startswith(f"{group.slot}.") or not shared:
            continue
        role = _find_role(parsed.module.removeprefix(f"{group.slot}."))
        if role is not None and group.templates.get(role) == template:
            continue
        if role in WITH_BIAS and parsed.suffix == "bias":
            biases[template] = role
        else:
            others.append(template)
    both = {role for role in biases.values() if role != "attn.o"}
    if both and both != {role for role in ("attn.q_a", "attn.kv_a") if role in group.templates}:
        others += [template for template, role in biases.items() if role in both]
    return biases, others


def _find_eps(draft: Draft, group: _Group) -> tuple[float | None, bool]:
    """(epsilon of the norms over latents where it does not follow the config, whether it is
    known).
    """
    keys = [key for key, value in draft.tiny.config.items()
            if "eps" in key and isinstance(value, float)]  # fmt: skip
    names = [draft.laws.first[group.templates[role]].rpartition(".")[0]
             for role in NORMS if role in group.templates]  # fmt: skip
    with_other = draft.tiny.build({key: 2.0**-4 for key in keys}, "meta")
    held = [
        {_read_eps(dict(model.named_modules()).get(name)) for name in names}
        for model in (draft.tiny.build(None, "meta"), with_other)
    ]
    if any(len(one) != 1 or None in one for one in held):
        return None, False
    (stated,), (moved,) = held
    if stated == moved:
        return stated, True
    return None, moved == 2.0**-4


def _read_eps(module: Any) -> float | None:
    for name in ("eps", "variance_epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def name_axis(latent: LatentAttention, role: str, law: Law | None, heads: str) -> str | None:
    """The named axes of a dimension of latent attention; None where it has a number.

    Args:
        latent: what was found.
        role: of the tensor.
        law: of the dimension.
        heads: config key of the number of heads.
    """
    if law is None or role not in NAMES:
        return None
    if role in ("attn.q", "attn.q_b") and divide(law, power(heads)) == latent.sizes["dim"]:
        return "kv dim"
    if role == "attn.o" and divide(law, power(heads)) == latent.sizes["value"]:
        return "kv value"
    if role in ("attn.q_a", "attn.q_a_norm", "attn.q_b"):
        return "query_latent" if law == latent.sizes.get("query_latent") else None
    if role in ("attn.kv_a_norm", "attn.kv_b"):
        return "latent" if law == latent.sizes["latent"] else None
    return None
