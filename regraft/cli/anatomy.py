"""`regraft anatomy`: the table of a model's family, written or inferred."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .verb import Outcome, Verb

if TYPE_CHECKING:
    from rich.console import Console


def anatomy(source: str, trust_remote_code: bool = False, json: bool = False) -> Outcome:
    """The table of a model's family as a file of regraft/families: what each tensor is, what it is
    as large as, and which growth is proven.

    Args:
        source: the model's directory, or its config.json
        trust_remote_code: run the Python files beside the model, if its classes are there
        json: print one JSON object on standard output and nothing else
    """
    from pathlib import Path

    from ..core.anatomy import find_anatomy, list_families
    from ..core.config_checks import GROWING_AXES, explain_config_errors
    from ..core.custom_code import run_custom_code
    from ..core.model_files import read_model_config
    from ..families.inference import inferred, table_file
    from ..families.multimodal.table_file import format_wrapped
    from ..families.multimodal.wrapped_model import MultimodalAnatomy

    path = Path(source)
    folder = path.parent if path.name == "config.json" else path
    config = read_model_config(folder)
    run_custom_code(folder, trust_remote_code)
    with explain_config_errors(folder / "config.json"):
        table = find_anatomy(config)
        closed = dict(table.closed)
        family = config["model_type"]
        is_inferred = family not in list_families()
        if isinstance(table, MultimodalAnatomy):
            closed |= table.list_closed()
            is_inferred = table.own_family not in list_families()
            text = format_wrapped(table, table.complete(config, {}))
        elif is_inferred:
            text = table_file.format_table(inferred.find_table(config), config)
        else:
            text = table_file.read_family_file(family)

    columns = (*GROWING_AXES, "attention")
    data: dict[str, Any] = {
        "family": family,
        "inferred": is_inferred,
        "open": [name for name in columns if name not in closed],
        "closed": closed,
        "table": text,
    }

    from rich.text import Text

    def show(console: Console) -> None:
        # Whole lines, so that the output is a file that Python reads.
        console.print(Text(text), soft_wrap=True)
        state = "inferred and proven for" if is_inferred else "written; open are"
        notes = [f"# {family}: {state} {', '.join(data['open']) or 'nothing'}"]
        notes += [f"# closed: {name}: {why}" for name, why in closed.items()]
        for note in notes:
            console.print(note, soft_wrap=True)

    return Outcome(data, show)


VERB = Verb(
    anatomy,
    examples=(
        "regraft anatomy SOURCE",
        "regraft anatomy SOURCE --json",
    ),
)
