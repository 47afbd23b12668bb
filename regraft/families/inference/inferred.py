"""Tables of types that have none: inferred, proven, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...core.anatomy import Anatomy
from ...core.config_checks import check_numbers
from ...core.part import Config
from ...core.stock_config import silence_transformers
from ...errors import RegraftError
from ...io.files import read_json, write_json
from ...io.gguf import cache_folder
from ...progress import print_line
from .infer import infer_tables
from .layer_settings import holds_settings
from .table import CacheKey, InferredTable, build_anatomy
from .tiny_config import find_kind
from .tiny_model import (
    NOT_SAID,
    TinyModel,
    find_config_class,
    find_model_class,
    find_tiny_model,
    read_whole,
)

FOLDER = "anatomies"
# The module that proves a table, imported when one is inferred: it grows models.
PROOF = "regraft.checks.table_proof"
# Keys whose null means what other keys give.
NULL_MEANS_DERIVED = ("kv", "dim", "ffn")
# Words by which people call axes.
AXES = {
    "depth": "layers",
    "hidden": "hidden",
    "ffn": "ffn",
    "kv": "heads",
    "group": "queries per key/value head",
    "dim": "head-dim",
    "attention": "linearize",
}


def find_inferred(config: Config) -> Anatomy:
    """The table of a model type that has none in `regraft/families`.

    It is inferred from the stock class and proven on a tiny random model once; later it comes from
    the cache.

    RegraftError when transformers does not know the type, or no table can hold it.
    """
    key = CacheKey.of(config)
    file = _locate(key, cache_folder())
    if not file.is_file():
        _infer(config, file)
    return _build(key, file, file.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _locate(key: CacheKey, folder: Path) -> Path:
    """Where the table of a config is kept in a cache folder."""
    return folder / name_file(key.config)


@lru_cache(maxsize=64)
def _build(key: CacheKey, file: Path, changed: int) -> Anatomy:
    """The table in a file for a config; `changed` is when the file was written."""
    return build_anatomy(_read_table(file, changed), key.config)


def find_table(config: Config) -> InferredTable:
    """The inferred table of a config, from the cache or made now; see `find_inferred`."""
    file = cache_folder() / name_file(config)
    if not file.is_file():
        _infer(config, file)
    return _read_table(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _read_table(file: Path, changed: int) -> InferredTable:
    """A table in the cache; `changed` is when it was written."""
    return InferredTable.from_json(read_json(file, remedy="delete it"))


def name_file(config: Config) -> str:
    """Where the table of a config is kept, below the cache folder.

    The name says what it depends on: the class's source, the releases of transformers and regraft,
    and what the config says apart from sizes.
    """
    family = str(config.get("model_type"))
    check_numbers(family, config)
    config_kind = find_config_class(family)
    kind = find_model_class(family, config_kind, config)
    parts = [_identify_class(kind), repr(_describe(config_kind, config))]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    return f"{FOLDER}/{family}-{digest}.json"


@lru_cache(maxsize=32)
def _identify_class(kind: Any) -> str:
    """Name and source of a class's module, and the releases that read it."""
    import transformers

    from ... import __version__

    proof = Path(__file__).parents[2] / f"{PROOF.partition('.')[2].replace('.', '/')}.py"
    files = [*sorted(Path(__file__).parent.glob("*.py")), proof]
    own = "".join(file.read_text(encoding="utf-8") for file in files)
    source = inspect.getsource(inspect.getmodule(kind) or kind)
    return "\n".join([kind.__name__, transformers.__version__, __version__, own, source])


def _describe(config_kind: Any, config: Config) -> dict[str, Any]:
    """What a config says apart from sizes: growth does not change it."""
    whole = read_whole(config_kind, config).to_dict()
    known = set(_default_keys(config_kind))
    aliases = dict(getattr(config_kind, "attribute_map", None) or {})
    return {
        key: "number" if find_kind(key, aliases) in NULL_MEANS_DERIVED else _simplify(key, value)
        for key, value in sorted(whole.items())
        if key in known and key not in NOT_SAID and "token_id" not in key
    }


@lru_cache(maxsize=32)
def _default_keys(config_kind: Any) -> tuple[str, ...]:
    return tuple(config_kind().to_dict())


def _simplify(key: str, value: Any) -> Any:
    """A value without what sizes and training change."""
    if key in ("dtype", "tie_word_embeddings", "id2label", "label2id", "use_cache"):
        return None
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and "multiplier" in key and value == 1:
        return "one"  # a factor that cannot be told from none
    if isinstance(value, int) and value == 0:
        return "none"  # of what some models have
    if isinstance(value, int | float):
        return "number"
    if holds_settings(value):  # the table has their sizes as numbers
        return sorted({repr(sorted(one.items())) for one in value.values()})
    if isinstance(value, Mapping):
        kept = ("rope_type", "type")
        return {name: _simplify(name, one) for name, one in sorted(value.items())
                if isinstance(one, Mapping) or name in kept}  # fmt: skip
    return sorted({repr(_simplify("", one)) for one in value})


def _infer(config: Config, file: Path) -> None:
    """Infer and prove the table of a config, and keep it.

    Two processes that do so at once write the same file, each of them whole.
    """
    family = config.get("model_type")
    print_line(f"{family} has no table: inferring one from its class, once")
    with silence_transformers():
        tiny = find_tiny_model(config)
        # While linearizing is tried, the tiny model's own table is looked up too.
        files = {file, cache_folder() / name_file(tiny.config | {"model_type": family})}
        prover = importlib.import_module(PROOF)
        table = _choose_table(tiny, prover)
        _keep(table, files, prover, tiny)
    print_line(f"{describe_table(table)} ({file})")


def _choose_table(tiny: TinyModel, prover: Any) -> InferredTable:
    """The candidate that growth is proven for on the most axes, with the others closed."""
    best: InferredTable | None = None
    for candidate in infer_tables(tiny):
        proven = replace(
            candidate, closed={**candidate.closed, **prover.prove_growth(candidate, tiny)}
        )
        if best is None or len(proven.closed) < len(best.closed):
            best = proven
    assert best is not None  # infer_tables gives one or raises
    return best


def _keep(table: InferredTable, files: set[Path], prover: Any, tiny: TinyModel) -> None:
    """Write a table, then what can be proven of its attention.

    Where classes keep both ways to turn in their module, the proof says which one this is.
    """
    _write(table, files)
    if "attention" in table.closed:
        return
    other = replace(table, rotary_pairs=not table.rotary_pairs)
    whys = []
    for candidate in (table, other) if table.latent and table.rotary else (table,):
        _write(candidate, files)
        why = prover.prove_attention(candidate, tiny)
        if not why:
            return
        whys.append(why)
    table.closed["attention"] = whys[0]
    _write(table, files)


def _write(table: InferredTable, files: set[Path]) -> None:
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, table.to_json())
        except OSError as error:
            raise RegraftError(
                f"cannot keep the inferred table of {table.family} in '{file.parent}' "
                f"({error.strerror}): set REGRAFT_CACHE to a folder that can be written"
            ) from error


def describe_table(table: InferredTable) -> str:
    """One line: what a table was proven for, and what is closed."""
    works = [word for axis, word in AXES.items() if axis not in table.closed]
    closed = [word for axis, word in AXES.items() if axis in table.closed]
    line = f"{table.family}: proven for {', '.join(works) or 'nothing'}"
    if closed:
        line += f"; closed: {', '.join(closed)} (regraft anatomy says why)"
    return line
