"""The directory as regraft writes it: stock models as they are, linearized ones with their code."""

from __future__ import annotations

from ...core.anatomy import Config, find_anatomy
from ...core.checkpoint import Checkpoint
from ..target import ExportTarget


def find_misfits(config: Config) -> list[str]:
    """None: whatever continues text is held."""
    anatomy = find_anatomy(config)
    if anatomy.continues_text(config):
        return []
    return [f"{anatomy.family} does not continue text, so nothing can be compared: copy it instead"]


def convert(checkpoint: Checkpoint) -> Checkpoint:
    """The model itself."""
    return checkpoint


target = ExportTarget(
    name="hf",
    loads="transformers; a linearized model with `import regraft.modeling` or trust_remote_code",
    find_misfits=find_misfits,
    convert=convert,
    code=True,
)
