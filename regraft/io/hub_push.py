"""Outputs as models on the Hugging Face hub: private, and never over what is not of regraft."""

from __future__ import annotations

from pathlib import Path

from ..errors import RegraftError
from ..progress import Ticker
from .hub import NAME, explain_hub_errors

LINEAGE = "lineage.json"  # of every model that regraft wrote
# What a new model on the hub has, which the hub puts there itself.
EMPTY = {".gitattributes", "README.md"}
NOT_PUSHED = (".regraft*", ".regraft-work/**")  # what only this machine needs


def prepare_push(name: str) -> None:
    """Make a private model on the hub, before the work that is to go there.

    Args:
        name: ORG/NAME.

    RegraftError when the token may not write it, or when there is a model that is not of regraft.
    """
    from huggingface_hub import HfApi

    match = NAME.fullmatch(name)
    if match is None or match["revision"]:
        raise RegraftError(f"--push-to-hub '{name}' is no name on the hub: write ORG/NAME")
    api = HfApi()
    with explain_hub_errors(name, "push to"):
        api.create_repo(name, private=True, exist_ok=True)
        files = set(api.list_repo_files(name))
    if LINEAGE not in files and (foreign := sorted(files - EMPTY)):
        raise RegraftError(
            f"--push-to-hub '{name}' holds '{foreign[0]}' and no {LINEAGE}, so it is not of "
            "regraft: give another name"
        )


def push(folder: Path, name: str) -> str:
    """Upload a model's folder as one commit; returns its address.

    Args:
        folder: of the model, with its card.
        name: ORG/NAME, see `prepare_push`.
    """
    from huggingface_hub import HfApi

    with explain_hub_errors(name, "push to"), Ticker() as ticker:
        ticker.start(f"pushing to {name}")
        pushed = HfApi().upload_folder(
            repo_id=name,
            folder_path=folder,
            ignore_patterns=list(NOT_PUSHED),
            commit_message="regraft",
        )
    return str(pushed.commit_url).partition("/commit/")[0]
