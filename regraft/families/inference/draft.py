"""What is known of a class while its table is written: shapes, a trace, and which config keys count
what.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from .inner import find_inner
from .latent import LatentAttention, find_latent
from .roles import find_attention, find_named_role, find_role
from .shapes import Law, ShapeLaws, list_stored, list_tensors, parse_name, power
from .tiny_model import TinyModel
from .trace import Trace

TIE = "tie_word_embeddings"
FFN = "_ffn"  # derived config key of the width of an MLP without a key
INNER = ("attn.q_norm", "attn.k_norm", "attn.sinks")  # roles of attention that some have


@dataclass
class ModelNames:
    """Where a tensor of a file comes from in the model."""

    # Module by the name of the tensor in a file.
    modules: dict[str, str]
    # Names of all modules -> modules.
    by_name: dict[str, Any]


@dataclass
class Draft:
    """What is known while rows are written."""

    tiny: TinyModel
    laws: ShapeLaws
    trace: Trace
    names: ModelNames
    embedding: Any
    # The output embedding; None without one.
    head: Any
    # Config keys by what they count.
    keys: dict[str, str | None]
    # Whether the heads have no size of their own: hidden = heads x size.
    coupled: bool
    # How queries, keys and values are packed: "stacked", "interleaved" or "by head".
    layout: str
    # Roles of attention whose sizes are those of heads.
    heads: set[str] = field(default_factory=set)
    # Module of each of these roles, with "{}" for its layer.
    owners: dict[str, str] = field(default_factory=dict)
    # Whether all query heads share one key/value head that no config key counts.
    single_kv: bool = False
    numbers: list[Law] = field(default_factory=list)
    closed: dict[str, str] = field(default_factory=dict)
    ffn: str | None = None
    # Width of the MLP over the value of that key, 1 or 1/2.
    ffn_share: float = 1.0
    # The MLP's width over that of the stream, where the class fixes it; 0: it has a key.
    ffn_ratio: int = 0
    # Derived config keys -> their laws.
    derived: dict[str, Law] = field(default_factory=dict)
    # Size of the channels of layers with a state or a convolution, where it follows hidden.
    inner: Law | None = None
    # Name of the attention module with "{}" for its layer, as in files; empty without softmax
    # attention.
    slot: str = ""
    # Latent attention in the place of heads with keys and values of their own; None without.
    latent: LatentAttention | None = None
    # The same as in the model, where it has another name.
    slot_module: str = ""
    # Tensors that a tied model lacks -> the tensors that stand for them.
    tied: dict[str, str] = field(default_factory=dict)


def untie(tiny: TinyModel) -> dict[str, Any]:
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


def find_tied(untied: TinyModel) -> dict[str, str]:
    """Tensors that a model lacks where its output embedding is tied -> those that stand for them.

    Args:
        untied: with an output embedding of its own.
    """
    if TIE not in untied.full:
        return {}
    try:
        model = untied.build({TIE: True}, "meta")
    except Exception:  # a class that is never tied
        return {}
    missing = list_stored(untied.build(device="meta")).keys() - list_stored(model).keys()
    twins: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: twins.get(name, "") for name in missing}


def find_names(model: Any) -> ModelNames:
    """The module that each tensor of a file belongs to."""
    from transformers.core_model_loading import revert_weight_conversion

    modules: dict[str, str] = {}
    for name, value in list_tensors(model).items():
        try:
            stored = revert_weight_conversion(model, {name: value.detach()})
        except Exception:  # tensors that are converted together with others
            stored = {name: value}
        modules |= {other: name.rpartition(".")[0] for other in stored}
    return ModelNames(modules, dict(model.named_modules()))


def find_inner_norms(names: ModelNames) -> frozenset[str]:
    """Modules that are norms of queries and keys by their names."""
    inner = set()
    for name in names.by_name:
        role = find_role(parse_name(f"{name}.weight").module)
        if role in ("attn.q_norm", "attn.k_norm"):
            inner.add(name)
    return frozenset(inner)


def start_draft(
    tiny: TinyModel, laws: ShapeLaws, trace: Trace, names: ModelNames, model: Any, layout: str
) -> Draft:
    """A draft without rows.

    Args:
        tiny: the class and a tiny config.
        laws: how its shapes follow from the config.
        trace: of a forward pass.
        names: where tensors come from.
        model: that was traced.
        layout: how queries, keys and values are packed, as in `Draft`.
    """
    keys = {kind: tiny.key(kind) for kind in ("hidden", "depth", "heads", "kv", "vocab", "pos")}
    keys["dim"] = tiny.key("dim") or ("head_dim" if "head_dim" in tiny.config else None)
    if keys["kv"] not in laws.sizes:
        keys["kv"] = None
    in_use = {key for found in laws.laws.values() for law in found for key in keys_of(law)}
    draft = Draft(
        tiny,
        laws,
        trace,
        names,
        model.get_input_embeddings(),
        _find_head(model),
        keys,
        coupled=keys["dim"] not in in_use,
        layout=layout,
    )
    draft.tied = find_tied(tiny)
    draft.single_kv = _shares_one_head(draft)
    draft.ffn = _find_ffn_key(draft)
    draft.ffn_share = _find_ffn_share(draft)
    draft.ffn_ratio = 0 if draft.ffn else _find_ffn_ratio(draft)
    if draft.ffn_ratio:
        draft.ffn = FFN
        draft.derived[FFN] = power(str(keys["hidden"]), factor=float(draft.ffn_ratio))
    draft.owners = find_head_owners(draft)
    draft.heads = {*draft.owners, *(INNER if draft.owners else ())}
    draft.latent = None if draft.owners else find_latent(draft)
    draft.slot = draft.latent.slot if draft.latent else find_slot(draft)
    draft.slot_module = find_slot_module(draft)
    draft.inner = find_inner(draft)
    return draft


def _find_head(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except Exception:  # classes without one raise anything
        return None


def _shares_one_head(draft: Draft) -> bool:
    """Whether queries, keys and values are packed with one key/value head for all queries."""
    if draft.keys["kv"] or not draft.keys["heads"]:
        return False
    packed = _add(query_law(draft), dim_law(draft), 2.0)
    return any(
        find_named_role(template) == "attn.qkv" and packed in found
        for template, found in draft.laws.laws.items()
    )


def query_axes(draft: Draft) -> str:
    """The axes that count query heads."""
    return "kv group" if draft.keys["kv"] or draft.single_kv else "kv"


def keys_of(law: Law | None) -> set[str]:
    """The config keys in a law."""
    return {key for monomial in law or {} for key, _ in monomial}


def query_law(draft: Draft) -> Law:
    """The size of all queries together."""
    keys = draft.keys
    if draft.coupled:
        return power(str(keys["hidden"]))
    return power(str(keys["heads"]), str(keys["dim"]))


def key_law(draft: Draft) -> Law:
    """The size of all keys together."""
    keys = draft.keys
    if draft.single_kv:
        return dim_law(draft)
    if keys["kv"] is None:
        return query_law(draft)
    if draft.coupled:
        return power(str(keys["hidden"]), (str(keys["heads"]), -1), keys["kv"])
    return power(keys["kv"], str(keys["dim"]))


def _find_ffn_key(draft: Draft) -> str | None:
    """The config key of the width of the MLP; of that of its experts where it has any."""
    known = set(draft.keys.values())
    counts: dict[str, int] = {}
    for template, found in draft.laws.laws.items():
        role = find_named_role(template) or ""
        if not role.startswith("mlp.") or role == "mlp.router":
            continue
        for law in found:
            (monomial,) = law if law and len(law) == 1 else ((),)
            if len(monomial) == 1 and monomial[0][1] == 1 and monomial[0][0] not in known:
                if monomial[0][0] != draft.laws.expert:
                    weight = 100 if "{e}" in role or len(found) == 3 else 1
                    counts[monomial[0][0]] = counts.get(monomial[0][0], 0) + weight
    return max(counts, key=lambda key: counts[key], default=None)


def _iter_mlp_laws(draft: Draft) -> Iterator[Law]:
    """The laws of the dimensions of an MLP's maps."""
    for template, found in draft.laws.laws.items():
        if re.match(r"(mlp|shared)\.(?!router)", find_named_role(template) or ""):
            yield from (law for law in found if law is not None)


def _find_ffn_share(draft: Draft) -> float:
    """1/2 where the maps of the MLP have half the width that the config says, else 1."""
    halved = draft.ffn and power(draft.ffn, factor=0.5) in _iter_mlp_laws(draft)
    return 0.5 if halved else 1.0


def _find_ffn_ratio(draft: Draft) -> int:
    """The MLP's width over the hidden size where no key sets it; 0 without such an MLP."""
    hidden = str(draft.keys["hidden"])
    for law in _iter_mlp_laws(draft):
        factor = law.get(((hidden, 1),), 0.0)
        if len(law) == 1 and factor > 1 and factor == int(factor):
            return int(factor)
    return 0


def find_head_owners(draft: Draft) -> dict[str, str]:
    """Module of every role of softmax attention, whose tensors have the sizes of heads; empty
    without such attention.

    In hybrids other layers have other attention: what belongs together is in the same module of the
    same layers.
    """
    if draft.keys["heads"] is None:
        return {}
    modules = _group_attention(draft)
    for whole in (("attn.q", "attn.k", "attn.v", "attn.o"), ("attn.qkv", "attn.o")):
        for roles in modules:
            if set(whole) <= set(roles):
                return roles
    return {}


def _group_attention(draft: Draft) -> list[dict[str, str]]:
    """By attention module and the layers that have it: the modules of its roles that have the sizes
    of heads.
    """
    query, key = query_law(draft), key_law(draft)
    fits = {
        "attn.q": [query, _add(query, query, 1.0)],
        "attn.k": [key],
        "attn.v": [key],
        "attn.o": [query],
        "attn.qkv": [_add(query, key, 2.0)],
    }
    groups: dict[tuple[str, tuple[int, ...]], dict[str, str]] = {}
    for template, laws in draft.laws.laws.items():
        module = parse_name(template).module
        role = find_role(module)
        if role not in fits or len(laws) != 2:
            continue
        is_output = (role != "attn.o") != is_in_out(draft, template)
        if laws[0 if is_output else 1] in fits[role]:
            place = find_attention(module), tuple(draft.laws.layers.get(template, ()))
            groups.setdefault(place, {}).setdefault(role, module)
    return list(groups.values())


def find_own_role(draft: Draft, template: str) -> str | None:
    """The role of a tensor; None for one that is called as those of softmax attention are, and is
    none of them.
    """
    role = find_named_role(template)
    if draft.latent is not None:
        is_attention = (role or "").startswith("attn.")
        return draft.latent.roles.get(template, None if is_attention else role)
    taken = draft.owners.get(role or "")
    return role if taken is None or taken == parse_name(template).module else None


def is_gated(draft: Draft, law: Law | None) -> bool:
    """Whether the size of an output is that of queries and of a gate for each of them."""
    query = query_law(draft)
    return law == _add(query, query, 1.0)


def _add(first: Law, second: Law, factor: float) -> Law:
    """One law plus `factor` times another."""
    total = dict(first)
    for monomial, value in second.items():
        total[monomial] = total.get(monomial, 0.0) + factor * value
    return total


def is_in_out(draft: Draft, template: str) -> bool:
    """Whether a matrix is stored input first, as GPT-2's Conv1D is."""
    module = module_of(draft, template)
    return type(module).__name__ == "Conv1D"


def first_name(draft: Draft, template: str) -> str:
    """The first tensor of a template."""
    return draft.laws.first[template]


def module_name(draft: Draft, template: str) -> str:
    """Name of the module that the first tensor of a template belongs to."""
    name = first_name(draft, template)
    return draft.names.modules.get(name, name.rpartition(".")[0])


def module_of(draft: Draft, template: str) -> Any:
    """The module of `module_name`; None when there is none."""
    return draft.names.by_name.get(module_name(draft, template))


def find_slot(draft: Draft) -> str:
    """Name of the attention module; empty without softmax attention."""
    queries = draft.owners.get("attn.q") or draft.owners.get("attn.qkv", "")
    return queries.removesuffix(".linear").rpartition(".")[0]


def find_slot_module(draft: Draft) -> str:
    """Name of the attention module in the model, which files may call otherwise."""
    modules = {parse_name(f"{name}.weight").module for name in draft.names.by_name}
    if not draft.slot or draft.slot in modules:
        return draft.slot
    maps = (name for name in sorted(modules) if find_role(name) in ("attn.q", "attn.qkv"))
    return next(maps, draft.slot).rpartition(".")[0]


def ffn_law(draft: Draft, factor: float = 1.0) -> Law | None:
    """A multiple of the width of the MLP; None without an MLP."""
    if draft.ffn_ratio:
        return power(str(draft.keys["hidden"]), factor=draft.ffn_ratio * factor)
    return power(draft.ffn, factor=draft.ffn_share * factor) if draft.ffn else None


def dim_law(draft: Draft) -> Law:
    """The size of a head."""
    keys = draft.keys
    if draft.coupled:
        return power(str(keys["hidden"]), (str(keys["heads"]), -1))
    return power(str(keys["dim"]))
