"""Which of the source attention's projections a mixer copies; the others begin anew."""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import RegraftError
from .weight_spec import WeightSpec

PROJECTIONS = ("q", "k", "v", "o")
# Maps of latent attention -> the projection that they are a part of.
LATENT = {"q_a": "q", "q_b": "q", "kv_a": "v", "kv_b": "v"}
# First word of a signature -> how such a weight begins: biases, gains, gains stored minus one.
FRESH = {"->": "zeros", "gain": "ones", "1+gain": "zeros"}


def parse_inherit(inherit: str) -> frozenset[str]:
    """The projections that `all`, `none` or a list such as `v,o` names.

    Raises RegraftError for any other word.
    """
    if inherit in ("all", "none"):
        return frozenset(PROJECTIONS if inherit == "all" else ())
    words = [word.strip() for word in inherit.split(",")]
    if unknown := [word for word in words if word not in PROJECTIONS]:
        raise RegraftError(
            f"--inherit '{inherit}' names '{unknown[0]}': give all, none or a list of "
            f"{', '.join(PROJECTIONS)}"
        )
    return frozenset(words)


def apply_inherit(table: dict[str, WeightSpec], inherit: str, hidden: int) -> dict[str, WeightSpec]:
    """The weights of a mixer where only the projections of `inherit` are copied.

    The others begin as a new model's: matrices normal with variance 0.4 / hidden (arXiv 1910.05895,
    as in XATL, arXiv 2404.02684), biases zero, gains of norms one. The norm of queries goes with q,
    that of keys with k.

    Args:
        table: local parameter name -> WeightSpec, with everything copied that can be.
        inherit: as `parse_inherit` reads it.
        hidden: width of the residual stream.
    """
    kept = parse_inherit(inherit)
    from_latent = any(name.startswith("latent.") for name in table)
    if from_latent and len(kept & {"k", "v"}) == 1:
        raise RegraftError(
            f"--inherit '{inherit}' parts keys from values, which latent attention makes of one"
            " latent: name both or neither"
        )
    matrix = f"normal {math.sqrt(0.4 / hidden):.6g}"

    def init_unless_inherited(weight: WeightSpec) -> WeightSpec:
        name = (weight.source or "").split(".")[-2:][0].removesuffix("_norm")
        projection = LATENT.get(name, name)
        if weight.source is None or projection not in PROJECTIONS or projection in kept:
            return weight
        head = weight.signature.split()[0]
        return replace(weight, source=None, fresh=FRESH.get(head, matrix))

    return {name: init_unless_inherited(weight) for name, weight in table.items()}
