"""Infer the table of a model type: shapes, probes and a trace put together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from .draft import Draft, find_inner_norms, find_names, start_draft, untie
from .inner import divide_by_hidden
from .rows import QKV, name_apart, write_row
from .settings import (
    find_divisors,
    find_eps,
    find_routed,
    find_scale,
    has_embed_scale,
    write_sizes,
)
from .shapes import find_laws
from .table import InferredTable, check_has_depth, pack_law
from .tiny_model import TinyModel
from .trace import trace_forward


def infer_tables(tiny: TinyModel) -> Iterator[InferredTable]:
    """The tables that a class may have, the likelier first; only a proof says which is right.

    Args:
        tiny: a tiny model of the type.

    RegraftError when no table can hold the type.
    """
    untied = replace(tiny, config=untie(tiny))
    check_has_depth(untied.config, untied.aliases, untied.family)
    laws = find_laws(untied)
    model = untied.build_random()
    names = find_names(model)
    width = untied.config[untied.key("hidden") or ""]
    trace = trace_forward(untied, model, width, find_inner_norms(names))
    for layout in ("stacked", "interleaved"):
        draft = start_draft(untied, laws, trace, names, model, layout)
        table = _write_table(draft)
        yield table
        if not any(row.fused == QKV and row.signature.count("+") for row in table.rows):
            return


def _write_table(draft: Draft) -> InferredTable:
    rows = name_apart([write_row(draft, template) for template in draft.laws.laws])
    rows.sort(key=lambda row: 0 if row.role == "embed.weight" else 1)
    sizes, fixed, filled = write_sizes(draft)
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
        eps=find_eps(draft),
        activation=next((k for k in config if re.fullmatch(r"hidden_act\w*|\w*activation\w*", k)
                         and isinstance(config[k], str)), "hidden_act"),
        rotary=any("rotary" in f"{name} {type(module).__name__}".lower()
                   for name, module in draft.names.by_name.items()),
        embed_scale=has_embed_scale(draft),
        causal=draft.tiny.kind.__name__.endswith(("ForCausalLM", "LMHeadModel")),
        scale=find_scale(draft),
        softcap=next((k for k in config if "attn_logit_softcap" in k), None),
        inner=pack_law(divide_by_hidden(draft, draft.inner)) if draft.inner else (),
        routed=find_routed(draft),
        divides=find_divisors(draft),
        multiples={"hidden": 8, "ffn": 8} if draft.laws.expert else {},
        filled=filled,
        closed=draft.closed,
    )  # fmt: skip
