"""Infer the table of a model type: shapes, probes and a trace put together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from .draft import Draft, find_inner_norms, find_names, start_draft, untie
from .inner import divide_by_hidden
from .latent import CLOSED
from .rotation import Rotation, norms_after_rotation, probe_rotation
from .rows import QKV, name_apart, write_row
from .settings import (
    find_divisors,
    find_eps,
    find_key_factor,
    find_routed,
    find_scale,
    find_scale_name,
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
    for layout in ("stacked", "interleaved", "by head"):
        draft = start_draft(untied, laws, trace, names, model, layout)
        if layout == ("interleaved" if draft.keys["kv"] else "by head"):
            continue
        table = _write_table(draft, probe_rotation(untied, model, draft.slot_module))
        yield table
        yield from _activate_heads(table)
        # Other ways to pack are tried where there are several.
        if draft.single_kv or not any(row.fused == QKV and not row.by_head for row in table.rows):
            return


def _activate_heads(table: InferredTable) -> Iterator[InferredTable]:
    """The same with an activation behind the maps over the stream that stand outside the layers, as
    in the heads of masked language models; nothing where there are none.
    """
    maps = {
        row.name.rpartition(".")[0]
        for row in table.rows
        if "{}" not in row.name and row.signature == "hidden -> hidden"
    }
    if maps:
        rows = tuple(
            replace(row, writes="activated") if row.name.rpartition(".")[0] in maps else row
            for row in table.rows
        )
        yield replace(table, rows=rows)


def _write_table(draft: Draft, rotation: Rotation) -> InferredTable:
    rows = name_apart([write_row(draft, template) for template in draft.laws.laws])
    rows.sort(key=lambda row: 0 if row.role == "embed.weight" else 1)
    sizes, fixed, filled = write_sizes(draft)
    if draft.latent:
        draft.closed |= dict.fromkeys(("kv", "group", "dim"), CLOSED)
        if draft.latent.why_not:
            draft.closed["attention"] = draft.latent.why_not
    elif not draft.heads:
        why = "no softmax attention with queries, keys and values of equal heads was found"
        draft.closed |= dict.fromkeys(("kv", "group", "dim", "attention"), why)
    elif draft.single_kv:
        draft.closed["kv"] = "all query heads share one key/value head"
    elif draft.keys["kv"] is None:
        draft.closed["group"] = "every query head has a key/value head of its own"
    if draft.ffn_ratio:
        times = f"{draft.ffn_ratio} times hidden"
        draft.closed["ffn"] = f"the class fixes the MLP at {times}: it grows with hidden"
    elif draft.ffn is None:
        draft.closed["ffn"] = "no config key sets the width of the MLP alone"

    if rotation.why_not:
        draft.closed["attention"] = rotation.why_not

    config = draft.tiny.config
    eps, fixed_eps = find_eps(draft)
    return InferredTable(
        family=draft.tiny.family,
        kind=draft.tiny.kind.__name__,
        rows=tuple(rows),
        numbers=tuple(map(pack_law, draft.numbers)),
        sizes=sizes,
        fixed=fixed,
        slot=draft.slot_module,
        eps=eps,
        fixed_eps=fixed_eps,
        activation=next((k for k in config if re.fullmatch(r"hidden_act\w*|\w*activation\w*", k)
                         and isinstance(config[k], str)), "hidden_act"),
        rotary=any("rotary" in f"{name} {type(module).__name__}".lower()
                   for name, module in draft.names.by_name.items()),
        rotary_pairs=rotation.pairs,
        rotary_tables=rotation.tables,
        rotates=rotation.layers,
        norms_rotated=norms_after_rotation(draft.trace, draft.slot_module),
        embed_scale=has_embed_scale(draft),
        causal=draft.tiny.kind.__name__.endswith(("ForCausalLM", "LMHeadModel")),
        scale=find_scale(draft),
        scale_name=find_scale_name(draft),
        latent={axis: pack_law(law) for axis, law in draft.latent.sizes.items()}
        if draft.latent else {},
        latent_eps=draft.latent.eps if draft.latent else None,
        key_factor=find_key_factor(draft),
        softcap=next((k for k in config if "attn_logit_softcap" in k), None),
        inner=pack_law(divide_by_hidden(draft, draft.inner)) if draft.inner else (),
        routed=find_routed(draft),
        divides=find_divisors(draft),
        multiples={"hidden": 8, "ffn": 8} if draft.laws.expert else {},
        filled=filled,
        derived={key: pack_law(law) for key, law in draft.derived.items()},
        ffn_ratio=draft.ffn_ratio,
        closed=draft.closed,
    )  # fmt: skip
