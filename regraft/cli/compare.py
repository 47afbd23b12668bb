"""`regraft compare`: ways to grow or linearize beside training from scratch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .verb import Outcome, Verb

if TYPE_CHECKING:
    from rich.console import Console


def compare(
    recipe: str,
    out: str,
    jobs: int = 1,
    launch: str = "",
    overrides: dict[str, str] | None = None,
    json: bool = False,
) -> Outcome:
    """Compare ways to grow a model with training from scratch, resumably; --key.sub VALUE overrides
    a field.

    Args:
        recipe: a YAML file such as regraft/recipes/compare_decoder.yaml
        out: directory to write
        jobs: runs at a time, each a process of its own with its share of the cores
        launch: what starts a run over several processes, such as "torchrun --standalone
            --nproc-per-node 8"
        json: print one JSON object on standard output and nothing else
    """
    from ..compare import recipe as schema
    from ..compare import report, scheduler

    numbers = scheduler.run(schema.load(recipe, overrides or {}), out, jobs, launch)

    def show(console: Console) -> None:
        report.print_table(numbers, console)
        console.print(f"Page: {out}/compare.html", soft_wrap=True, highlight=False)

    return Outcome(numbers, show, 1 if numbers["failed"] else 0)


VERB = Verb(
    compare,
    examples=(
        "regraft compare recipe.yaml OUT --jobs 2",
        'regraft compare recipe.yaml OUT --seeds "[0]" --train.tokens 51200',
    ),
    resumes=True,
)
