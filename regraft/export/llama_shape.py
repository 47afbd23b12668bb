"""What of a model differs from Llama's shape, which engines compute: found in the tables and in the
config as transformers reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.anatomy import Anatomy, Config, Part
from ..core.attention import LATENT
from ..core.stock_config import find_activation, read_stock_config
from ..families.llama import anatomy as llama

ACTIVATION = "silu"


def find_differences(
    config: Config, anatomy: Anatomy, also: Mapping[str, Part] | None = None
) -> list[str]:
    """What a stock decoder computes and Llama does not, a line each, with the key it comes from.

    Args:
        config: of the stock decoder.
        anatomy: its table.
        also: by role, further parts that it may have.
    """
    if not anatomy.causal or not anatomy.rotary:
        what = "reads in both directions" if not anatomy.causal else "has no rotary positions"
        return [f"{anatomy.family} {what}"]
    if any(role.startswith("carried.") for role in anatomy.parts):
        return [
            f"{anatomy.family} has other parts beside its language model (--part text of "
            "regraft convert takes that out)"
        ]
    if not anatomy.continues_text(config):
        return [f"{config['architectures'][0]} has no head of a language model"]
    if LATENT in anatomy.parts:
        return [f"{anatomy.family} has latent attention, whose keys and values are made of one"]

    stock = read_stock_config(config, anatomy)
    found = find_other_parts(config, anatomy, also or {})
    if anatomy.eps != llama.eps:
        found.append(f"{anatomy.eps} is of norms that subtract the mean")
    activation = find_activation(config, anatomy)
    if activation != ACTIVATION:
        found.append(f"{anatomy.activation.lstrip('_')} is {activation}, not {ACTIVATION}")
    for key in anatomy.factors:
        if getattr(stock, key) not in (None, 1):
            found.append(f"{key} is {getattr(stock, key):g}, not 1")
    if anatomy.rotary_pairs:
        found.append(f"{anatomy.family} turns neighbouring coordinates of a head together")
    layers = range(stock.num_hidden_layers)
    if still := [one for one in layers if not anatomy.attention(config, one)["rotary"]]:
        found.append(f"layers {still} have no rotary positions")
    if anatomy.embed_scale:
        found.append(f"{anatomy.family} multiplies embeddings by the root of hidden_size")
    if anatomy.softcap and anatomy.attention(config, 0).get("softcap") is not None:
        found.append(f"{anatomy.softcap[0]} caps the scores")
    return found + find_rotary_differences(getattr(stock, "rope_parameters", None) or {})


def find_other_parts(config: Config, anatomy: Anatomy, also: Mapping[str, Part]) -> list[str]:
    """The first parameter that Llama's layers do not have, lack or have between other norms."""
    full = anatomy.fill_defaults(config)
    table = {
        name: row
        for role, part in anatomy.parts.items()
        if part.is_present(full)
        for name, row in describe_maps(role, part).items()
    }
    known = {**llama.parts, **also}
    usual = {role: describe_maps(role, part)[role] for role, part in known.items()}
    needed = [role for role, part in llama.parts.items() if part.when is None is part.unless]
    for role, (name, axes, *_) in table.items():
        if role not in usual or usual[role][1] != axes:
            return [f"{anatomy.family} has '{name}' ({axes})"]
    for role in needed:
        if role not in table:
            return [f"{anatomy.family} has no '{llama.parts[role].name}'"]
    moved = [row[0] for role, row in table.items() if usual[role][2:] != row[2:]]
    return (
        [f"{anatomy.family} has its norms elsewhere, such as around '{moved[0]}'"] if moved else []
    )


def describe_maps(role: str, part: Part) -> dict[str, tuple[str, ...]]:
    """(name, axes, streams) of the maps in a tensor, by role: one, or those that are packed."""
    streams = (part.reads, part.writes) if part.is_matrix or part.norm else ()
    if not part.fused:
        return {role: (part.name, part.signature, *streams)}
    kind, found = role.rpartition(".")[2], {}
    for number, name in enumerate(part.fused):
        piece = part.axes.piece(number)
        text = f"{' '.join(piece.inputs)} -> {' '.join(piece.outputs[0])}".strip()
        found[f"{name}.{kind}"] = (part.name, text, *streams)
    return found


def find_rotary_differences(rope: dict[str, Any]) -> list[str]:
    """What of `rope_parameters` Llama's rotary positions do not read."""
    if rope and all(isinstance(value, dict) for value in rope.values()):
        return [f"rope_parameters differ by kind of layer ({', '.join(sorted(rope))})"]
    if beta := rope.get("llama_4_scaling_beta"):
        return [f"llama_4_scaling_beta is {beta:g}: queries grow with their position"]
    share = rope.get("partial_rotary_factor")
    return [f"partial_rotary_factor is {share:g}, not 1"] if share not in (None, 1, 1.0) else []
