"""Models by their name on the Hugging Face hub: files and headers, by way of its own client.

What is fetched lies in the client's own cache, as `models--ORG--MODEL/snapshots/COMMIT`. Of a
folder there without weights the headers are read from the hub (`read_remote_entries`), and a file
of weights is fetched when the first tensor in it is read.
"""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import RegraftError, printable
from ..progress import Ticker, print_line
from . import safetensors
from .files import read_json, sha256
from .safetensors import INDEX, SINGLE, TensorEntry

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
# Files that are fetched only when they are the weights that are read, and the size up to which
# others are.
HEAVY = re.compile(
    r".*\.(safetensors|bin|pth?|ckpt|h5|hdf5|keras|msgpack|onnx(_data)?|gguf|ggml|ot|pb|tflite"
    r"|mlmodel|params|nemo|distcp|engine|zip|tar|gz)",
    re.IGNORECASE,
)
SMALL_BYTES = 256_000_000
FIRST_BYTES = 1 << 17  # of a file, asked for at once: most headers are shorter
SAMPLE = 1 << 15  # bytes of a tensor that is compared with another one
THREADS, RETRIES = 8, 3  # of requests for headers
SHA256 = re.compile("[0-9a-f]{64}")  # the name that the cache gives a file of weights
MESSAGE = 300  # characters of what the client says
ADVICE = re.compile(r" *To enable [^.]*'local_files_only=False' as input\.")
# Class of an error of the client -> what to do, the first that fits.
REMEDIES = {
    "GatedRepoError": "ask for access on the model's page, then `hf auth login`",
    "RevisionNotFoundError": "give a branch, tag or commit that it has, or leave out @REVISION",
    "RepositoryNotFoundError": (
        "check the name, or give a folder that exists; a private model needs `hf auth login`"
    ),
    "LocalEntryNotFoundError": "fetch it where there is a network, or unset HF_HUB_OFFLINE",
}
STATUS_REMEDIES = {
    401: "`hf auth login`, or set HF_TOKEN to a token that is valid",
    403: "use a token that may read it: `hf auth login`",
    429: "wait a while, then run the same command again",
}


@dataclass(frozen=True)
class Snapshot:
    """A model's folder in the cache of the hub's client, whatever of it is there."""

    # ORG/MODEL.
    repository: str
    # The commit, 40 hexadecimal digits.
    commit: str
    # The folder.
    folder: Path

    @property
    def name(self) -> str:
        """ORG/MODEL@COMMIT, with the first 12 digits."""
        return f"{self.repository}@{self.commit[:12]}"


def names_model(path: str | Path) -> bool:
    """Whether a path is a name on the hub: ORG/MODEL or ORG/MODEL@REVISION, and nothing on disk."""
    return bool(NAME.fullmatch(str(path))) and not os.path.lexists(path)


def find_snapshot(folder: Path) -> Snapshot | None:
    """The model that a folder in the client's cache is of; None for any other folder."""
    place = folder.absolute()
    owner = place.parent.parent.name.split("--")
    if place.parent.name != "snapshots" or owner[0] != "models" or len(owner) != 3:
        return None
    return Snapshot(f"{owner[1]}/{owner[2]}", place.name, folder)


def lacks_weights(path: Path) -> Snapshot | None:
    """The model whose folder in the cache has not all weights yet; None for any other path."""
    snapshot = find_snapshot(path) if path.is_dir() else None
    if snapshot is None or not list_missing(snapshot):
        return None
    return snapshot


def display_name(path: str | Path) -> str:
    """What to call a model in a command that is printed: its name on the hub, or its path."""
    snapshot = find_snapshot(Path(path))
    return snapshot.name if snapshot else str(path)


def fetch(name: str | Path, weights: bool = True, variant: str | None = None) -> Path:
    """The folder of a model on the hub in the client's cache, fetched as far as it is not there.

    Without network the model in the cache is taken.

    Args:
        name: ORG/MODEL or ORG/MODEL@REVISION.
        weights: whether files of weights are fetched too, not only what lies beside them.
        variant: of the weights, such as "fp16".

    RegraftError, with what the hub says, when there is no such model, or it may not be read.
    """
    from huggingface_hub import snapshot_download

    match = NAME.fullmatch(str(name))
    if match is None:
        raise RegraftError(f"'{name}' is no name on the hub: write ORG/MODEL or ORG/MODEL@REVISION")
    repository, revision = match["repository"], match["revision"]
    with explain_hub_errors(str(name)):
        sizes, problem = list_files(repository, revision)
        small = ["config.json"] if sizes is None else choose_small(sizes)
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[glob.escape(file) for file in small],
            local_files_only=sizes is None,
            tqdm_class=build_progress_bar(None),
        )
    snapshot = find_snapshot(Path(folder))
    assert snapshot is not None, folder
    if sizes is not None:
        check_format(str(name), sizes)
    if weights and (missing := list_missing(snapshot, variant)):
        if problem:
            raise RegraftError(
                f"'{missing[0]}' of '{snapshot.name}' is not in the cache and {problem}: "
                "fetch the model where there is a network"
            )
        fetch_files(snapshot, missing)
    if problem and not problem.startswith("HF_"):
        print_line(f"{problem}: this is '{snapshot.name}' as it is in the cache")
    return snapshot.folder


def list_files(repository: str, revision: str | None) -> tuple[dict[str, int] | None, str]:
    """(the files of a model on the hub with their bytes, why the hub cannot be reached).

    One of them is empty.

    Args:
        repository: ORG/MODEL.
        revision: branch, tag or commit; None: the main branch.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except OfflineModeIsEnabled:
        return None, "HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None, f"the hub answers {error.response.status_code}"
    except Exception as error:  # whatever the network gives
        return None, f"the hub cannot be reached ({type(error).__name__})"
    return {file.rfilename: file.size or 0 for file in info.siblings or []}, ""


def choose_small(sizes: Mapping[str, int]) -> list[str]:
    """The files beside a model's weights: its config, tokenizer, card, and others of their kind.

    Args:
        sizes: bytes by name.
    """
    chosen = [
        name
        for name, size in sizes.items()
        if not HEAVY.fullmatch(name) and size <= SMALL_BYTES and not name.startswith(".")
    ]
    if "modules.json" in sizes:  # a module of sentence-transformers has weights of its own
        chosen += [name for name in sizes if name.endswith(f"/{SINGLE}")]
    return chosen


def check_format(name: str, sizes: Mapping[str, int]) -> None:
    """RegraftError for a model on the hub that has no safetensors.

    Args:
        name: as it was given.
        sizes: of its files.
    """
    if any(file.endswith((".safetensors", ".safetensors.index.json")) for file in sizes):
        return
    repository = name.partition("@")[0]
    for ending, what, remedy in (
        (".gguf", "GGUF files", "fetch one with `hf download {0} {1}` and give the file"),
        (".bin", "pickles", "`hf download {0}`, then `regraft convert` on the folder"),
    ):
        if found := sorted(file for file in sizes if file.endswith(ending)):
            raise RegraftError(
                f"'{name}' has no safetensors but {what} ('{found[0]}'): "
                + remedy.format(repository, found[0])
            )
    raise RegraftError(
        f"'{name}' has no safetensors among its {len(sizes)} files: give a model that has"
    )


def list_weights(folder: Path, variant: str | None = None) -> list[str]:
    """The files of weights of a model whose config and index are there.

    Args:
        folder: of the model.
        variant: of the weights, such as "fp16".
    """
    middle = f".{variant}" if variant else ""
    single = f"{SINGLE.removesuffix('.safetensors')}{middle}.safetensors"
    index = folder / f"{INDEX.removesuffix('.json')}{middle}.json"
    if (folder / single).exists() or not index.is_file():
        return [single]
    shards: safetensors.ShardIndex = read_json(index, safetensors.ShardIndex)
    return sorted(set(shards["weight_map"].values()))


def list_missing(snapshot: Snapshot, variant: str | None = None) -> list[str]:
    """The files of a model's weights that are not in the cache."""
    names = list_weights(snapshot.folder, variant)
    return [name for name in names if not (snapshot.folder / name).is_file()]


def fetch_weights(snapshot: Snapshot, variant: str | None = None) -> None:
    """Fetch the files of weights that are missing; what a cut download left is gone on with.

    Args:
        snapshot: of the model.
        variant: of the weights, such as "fp16".

    RegraftError when they cannot be fetched, or are not what the hub says they are.
    """
    if missing := list_missing(snapshot, variant):
        fetch_files(snapshot, missing)


def fetch_files(snapshot: Snapshot, names: Sequence[str]) -> None:
    """Fetch files into a model's folder and check their hashes; see `fetch_weights`."""
    from huggingface_hub import snapshot_download

    with explain_hub_errors(snapshot.name), Ticker() as ticker:
        ticker.start(f"fetching {snapshot.repository}")
        snapshot_download(
            snapshot.repository,
            revision=snapshot.commit,
            allow_patterns=[glob.escape(name) for name in names],
            tqdm_class=build_progress_bar(ticker),
        )
    for name in names:
        file = snapshot.folder / name
        if not file.is_file():
            raise RegraftError(
                f"'{name}' of '{snapshot.name}' is neither on the hub nor in the cache: "
                "fetch the model again, with a network"
            )
        check_hash(file, snapshot)


def check_hash(file: Path, snapshot: Snapshot) -> None:
    """RegraftError when a fetched file is not what the hub says; the next call fetches it again."""
    # The cache links to a file named by its hash, which may link on to where models share it.
    blob = file.parent / os.readlink(file) if file.is_symlink() else file
    if not SHA256.fullmatch(blob.name) or (found := sha256(blob)) == blob.name:
        return
    file.unlink()
    blob.unlink()
    raise RegraftError(
        f"'{file.name}' of '{snapshot.name}' came with sha256 {found[:12]} where the hub says "
        f"{blob.name[:12]}: it is removed, run the same command again"
    )


@dataclass(frozen=True)
class RemoteTensorEntry(TensorEntry):
    """A tensor in a file on the hub, known from the file's header; reading it fetches the file."""

    # The model.
    snapshot: Snapshot | None = None
    # Of the first byte in the file.
    offset: int = 0

    def read(self) -> Tensor:
        """See `TensorEntry.read`."""
        assert self.snapshot is not None
        if not self.file.is_file():
            fetch_files(self.snapshot, [self.file.name])
        return super().read()

    def peek(self) -> Tensor:
        """The values of a small tensor of bytes or whole numbers, from the hub."""
        assert self.snapshot is not None
        raw, _ = read_range(self.snapshot, self.file.name, self.offset, self.offset + self.bytes)
        dtype = {"I32": torch.int32, "I64": torch.int64}.get(self.dtype, torch.uint8)
        return torch.frombuffer(bytearray(raw), dtype=dtype)

    def blocks(self, rows: int) -> Iterator[Tensor]:
        """The first and the last numbers alone: others are not fetched to be compared."""
        assert self.snapshot is not None
        size = min(self.bytes, SAMPLE)
        for begin in (self.offset, self.offset + self.bytes - size) if size else ():
            raw, _ = read_range(self.snapshot, self.file.name, begin, begin + size)
            yield torch.frombuffer(bytearray(raw), dtype=self.torch_dtype())


def read_remote_entries(snapshot: Snapshot) -> dict[str, TensorEntry]:
    """Every tensor of a model by name, from the headers of its files on the hub or in the cache.

    RegraftError when they cannot be read, or a tensor is in two files.
    """
    names = list_weights(snapshot.folder)
    with explain_hub_errors(snapshot.name), ThreadPoolExecutor(THREADS) as workers:
        headers = list(workers.map(lambda name: read_remote_header(snapshot, name), names))
    found: dict[str, TensorEntry] = {}
    for entry in (entry for header in headers for entry in header):
        if entry.name in found:
            raise RegraftError(
                f"tensor '{entry.name}' of '{snapshot.name}' is in two files, "
                f"'{found[entry.name].file.name}' and '{entry.file.name}': use another revision"
            )
        found[entry.name] = entry
    return found


def read_remote_header(snapshot: Snapshot, name: str) -> list[TensorEntry]:
    """The tensors that the header of a file lists.

    Args:
        snapshot: of the model.
        name: of the file.
    """
    file = snapshot.folder / name
    raw, size = read_range(snapshot, name, 0, FIRST_BYTES)
    length = safetensors.read_header_length(file, raw[:8], size)
    if 8 + length > len(raw):
        raw, _ = read_range(snapshot, name, 0, 8 + length)
    rows = safetensors.parse_header(file, raw[8 : 8 + length], size)
    return [
        RemoteTensorEntry(
            file,
            tensor,
            row["dtype"],
            tuple(row["shape"]),
            snapshot=snapshot,
            offset=8 + length + row["data_offsets"][0],
        )
        for tensor, row in rows.items()
    ]


def read_range(snapshot: Snapshot, name: str, begin: int, end: int) -> tuple[bytes, int]:
    """(bytes of a file, bytes of the whole file), from the cache or else from the hub.

    Args:
        snapshot: of the model.
        name: of the file.
        begin: of the first byte.
        end: behind the last byte; the file may end before it.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    file = snapshot.folder / name
    if file.is_file():
        with open(file, "rb") as stream:
            stream.seek(begin)
            return stream.read(end - begin), file.stat().st_size
    if constants.HF_HUB_OFFLINE:
        raise RegraftError(
            f"'{name}' of '{snapshot.name}' is not in the cache and HF_HUB_OFFLINE is set: unset "
            "it, or fetch the model where there is a network"
        )
    url = hf_hub_url(snapshot.repository, name, revision=snapshot.commit)
    wanted = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    answer = http_backoff("GET", url, headers=wanted, timeout=timeout, max_retries=RETRIES)
    hf_raise_for_status(answer)
    content: bytes = answer.content
    if answer.status_code != 206:  # the whole file
        return content[begin:end], len(content)
    return content, int(answer.headers["Content-Range"].rpartition("/")[2])


@contextmanager
def explain_hub_errors(name: str, action: str = "fetch") -> Iterator[None]:
    """Inside, what the hub's client raises becomes one line with its own words.

    Args:
        name: of the model.
        action: what is done with it.
    """
    try:
        yield
    except RegraftError:
        raise
    except Exception as error:  # errors of the client, the network and the disk
        # What the client advises is for callers of its functions.
        words = ADVICE.sub("", " ".join(printable(error, "\n").split()))
        words = words[:MESSAGE] or type(error).__name__
        raise RegraftError(f"cannot {action} '{name}' ({words}): {find_remedy(error)}") from error


def find_remedy(error: Exception) -> str:
    """What to do about an error of the hub's client."""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    for kind, remedy in REMEDIES.items():
        if kind in kinds:
            return remedy
    status = getattr(getattr(error, "response", None), "status_code", None)
    usual = "check network and disk, then run the same command again: what was fetched is kept"
    return STATUS_REMEDIES.get(status, usual) if isinstance(status, int) else usual


def build_progress_bar(ticker: Ticker | None) -> Any:
    """A class that the client shows progress with: in the one line of regraft's, or not at all.

    Args:
        ticker: shows the bytes; None shows nothing.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    class TickerBar(tqdm):
        """Reports bytes to the ticker and writes nothing itself."""

        def __init__(self, *given: Any, **options: Any):
            super().__init__(*given, **options | {"disable": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            """Count; see `tqdm.update`."""
            done = super().update(n)
            if ticker is not None and self.unit == "B" and self.total:
                share = min(self.n / self.total, 1.0)
                ticker.update(share, f"{self.n / 1e6:,.0f} of {self.total / 1e6:,.0f} MB")
            return done

    return TickerBar
