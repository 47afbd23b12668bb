"""Where a model comes from: lineage.json and the model card beside every output."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RegraftError
from ..io.files import read_json, sha256
from ..io.safetensors import weight_files

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

FILE = "lineage.json"
KINDS = ("copied", "grown", "broadcast", "zero", "fresh")
PAPERS = {
    "gated_deltanet": "Gated Delta Networks, arXiv 2412.06464",
    "gla": "Gated Linear Attention Transformers with Hardware-Efficient Training, arXiv 2312.06635",
    "hedgehog": "The Hedgehog & the Porcupine, arXiv 2402.04347",
    "lightning": "Lightning Attention-2, arXiv 2401.04658",
    "lolcats": "LoLCATs: On Low-Rank Linearizing of Large Language Models, arXiv 2410.10254",
    "retnet": "Retentive Network, arXiv 2307.08621",
    "rwkv6": (
        "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence, arXiv 2404.05892"
    ),
    "supra": "Linearizing Large Language Models, arXiv 2405.06640",
    "t2r": "Finetuning Pretrained Transformers into RNNs, arXiv 2103.13076",
    "window": "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
}


def read_lineage(folder: Path) -> dict[str, Any]:
    """lineage.json of a directory, or an empty dict."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else {}


def is_trained(lineage: dict[str, Any]) -> bool:
    """Whether a step changed weights by training."""
    return any(step.get("step") == "Train" for step in lineage.get("steps", []))


def origin(checkpoint: Checkpoint) -> dict[str, Any]:
    """The pretrained model at the root of a checkpoint: path, family, hash of every weight file,
    hash over all.
    """
    if known := read_lineage(checkpoint.folder).get("source") if checkpoint.folder else None:
        return dict(known)
    files = [checkpoint.origin] if checkpoint.origin.is_file() else weight_files(checkpoint.origin)
    hashes = {file.name: sha256(file) for file in files}
    whole = "".join(hashes.values())
    one = len(hashes) == 1
    return {
        "path": str(checkpoint.origin.resolve()),
        "family": checkpoint.config.get("host", checkpoint.config)["model_type"],
        "files": hashes,
        "sha256": whole if one else hashlib.sha256(whole.encode()).hexdigest(),
    }


def count_by_kind(checkpoint: Checkpoint) -> dict[str, dict[str, float]]:
    """Per kind of story: number of tensors, parameters, and their share of all parameters."""
    table = {kind: {"count": 0, "parameters": 0, "share": 0.0} for kind in KINDS}
    whole = sum(lazy.size for lazy in checkpoint.tensors.values())
    for lazy in checkpoint.tensors.values():
        row = table[lazy.story.kind]
        row["count"] += 1
        row["parameters"] += lazy.size
        row["share"] = row["parameters"] / whole
    return table


def build_lineage(checkpoint: Checkpoint, files: dict[str, str]) -> dict[str, Any]:
    """The content of lineage.json for a checkpoint saved as `files` (name -> sha256)."""
    stories = {checkpoint.names[key]: lazy.story for key, lazy in checkpoint.tensors.items()}
    seeds = [
        step["arguments"]["seed"]
        for step in checkpoint.history
        if "seed" in step.get("arguments", {})
    ]
    return {
        "source": origin(checkpoint),
        "steps": list(checkpoint.history),
        "seed": seeds[-1] if seeds else None,
        "versions": versions(),
        "totals": count_by_kind(checkpoint),
        "dropped": checkpoint.dropped,
        "tensors": {name: [s.kind, list(s.sources), s.note] for name, s in stories.items()},
        "files": files,
    }


def fingerprint(checkpoint: Checkpoint, shard_bytes: int) -> str:
    """A hash over all that decides what a checkpoint's files hold when saved: source files, steps,
    sizes, versions.
    """
    folder = checkpoint.path
    stories = {checkpoint.names[key]: lazy for key, lazy in checkpoint.tensors.items()}
    facts = {
        "source": {
            file.name: sha256(file) for file in [*weight_files(folder), folder / "config.json"]
        },
        "config": checkpoint.config,
        "steps": list(checkpoint.history),
        "tensors": [
            [name, lazy.shape, str(lazy.dtype), asdict(lazy.story)]
            for name, lazy in stories.items()
        ],
        "shard_bytes": shard_bytes,
        "versions": [version("regraft"), *versions().values()],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """What computes: Python and the packages."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers", "safetensors")
    }


def verify(folder: Path) -> None:
    """Compare a directory's files with the hashes its lineage records; RegraftError names the first
    that differs.
    """
    for name, recorded in read_lineage(folder).get("files", {}).items():
        file = folder / name
        if not file.is_file():
            raise RegraftError(
                f"'{folder}' lacks '{name}' that its {FILE} records: make the model again"
            )
        if (found := sha256(file)) != recorded:
            raise RegraftError(
                f"'{file}' is damaged: sha256 {found[:12]} where {FILE} records {recorded[:12]};"
                " make the model again"
            )


def format_model_card(checkpoint: Checkpoint) -> str:
    """The model card: what was done to which model, and the papers."""
    source = origin(checkpoint)
    mixers = {
        name for spec in checkpoint.config.get("mixers", []) if spec for name in _mixer_names(spec)
    }
    cited = [PAPERS[name] for name in sorted(mixers & set(PAPERS))]
    cited += [paper for step in checkpoint.history for paper in step.get("papers", ())]
    papers = (
        "\n".join(f"- {paper}" for paper in dict.fromkeys(cited))
        or "- none beyond the source's own"
    )
    steps = (
        "\n".join(f"{n}. {format_step(step)}" for n, step in enumerate(checkpoint.history, 1))
        or "1. saved unchanged"
    )
    library = "---\nlibrary_name: transformers\ntags: [regraft]\n---\n"
    load = (
        "Load it with `import regraft.modeling` (or `trust_remote_code=True`) and"
        " `AutoModelForCausalLM.from_pretrained`.\n\n"
    )
    return (
        f"{library}# {source['family']}, regrafted\n\n"
        f"Source: `{Path(source['path']).name}`, sha256 `{source['sha256']}`.\n\n"
        f"## What was done\n\n{steps}\n\n{load if mixers else ''}## Papers\n\n{papers}\n\n"
        f"`{FILE}` says where every number comes from.\n"
    )


def format_step(step: dict[str, Any]) -> str:
    """One step as `Name(argument=value, ...)`."""
    arguments = ", ".join(f"{key}={value!r}" for key, value in step.get("arguments", {}).items())
    return f"{step.get('step', '?')}({arguments})"


def _mixer_names(spec: dict[str, Any]) -> list[str]:
    nested = [
        name for value in spec.values() if isinstance(value, dict) for name in _mixer_names(value)
    ]
    return [spec["name"], *nested]
