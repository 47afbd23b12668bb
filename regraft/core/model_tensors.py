"""The tensors in the files of a model, by the names of its family's table.

A file's names may be others than the table's: those of the base class, of an older release, or of a
tied head. What transformers' class makes of them counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import RegraftError
from ..io import hub, safetensors
from ..io.quantized.schemes import dequantize
from ..io.safetensors import TensorEntry
from .anatomy import Anatomy, Config, PlacedPart
from .config_checks import check_counts, explain_config_errors
from .foreign_tensors import check_foreign_tensors
from .lazy import LazyTensor, Provenance
from .stock_class import StockNames

# What a config with `tie_word_embeddings` shares: role of the head's tensor -> role that it shares.
TIES = {"head.weight": "embed.weight", "head.own.bias": "head.bias"}
UNTIED = "the stored head differs from the embedding: kept, untied, as transformers does"
# In the history of a model that is opened so.
UNTIED_STEP: dict[str, Any] = {"step": "OpenUntied", "arguments": {}, "notes": [UNTIED]}


@dataclass
class ModelTensors:
    """What the files of a model hold, known from their headers."""

    # The model's config, untied where the files say so.
    config: dict[str, Any]
    # Tensors by their names in the table.
    entries: dict[str, TensorEntry]
    # Tensors of the files that are not used: name -> why.
    dropped: dict[str, str]
    # Whether the files hold a head of their own against the config.
    untied: bool = False
    # Name in the table -> name of the tied tensor that is stored in its place.
    stand_ins: dict[str, str] = field(default_factory=dict)

    def resolve_ties(self, anatomy: Anatomy) -> None:
        """Tie the head as transformers' `tie_weights` does when it loads a model.

        The stored one of two tied tensors stands for both. Where both are stored and differ, they
        are not tied, and the config says so from then on.
        """
        ties = find_ties(anatomy, self.config)
        stored = {head: name for head, name in ties.items() if head in self.entries}
        pairs = [
            (self.entries[head], self.entries[name])
            for head, name in stored.items()
            if name in self.entries
        ]
        self.untied = not all(safetensors.have_equal_values(*pair) for pair in pairs)
        if self.untied:
            self.config = dict(anatomy.untie_embeddings(self.config))
            for head, name in ties.items():
                self._stand_in(head, name)
                self._stand_in(name, head)
            return

        for head, name in stored.items():
            if name in self.entries:
                why = f"tied: the config shares it with {name}"
                self.dropped[self.entries[head].name] = why
            self._stand_in(name, head)
            del self.entries[head]

    def _stand_in(self, name: str, stored: str) -> None:
        """Give a missing tensor the values of the one that it is tied to."""
        if name not in self.entries and stored in self.entries:
            self.entries[name] = self.entries[stored]
            self.stand_ins[name] = stored

    def check_names(self, folder: Path, anatomy: Anatomy, placed: Iterable[PlacedPart]) -> None:
        """RegraftError when the files hold a tensor that no part claims.

        Args:
            folder: that was opened.
            anatomy: the table.
            placed: the parts of the model.
        """
        expected = {parameter.name for parameter in placed}
        unclaimed = sorted(set(self.entries) - expected)
        if unclaimed or expected - set(self.entries):
            check_foreign_tensors(folder, self.entries)

        # What a wrong table or a foreign file leaves over must not get lost silently.
        for name in unclaimed[:1]:
            raise RegraftError(
                f"the table of {anatomy.family} has no part for parameter '{name}' "
                f"{list(self.entries[name].shape)}: check that config.json belongs to the weights;"
                " if it does, regraft does not know this form of the class yet"
            )

    def open(
        self, parameter: PlacedPart, folder: Path, provenances: Mapping[str, Provenance]
    ) -> LazyTensor:
        """The lazy tensor of a placed part; RegraftError when it is missing or of another shape."""
        entry = self.entries.get(parameter.name)
        if entry is None:
            raise RegraftError(
                f"'{folder}' lacks tensor '{parameter.name}' of shape {list(parameter.shape)}, "
                "which transformers would fill with random numbers: "
                + format_missing_advice(parameter)
            )
        dtype = entry.torch_dtype()  # of packed numbers the shape is another one too
        if entry.shape != parameter.shape:
            raise RegraftError(
                f"tensor '{parameter.name}' in '{entry.file}' has shape {list(entry.shape)}, "
                f"expected {list(parameter.shape)} ({parameter.part.signature}): "
                "config.json and weights do not belong together"
            )

        stored = self.stand_ins.get(parameter.name)
        note = f"stored as {stored}, which it is tied to" if stored else ""
        provenance = Provenance("copied", (parameter.name,), note)
        provenance = provenances.get(parameter.name, provenance)
        return LazyTensor(parameter.shape, dtype, provenance, entry.read)


def read_model_tensors(
    weights: Path,
    anatomy: Anatomy,
    config: dict[str, Any],
    allow_nonfinite: bool = False,
    quantization: Mapping[str, Any] | None = None,
) -> ModelTensors:
    """The tensors of a model, from headers; the values of the head where it may be tied too.

    Args:
        weights: a directory, or a variant's file in it (see `safetensors.weight_files`).
        anatomy: the table.
        config: of the model.
        allow_nonfinite: see `Checkpoint.open`.
        quantization: `quantization_config` of a model whose weights are quantised.

    RegraftError when the files hold a tensor twice, or cannot be what the config says.
    """
    snapshot = hub.lacks_weights(weights)
    found = hub.read_remote_entries(snapshot) if snapshot else safetensors.read_entries(weights)
    folder = weights.parent if weights.is_file() else weights
    unused: dict[str, str] = {}
    if quantization:
        found, unused = dequantize(found, quantization, config, folder)
    with explain_config_errors(folder / "config.json"):
        check_counts(anatomy, anatomy.solve(config), found)
        anatomy.place(config)
    names, dropped = match_names(found, anatomy, config)

    entries: dict[str, TensorEntry] = {}
    for name, canonical in names.items():
        if canonical in entries:
            raise RegraftError(
                f"'{folder}' holds '{canonical}' under two names, '{entries[canonical].name}' and "
                f"'{name}': remove one"
            )
        entries[canonical] = replace(found[name], allow_nonfinite=allow_nonfinite)

    tensors = ModelTensors(config, entries, dropped | unused)
    tensors.resolve_ties(anatomy)
    return tensors


def find_ties(anatomy: Anatomy, config: Config) -> dict[str, str]:
    """Name of a head's tensor -> name of the tensor that a config ties it to; {} when untied."""
    if not anatomy.fill_defaults(config).get("tie_word_embeddings"):
        return {}
    tied, untied = anatomy.place(config), anatomy.place(anatomy.untie_embeddings(config))
    return {
        untied[head, None].name: tied[shared, None].name
        for head, shared in TIES.items()
        if (head, None) in untied and (head, None) not in tied
    }


def match_names(
    found: Iterable[str], anatomy: Anatomy, config: Config
) -> tuple[dict[str, str], dict[str, str]]:
    """(name in the files -> name in the table, name in the files -> why it is dropped).

    A name that neither knows stays as it is.

    Args:
        found: names in the files.
        anatomy: the table.
        config: of the model.
    """
    known = {parameter.name for parameter in anatomy.place(config).values()}
    known |= set(find_ties(anatomy, config))
    names = {name: anatomy.canonical_name(name) for name in found}
    if known.issuperset(names.values()):
        return names, {}

    # A linearized model has the names of its host; earlier versions put a prefix before them.
    host = anatomy.host(config)
    prefix = "" if host is anatomy else "host."
    stock = StockNames(anatomy.host_config(config))
    goals = {stock.find(name): name for name in known}

    dropped: dict[str, str] = {}
    for name in [name for name, canonical in names.items() if canonical not in known]:
        bare = name.removeprefix(prefix)
        canonical = goals.get(stock.find(bare))
        if canonical is not None and host.reason_to_drop(bare) is None:
            names[name] = canonical
        elif any(goal.startswith(f"{bare} from ") for goal in goals):
            raise RegraftError(
                f"'{name}' is in the form that transformers keeps in memory, not that of files: "
                f"{advise_resaving(stock.kind.__name__)}"
            )
        elif reason := host.reason_to_drop(bare) or stock.reason_to_drop(bare):
            dropped[name] = reason
            del names[name]
    return names, dropped


def advise_resaving(kind: str) -> str:
    """What to do about tensors that are packed as a class of transformers packs them in memory."""
    return (
        f"python -c \"import transformers; m = transformers.{kind}.from_pretrained('DIR'); "
        "m._weight_conversions = None; m.save_pretrained('OUT')\" writes the other form"
    )


def format_missing_advice(parameter: PlacedPart) -> str:
    """What to do about a tensor that no file holds."""
    if parameter.part.unless == "tie_word_embeddings":
        return (
            'set "tie_word_embeddings": true in config.json if the head is the embedding, name a '
            "class without a head in its architectures, or fetch the model again"
        )
    if parameter.part.writes == "own":  # of a head
        return "fetch the model again, or name a class without it in config.json's architectures"
    return "fetch the model again"
