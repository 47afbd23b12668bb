"""Where one parameter of a mixer comes from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightSpec:
    """One parameter of a mixer: its axes and where its value comes from."""

    # Named axes as in `core.axes`, such as "hidden -> kv group dim".
    signature: str
    # Role in the source's anatomy, such as "attn.q.weight". Axes of `signature` that the source's
    # weight lacks are broadcast: with `group`, each key/value head is repeated for its queries.
    source: str | None = None
    # Without a source: the initial value, as `initialize.create_initial_tensor` reads it.
    fresh: str | None = None
    # Whether weight decay may act on it.
    decay: bool = True
