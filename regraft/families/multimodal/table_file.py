"""The table of a multimodal model as text: what stands around its language model, and that one's
own table.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...core.anatomy import list_families
from ...core.part import Config
from ..inference import inferred, table_file
from .wrapped_model import MultimodalAnatomy


def format_wrapped(anatomy: MultimodalAnatomy, config: Config) -> str:
    """What a multimodal model's table says, its language model's last.

    Args:
        anatomy: the table.
        config: of the model.
    """
    text = anatomy.text_config(config)
    if anatomy.own_family in list_families():
        own = table_file.read_family_file(anatomy.own_family)
    else:
        own = table_file.format_table(inferred.find_table(text), text)
    return "\n".join([*_describe_wrapper(anatomy), "", own])


def _describe_wrapper(anatomy: MultimodalAnatomy) -> Iterator[str]:
    """Comments on what stands around the language model."""
    place = anatomy.parts["embed.weight"].name.removesuffix("embed_tokens.weight")
    name = f"{anatomy.family}: its language model ({anatomy.text.family})"
    yield f"# {name} is {place}* in files, and"
    yield "# its config is text_config. What stands beside it:"
    carried = [part for role, part in anatomy.parts.items() if role.startswith("carried.")]
    grows = [part for part in carried if "hidden" in part.signature.split()]
    for part in grows:
        yield f"#   {part.name}: {part.signature}"
    yield f"#   {len(carried) - len(grows)} further tensors, carried as they are"
