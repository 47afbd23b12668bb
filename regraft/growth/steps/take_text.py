"""TakeText: the language model of a multimodal model, as a model of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...core.anatomy import find_anatomy
from ...core.auto_map import find_architecture, find_auto_map
from ...core.checkpoint import Checkpoint
from ...core.lazy import Provenance
from ...core.step import step_entry
from ...errors import RegraftError
from ...families.multimodal.wrapped_model import MultimodalAnatomy
from ...families.regraft import join_host


@dataclass(frozen=True)
class TakeText:
    """Take the language model out of a multimodal model, as the stock class of its own type.

    Mixers in its layers stay where they are.

    Preserves: the logits of text, bit for bit.
    Refuses: models of one part, and language models that no class holds alone.
    """

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The language model; nothing is read."""
        table = source.anatomy.host(source.config)
        if not isinstance(table, MultimodalAnatomy):
            raise RegraftError(
                f"'{source.origin}' is a {table.family}, which has no language model among"
                " other parts: leave out --part"
            )
        config = table.take_text_config(source.anatomy.host_config(source.config))
        anatomy = find_anatomy(config)
        if table is not source.anatomy:
            own = {
                "architectures": [find_architecture(config)],
                "auto_map": find_auto_map(config),
                "slot": anatomy.slot,
            }
            config = join_host({**source.config, **own}, config)
            anatomy = source.anatomy
        placed = anatomy.place(config)
        if missing := sorted(role for role, _ in placed.keys() - source.tensors.keys()):
            raise RegraftError(
                f"'{source.origin}' has no '{missing[0]}', which a {config['architectures'][0]} "
                "needs: take the model with its language model's head"
            )

        beside = [name for key, name in source.names.items() if key not in placed]
        return replace(
            source,
            config=config,
            anatomy=anatomy,
            sizes=anatomy.solve(config),
            tensors={
                key: replace(
                    source.tensors[key], provenance=Provenance("copied", (source.names[key],))
                )
                for key in placed
            },
            names={key: part.name for key, part in placed.items()},
            dropped=source.dropped | dict.fromkeys(beside, "stands beside the language model"),
            history=(*source.history, step_entry(self)),
        )
