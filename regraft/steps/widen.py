"""Widen: more hidden coordinates, neurons, heads or head coordinates, and the same function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..checkpoint import Checkpoint
from ..errors import RegraftError
from ..growth import targets
from ..growth.widen import widened
from ..recipe import entry


@dataclass(frozen=True)
class Widen:
    """Grow axes together, every size given or derived from the others (composable expansions, arXiv 2308.06103, made
    exact on real classes; HyperCloning, arXiv 2409.12903; Net2Net, arXiv 1511.05641; bert2BERT, arXiv 2110.07143;
    LEMON, arXiv 2310.07999).

    `heads` are query heads; `how` is one operator for all axes or one each ("hidden=tile,ffn=pad"): `pad` (new units
    do nothing: zero outputs, random inputs), `zero_in` (zero inputs), `pair` (two alike with opposite outputs), `split`
    (copies that share unevenly), `tile` (whole copies), `duplicate` (copies drawn at random), `aki` (copies from the
    next layer), `lemon` (as many whole copies of the stream as fit, then zeros or averages). Heads' own coordinates are
    always padded. `fold`: how norms over a padded stream keep their mean square, `eps` (gains and epsilon), `stream`
    (everything written) or `auto` (`eps` where the class allows it). `noise` breaks the symmetry of copies without
    changing the function; None turns it on where copies would stay identical.

    Preserves: the logits, up to rounding, except with `aki`.
    Refuses: smaller sizes, and sizes the class cannot hold exactly; the message names the nearest that work.
    """

    hidden: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    how: str = "pad"
    fold: Literal["auto", "stream", "eps"] = "auto"
    noise: float | None = None
    seed: int = 0

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The wider checkpoint."""
        asked = targets.Asked(self.hidden, self.ffn, self.heads, self.kv_heads, self.head_dim)
        made = targets.widening(source, asked, self.how, self.fold, self.noise, self.seed)
        config = dict(made.config)
        sizes = source.anatomy.solve(config)
        if sizes != dict(made.sizes):
            raise RegraftError(
                f"{source.anatomy.family} config gives axes {sizes}, not {dict(made.sizes)}: mend its table"
            )
        return replace(
            source, config=config, sizes=sizes, tensors=widened(made), history=(*source.history, entry(self))
        )
