"""Where a model comes from: lineage.json and the model card, written beside every output."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, cast, get_args

import yaml

from ..errors import RegraftError, printable
from ..io.adapted import find_base
from ..io.files import check_inside, read_own_json, sha256
from ..io.hub import find_snapshot
from ..io.safetensors import variant_of, weight_files
from ..io.yaml_loader import MAX_BYTES, parse_yaml
from .auto_map import find_architecture

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

FILE, CARD, TAG = "lineage.json", "README.md", "regraft"
# Keys of a model card's head that hold for what is made from the model too.
KEPT_CARD_KEYS = "license.*|library_name|pipeline_tag|language|datasets|base_model"
Kind = Literal["copied", "grown", "broadcast", "zero", "fresh"]  # of `Provenance.kind`
KINDS: tuple[Kind, ...] = get_args(Kind)
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
    "sink_window": "gpt-oss-120b & gpt-oss-20b Model Card, arXiv 2508.10925",
    "supra": "Linearizing Large Language Models, arXiv 2405.06640",
    "t2r": "Finetuning Pretrained Transformers into RNNs, arXiv 2103.13076",
    "window": "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
}


class Source(TypedDict):
    """The pretrained model that everything began with."""

    path: str  # absolute path of its directory or GGUF file
    family: str  # its model_type
    files: dict[str, str]  # file of weights -> sha256
    sha256: str  # of the one file; of the joined hashes when there are several
    hub: NotRequired[str]  # ORG/MODEL@COMMIT, where it came from the hub


class _RequiredStepFields(TypedDict):
    step: str  # class name of the step, such as "Widen"
    arguments: dict[str, Any]  # its fields


class StepEntry(_RequiredStepFields, total=False):
    """One step of a model's history; the keys below are there for some steps only."""

    papers: list[str]  # citations for the model card
    notes: list[str]  # what `plan` prints about the step
    engines: list[str]  # Export: what runs the result, from which release
    ledger: dict[str, Any]  # Train: tokens, FLOPs and seconds per stage
    cost: dict[str, Any]  # Learned: what fitting the maps took
    maps: str  # Learned: sha256 of the maps
    overwritten: list[int]  # GrowVocab: rows of the source that added tokens took


class KindTotals(TypedDict):
    """Tensors whose numbers are of one kind."""

    count: int  # tensors
    parameters: int  # numbers in them
    share: float  # of all parameters, 0 to 1


class Lineage(TypedDict, total=False):
    """The content of lineage.json.

    The conversion of a GGUF file writes only `source`, `steps` and `files`.
    """

    source: Source
    steps: list[StepEntry]  # from the source to this model, in order
    seed: int | None  # of the last step that has one
    versions: dict[str, str]  # of Python and packages (see `versions`)
    totals: dict[str, KindTotals]  # by kind
    dropped: dict[str, str]  # tensor of the source that is not used -> why
    # Tensor -> kind, names of the source's tensors it is computed from, note (see `Provenance`).
    tensors: dict[str, tuple[Kind, list[str], str]]
    files: dict[str, str]  # file beside lineage.json -> sha256
    allow_nonfinite: NotRequired[bool]  # where NaN and infinity were not refused
    left_out: NotRequired[dict[str, str]]  # file or folder beside the source's weights -> why
    copied_code: NotRequired[bool]  # where Python files came along (--copy-code)


def read_lineage(folder: Path) -> dict[str, Any]:
    """lineage.json of a directory as a dict with keys of `Lineage`; empty when there is none.

    RegraftError when it is damaged.
    """
    if not (folder / FILE).is_file():
        return {}
    remedy = "make the model again, or delete the file to open it as a pretrained model"
    known: dict[str, Any] = read_own_json(folder / FILE, Lineage, remedy)
    return known


def is_trained(lineage: dict[str, Any]) -> bool:
    """Whether a step in a lineage changed weights by training."""
    return any(step.get("step") == "Train" for step in lineage.get("steps", []))


def origin(checkpoint: Checkpoint) -> Source:
    """The pretrained model that a checkpoint was made from, with hashes of its files."""
    # A model that regraft made names its source in lineage.json.
    if known := read_lineage(checkpoint.folder).get("source") if checkpoint.folder else None:
        return cast(Source, dict(known))

    opened = find_base(checkpoint.origin)
    is_gguf = opened.is_file() and not variant_of(opened)
    files = [opened] if is_gguf else weight_files(checkpoint.weights)
    hashes = {file.name: sha256(file) for file in files}
    joined = "".join(hashes.values())
    source: Source = {
        "path": str(opened.resolve()),
        "family": checkpoint.anatomy.host_config(checkpoint.config)["model_type"],
        "files": hashes,
        "sha256": joined if len(hashes) == 1 else hashlib.sha256(joined.encode()).hexdigest(),
    }
    if snapshot := find_snapshot(checkpoint.path):
        source["hub"] = f"{snapshot.repository}@{snapshot.commit}"
    return source


def count_by_kind(checkpoint: Checkpoint) -> dict[str, KindTotals]:
    """For each kind of provenance: tensors, parameters, and their share of all parameters."""
    totals: dict[str, KindTotals] = {
        kind: {"count": 0, "parameters": 0, "share": 0.0} for kind in KINDS
    }
    parameters = sum(lazy.size for lazy in checkpoint.tensors.values())
    for lazy in checkpoint.tensors.values():
        row = totals[lazy.provenance.kind]
        row["count"] += 1
        row["parameters"] += lazy.size
        row["share"] = row["parameters"] / parameters
    return totals


def build_lineage(
    checkpoint: Checkpoint, files: dict[str, str], left_out: dict[str, str]
) -> Lineage:
    """The content of lineage.json for a checkpoint.

    Args:
        checkpoint: the model that was saved.
        files: the files it was saved as, with their sha256.
        left_out: files beside the source's weights that were not copied, with the reasons.
    """
    provenances = {
        checkpoint.names[key]: lazy.provenance for key, lazy in checkpoint.tensors.items()
    }
    arguments = [step.get("arguments", {}) for step in checkpoint.history]
    seeds = [known["seed"] for known in arguments if type(known.get("seed")) is int]

    lineage: Lineage = {
        "source": origin(checkpoint),
        "steps": cast(list[StepEntry], list(checkpoint.history)),
        "seed": seeds[-1] if seeds else None,
        "versions": versions(),
        "totals": count_by_kind(checkpoint),
        "dropped": checkpoint.dropped,
        "tensors": {
            name: (cast(Kind, p.kind), list(p.sources), p.note) for name, p in provenances.items()
        },
        "files": files,
    }
    if checkpoint.allow_nonfinite:
        lineage["allow_nonfinite"] = True
    if left_out:
        lineage["left_out"] = left_out
    if checkpoint.copy_code or (checkpoint.folder and copied_code(checkpoint.folder)):
        lineage["copied_code"] = True
    return lineage


def copied_code(folder: Path) -> bool:
    """Whether Python files came along to a directory, and so go on to what is made from it."""
    return bool(read_lineage(folder).get("copied_code"))


def fingerprint(
    checkpoint: Checkpoint, shard_bytes: int, extra_files: Mapping[str, Any] | None = None
) -> str:
    """A hash over everything that decides what the saved files of a checkpoint hold.

    Two runs with the same fingerprint write the same bytes, so that one may resume the other.

    RegraftError when a file of the source is not as its lineage.json records.

    Args:
        checkpoint: the model to be saved.
        shard_bytes: size limit of a file of weights.
        extra_files: identities of files that are saved beside the model, by their names.
    """
    folder = checkpoint.path  # of a GGUF file the conversion
    named = {checkpoint.names[key]: lazy for key, lazy in checkpoint.tensors.items()}
    files = [*weight_files(checkpoint.weights), folder / "config.json"]
    hashes = {file.name: sha256(file) for file in files}
    recorded = read_lineage(folder).get("files", {})
    for file in files:
        check_hash(file, hashes[file.name], recorded.get(file.name, hashes[file.name]))
    facts = {
        "source": hashes,
        "config": checkpoint.config,
        "steps": list(checkpoint.history),
        "tensors": [
            [name, lazy.shape, str(lazy.dtype), asdict(lazy.provenance)]
            for name, lazy in named.items()
        ],
        "shard_bytes": shard_bytes,
        "extra_files": dict(extra_files or {}),
        # Another release of torch may round differently.
        "versions": [version("regraft"), *versions().values()],
    }
    if checkpoint.allow_nonfinite:  # its files may hold what others must not
        facts["allow_nonfinite"] = True

    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute and write tensors."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "transformers", "safetensors")
    }


def verify(folder: Path) -> None:
    """Compare the files of a directory with the hashes in its lineage.json.

    RegraftError names the first file that is missing or differs.
    """
    for name, recorded in read_lineage(folder).get("files", {}).items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise RegraftError(
                f"'{folder}' lacks '{name}' that its {FILE} records: make the model again"
            )
        check_hash(file, sha256(file), recorded)


def check_hash(file: Path, found: str, recorded: str) -> None:
    """RegraftError when a file's sha256 is not the recorded one."""
    if found != recorded:
        raise RegraftError(
            f"'{file}' is damaged or was edited: sha256 {found[:12]} where {FILE} records"
            f" {recorded[:12]}; make the model again"
        )


def format_model_card(checkpoint: Checkpoint, transformers: bool = True) -> str:
    """The model card: the source, what was done to it, and the papers to cite.

    Args:
        checkpoint: the model.
        transformers: whether transformers loads what the card lies beside.
    """
    source = origin(checkpoint)
    mixers = find_mixer_names(checkpoint.config)
    cited = cite_mixers(checkpoint.config)
    cited += [paper for step in checkpoint.history for paper in step.get("papers", ())]
    papers = "\n".join(f"- {paper}" for paper in dict.fromkeys(cited))  # each once, in order
    steps = "\n".join(f"{n}. {format_step(step)}" for n, step in enumerate(checkpoint.history, 1))

    last = checkpoint.history[-1] if checkpoint.history else {}
    lines = "".join(f"- {line}\n" for line in last.get("engines", ()))
    runs = f"## Runs in\n\n{lines}\n" if lines and transformers else ""

    # A name cannot end the code that it stands in.
    hub_name = source.get("hub")
    name = printable(hub_name or Path(source["path"]).name).replace("`", "'")
    no_papers = "- none beyond the source's own"
    # Models that transformers knows need no word on loading.
    auto = find_architecture(checkpoint.config).replace("Regraft", "AutoModel")
    load = (
        "Load it with `import regraft.modeling` (or `trust_remote_code=True`) and "
        f"`{auto}.from_pretrained`.\n\n"
    )
    return (
        f"---\n{format_front_matter(checkpoint.path / CARD, hub_name, transformers)}---\n"
        f"# {source['family']}, regrafted\n\n"
        f"Source: `{name}`, sha256 `{source['sha256']}`.\n\n"
        f"## What was done\n\n{steps or '1. saved unchanged'}\n\n"
        f"{describe_training(checkpoint.history)}"
        f"{runs}{load if mixers and transformers else ''}## Papers\n\n{papers or no_papers}\n\n"
        f"`{FILE}` says where every number comes from.\n"
    )


def describe_training(history: Sequence[Mapping[str, Any]]) -> str:
    """A paragraph for a model whose attention was replaced and never trained; empty for others."""
    replaced = [number for number, step in enumerate(history) if step.get("step") == "Remix"]
    if not replaced:
        return ""
    later = [step for step in history[replaced[-1] :] if step.get("step") == "Train"]
    if any(step.get("ledger", {}).get("stages") for step in later):
        return ""
    start = "beyond a closed-form start " if later else ""
    return f"The layers that were replaced have not been trained {start}since.\n\n"


def format_front_matter(card: Path, hub_name: str | None = None, transformers: bool = True) -> str:
    """The head of a model card as YAML: what the source's card says of licence, language and use.

    Args:
        card: of the source, which need not exist.
        hub_name: of the source, ORG/MODEL@COMMIT, where it came from the hub.
        transformers: whether transformers loads the model.
    """
    # A card is foreign text: one whose head cannot be read says nothing.
    known: Any = None
    with suppress(RegraftError):
        check_inside(card.parent, card)
        with card.open("rb") as stream:
            text = stream.read(MAX_BYTES).decode("utf-8", "replace")
        found = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
        known = parse_yaml(found[1], f"'{card}'") if found else None
    known = known if isinstance(known, dict) else {}

    tags = known.get("tags")
    tags = [tag for tag in tags if tag != TAG] if isinstance(tags, list) else []
    kept = {key: known[key] for key in known if re.fullmatch(KEPT_CARD_KEYS, str(key))}
    head = {"library_name": "transformers"} | kept | {"tags": [*tags, TAG]}
    if not transformers:
        del head["library_name"]
    if hub_name:
        head["base_model"] = hub_name.partition("@")[0]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def format_step(step: dict[str, Any]) -> str:
    """A step (see `StepEntry`) as `Name(argument=value, ...)`, without what was measured for it and
    what is None; of training what was learned from how much text.
    """
    if ledger := step.get("ledger"):
        costs = [*ledger.get("start", ()), *ledger.get("stages", ())]
        parts = [f"{cost.get('kind', '?')} of {cost.get('tokens', 0):,} tokens" for cost in costs]
        return f"{step.get('step', '?')}({', '.join(parts)})"
    given = step.get("arguments", {}).items()
    known = {key: value for key, value in given if key != "scores" and value is not None}
    arguments = ", ".join(f"{key}={value!r}" for key, value in known.items())
    return f"{step.get('step', '?')}({arguments})"


def cite_mixers(config: Mapping[str, Any]) -> list[str]:
    """The papers of a model's mixers."""
    return [PAPERS[name] for name in sorted(find_mixer_names(config) & set(PAPERS))]


def find_mixer_names(config: Mapping[str, Any]) -> set[str]:
    """The names of a model's mixers; none of a stock model."""
    return {name for spec in config.get("mixers", []) if spec for name in _mixer_names(spec)}


def _mixer_names(spec: dict[str, Any]) -> list[str]:
    """Names of a mixer and of those inside it, such as the window in `lolcats`."""
    nested = [
        name for value in spec.values() if isinstance(value, dict) for name in _mixer_names(value)
    ]
    return [spec["name"], *nested]
