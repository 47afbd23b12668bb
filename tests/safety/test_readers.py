"""Files from disk, damaged in every way: success or one line, never a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from helpers.cli import refused
from helpers.comparison import recipe as write_recipe
from helpers.damage import damaged
from helpers.gguf_model import write_gguf
from helpers.tiny import byte_tokenizer, save_model, tiny, write_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from regraft import modeling
from regraft.checks.growth import keeps_function
from regraft.compare import recipe as comparisons
from regraft.compare import report as compare_report
from regraft.compare import savings, scheduler
from regraft.compare.folders import DONE, arm_folder
from regraft.compare.numbers import NO_COST
from regraft.core import lineage
from regraft.core.checkpoint import Checkpoint, with_older_keys
from regraft.core.side_files import find_side_files
from regraft.data.corpus import TextMixture
from regraft.data.images import read_images
from regraft.data.packing import read_documents
from regraft.data.text import Text
from regraft.errors import RegraftError
from regraft.growth.optimizer_state import read_moments
from regraft.growth.sizes_to_steps import Growth
from regraft.growth.steps.widen import Widen
from regraft.io.files import write_json, write_json_lines
from regraft.mixers.remix import Remix
from regraft.modeling.generate import generate
from regraft.recipes.journal import Journal
from regraft.report import html, plots
from regraft.train import trackers
from regraft.train.monitor import summarize_stages
from regraft.train.output import open_run
from regraft.train.row_store import RowStore

FEW = 12
EXAMPLES = int(os.environ.get("REGRAFT_FUZZ", FEW))  # a reader; more of them are random


@dataclass(frozen=True)
class Reader:
    """Something that reads files.

    Attributes:
        make: writes them into an empty folder.
        files: which of them are damaged, as a pattern.
        read: reads them.
    """

    make: Callable[[Path], Any]
    files: tuple[str, ...]
    read: Callable[[Path], Any]


def read_model(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    opened.verify()
    with_older_keys(opened.config)
    for step in opened.history:
        keeps_function(step)
    model = modeling.load(folder)
    with torch.no_grad():
        model(**modeling.random_inputs(opened, length=8))


def save_grown(folder: Path) -> None:
    save_model(folder / "source", layers=1)
    Widen(ffn=60)(Checkpoint.open(folder / "source")).save(folder / "grown")
    shutil.rmtree(folder / "source")
    (folder / "grown").rename(folder / "out")


def save_linearized(folder: Path) -> None:
    save_model(folder / "source", layers=2)
    Remix(keep="0", window=16, sinks=2)(Checkpoint.open(folder / "source")).save(folder / "out")
    shutil.rmtree(folder / "source")


def speak(folder: Path) -> None:
    model, tokenizer = modeling.load(folder), modeling.load_tokenizer(folder)
    generate(model, tokenizer, "abc", 2, chat=True)


def write_gguf_model(folder: Path) -> None:
    config, model = tiny("llama", hidden=72, layers=1)
    write_gguf(folder / "tiny.gguf", model, config)


def read_gguf_model(folder: Path) -> None:
    Checkpoint.open(folder / "tiny.gguf")


def tokens_of(folder: Path) -> TextMixture:
    texts = [Text(str(folder / "a.txt"), overflow="cut"), Text(str(folder / "b.jsonl"))]
    rows = TextMixture(texts, byte_tokenizer(), own=folder / "own", cache=folder / "cache")
    table = rows(32)
    table[:]
    return rows


def write_texts(folder: Path) -> None:
    write_text(folder / "a.txt")
    write_json_lines(folder / "b.jsonl", [{"text": f"{n} lines " * n, "n": n} for n in range(30)])


def cache_tokens(folder: Path) -> None:
    write_texts(folder)
    tokens_of(folder)


STORE = {"teacher": "x"}


def fill_store(folder: Path) -> None:
    store = RowStore(folder, "store", 10**6, STORE)
    for n in range(3):
        store.add(f"row{n}", {"hidden": torch.full((2, 3), float(n)), "names": torch.arange(4)})
    store.flush()


def read_store(folder: Path) -> None:
    store = RowStore(folder, "store", 10**6, STORE)
    for n in range(3):
        row = store.get(f"row{n}")
        assert row is None or row["hidden"].eq(n).all()


def metrics(stages: int = 2) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage in range(stages):
        cost = {"tokens": 0, "flops": 0, "seconds": 0.0}
        rows.append({"stage": stage, "step": 0, **cost, "eval_loss": 3.0, "eval_accuracy": 0.1})
        for step in (1, 2):
            cost = {"tokens": 64 * step, "flops": 10**9 * step, "seconds": 0.5 * step}
            speed = {"tokens_per_second": 100.0, "flops_per_second": 1e9, "peak_share": 0.5}
            row = {"stage": stage, "kind": "next", "step": step, "loss": 3.0, "grad_norm": 1.0}
            rows.append({**row, "lr": 0.1, **cost, **speed})
        rows.append({"stage": stage, "step": 2, **cost, "eval_loss": 2.0, "eval_accuracy": 0.2})
    return rows


QUALITY = {
    "perplexity": 9.5, "perplexity_error": 0.1, "byte_perplexity": 1.8, "bits_per_byte": 0.8,
    "kl": 0.1, "tokens": 4092, "windows": 4,
}  # fmt: skip
TASK = {
    "metric": "acc", "acc": 0.5, "acc_norm": 0.5, "perplexity": None, "n": 2, "stderr": 0.1, "chance": 0.25,
    "above_chance": 0.3, "each": [0, 1], "truncated": 0, "of_teacher": 0.5,
}  # fmt: skip
RECALL = {
    "acc": 0.5, "stderr": 0.1, "exact": 0.5, "exact_stderr": 0.1, "rank": 1.5, "n": 2, "chance": 0.1,
    "each": [0.0, 1.0],
}  # fmt: skip
SUITE = {
    "tasks": {"piqa": TASK}, "average": 0.5, "average_above_chance": 0.3, "of_teacher": 0.5,
    "recall": {"copy": {"64": RECALL}},
    "positions": [{"from": 0, "to": 64, "perplexity": 9.0, "stderr": 0.1, "tokens": 64}],
}  # fmt: skip
DIFFERENCE = {"difference": {"mean": 0.1, "stderr": 0.1}}
BASELINE = {
    **QUALITY, **SUITE, **DIFFERENCE, "tasks": {"piqa": TASK | DIFFERENCE},
    "recall": {"copy": {"64": RECALL | DIFFERENCE}},
}  # fmt: skip
SPEED = {
    "length": 64, "batch": 1, "decode_tok_s": 20.5, "prefill_tok_s": 411.0, "state_bytes": 7,
    "converted_bytes": 7, "kept_bytes": 0, "peak_bytes": 9, "load_bytes": 8,
}  # fmt: skip


def write_run(folder: Path) -> None:
    rows = {"model": "out", **QUALITY, **SUITE, "baselines": {"teacher": BASELINE}}
    cost = {"tokens": 5, "flops": 6, "seconds": 1.0}
    write_json(folder / "eval.json", rows)
    write_json(folder / "bench.json", {"teacher": [SPEED], "student": [SPEED]})
    sample = {"prompt": "a", "teacher": "b", "student": "c"}
    write_json(folder / "samples.json", [sample])
    write_json(folder / "time.json", {"seconds": 1.0, "phases": {"plan": 1.0}})
    write_json(folder / "plan.json", {"parameters": 5, "layers": []})
    write_json(folder / "ledger.json", {"start": [{"kind": "closed form", **cost}], **cost})
    write_json_lines(folder / "metrics.jsonl", metrics())
    (folder / "recipe.yaml").write_text("source: x\n")


def read_run(folder: Path) -> None:
    Journal(folder, "source: x\n", 1.0)
    html.write(folder)
    summarize_stages(folder)


def read_track(folder: Path) -> None:
    with trackers.open_trackers("tensorboard", folder, {}) as send:
        send(metrics()[-1])


def write_track(folder: Path) -> None:
    write_json(folder / "track.json", {"name": "run-1"})
    write_json_lines(folder / "metrics.jsonl", metrics())


def claim_comparison(built: comparisons.Comparison, out: Path) -> None:
    with open_run(out, "comparison", lambda: {"seed": 0}, scheduler.NAMES):
        write_json(out / scheduler.RECIPE, comparisons.dump(built))


def write_comparison(folder: Path) -> None:
    built = comparisons.load(write_recipe(folder), {"seeds": "[0]"})
    out = folder / "out"
    claim_comparison(built, out)
    costs = {"tokens": 128, "flops": 10**9, "seconds": 1.0}
    for arm in built.arms:
        at = arm_folder(out, arm.name, 0)
        at.mkdir(parents=True)
        ledger = {**costs, "stages": [{**costs, "stage": 0, "kind": "next"}]}
        facts = {"seed": 0, "ledger": ledger, "arm": asdict(arm), "parameters": 5}
        write_json(at / DONE, {**facts, "start": NO_COST, "whole": None})
        write_json_lines(at / "metrics.jsonl", metrics(1))


def read_comparison(folder: Path) -> None:
    built, out = comparisons.load(str(folder / "recipe.yaml"), {"seeds": "[0]"}), folder / "out"
    claim_comparison(built, out)
    scheduler.load_recipe(out)
    for job in scheduler.arm_jobs(built):
        scheduler.is_done(built, out, job)
    compare_report.write(savings.summarise(built, out), out)


def write_moments(folder: Path) -> None:
    names = Checkpoint.open(save_model(folder / "model", layers=1)).names.values()
    shapes = {n: t for n, t in modeling.load(folder / "model").named_parameters()}
    save_file(
        {f"{m}/{n}": shapes[n].data.clone() for n in names for m in ("exp_avg", "exp_avg_sq")}
        | {f"step/{n}": torch.tensor(3.0) for n in names},
        folder / "optimizer.safetensors",
        {"format": "pt"},
    )


def read_moments_of(folder: Path) -> None:
    from regraft.growth.optimizer_state import grow_optimizer_state

    source = Checkpoint.open(folder / "model")
    read_moments(source, folder / "optimizer.safetensors")
    grow_optimizer_state(
        source, [Widen(ffn=60)], folder / "optimizer.safetensors", folder / "grown.safetensors"
    )


def write_images(folder: Path) -> None:
    numpy.savez(
        folder / "images.npz",
        pixel_values=numpy.zeros((3, 1, 4, 4), "float32"),
        labels=numpy.arange(3),
    )


def write_tables(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    table = pyarrow.table({"text": [f"words {n} " * 9 for n in range(20)], "n": list(range(20))})
    parquet.write_table(table, folder / "a.parquet", row_group_size=7)
    with ipc.new_stream(folder / "b.arrow", table.schema) as stream:
        stream.write_table(table)


def read_any_documents(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        read_documents(file)


def write_packed(folder: Path) -> None:
    import bz2
    import gzip
    import lzma

    from backports import zstd

    plain = "".join(json.dumps({"text": f"row {n} " * n}) + "\n" for n in range(40)).encode()
    for name, pack in {"gz": gzip, "xz": lzma, "bz2": bz2, "zst": zstd}.items():
        (folder / f"{name}.jsonl.{name}").write_bytes(pack.compress(plain))


def read_target(folder: Path) -> None:
    source = Checkpoint.open(folder / "model")
    with suppress(RegraftError):
        Growth(to=str(folder / "target"))(source)
    Growth(to=str(folder / "target"), adopt=("all",))(source)


def write_target(folder: Path) -> None:
    save_model(folder / "model", layers=1)
    (folder / "target").mkdir()
    config = json.loads((folder / "model" / "config.json").read_text())
    write_json(folder / "target" / "config.json", config | {"num_hidden_layers": 2})


def write_sentence_transformer(folder: Path) -> None:
    tiny("bert", layers=1, architecture="BertModel")[1].save_pretrained(folder)
    package, kinds = "sentence_transformers.models.", ("Transformer", "Pooling", "Normalize")
    rows = [
        {"idx": number, "path": f"{number}_{kind}" if number else "", "type": package + kind}
        for number, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir()
    write_json(folder / "modules.json", rows)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 72})
    write_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.X", None]}})
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Mine\n")


def read_side_files(folder: Path) -> None:
    find_side_files(folder, 72)
    lineage.format_front_matter(folder / "README.md")
    find_side_files(folder, 144)


def family(name: str) -> Reader:
    return Reader(
        lambda folder: tiny(name, layers=3 if "gemma3" in name else 1)[1].save_pretrained(folder),
        ("config.json",),
        read_model,
    )


def save_sharded(folder: Path) -> None:
    tiny("llama", layers=1)[1].save_pretrained(folder, max_shard_size="20KB")


SIDECARS = (
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "chat_template.jinja",
)
READERS = {
    **{
        name: family(name)
        for name in (
            "llama", "gemma2", "gemma3_text", "phi3", "phi", "mixtral", "gpt_neox", "gpt2", "vit",
            "dinov2", "bert", "olmo2", "starcoder2", "roberta",
        )
    },
    "weights": Reader(lambda f: tiny("llama", layers=1)[1].save_pretrained(f), ("model.safetensors",), read_model),
    "shards": Reader(save_sharded, ("model.safetensors.index.json",), read_model),
    "grown": Reader(save_grown, ("out/lineage.json",), lambda f: read_model(f / "out")),
    "linearized": Reader(save_linearized, ("out/config.json", "out/lineage.json"), lambda f: read_model(f / "out")),
    "sidecars": Reader(lambda f: save_model(f, layers=1), SIDECARS, speak),
    "gguf": Reader(write_gguf_model, ("tiny.gguf",), read_gguf_model),
    "target": Reader(write_target, ("target/config.json",), read_target),
    "side files": Reader(write_sentence_transformer, ("modules.json", "1_Pooling/config.json", "tokenizer_config.json", "README.md"), read_side_files),
    "text": Reader(write_texts, ("a.txt", "b.jsonl"), tokens_of),
    "packed text": Reader(write_packed, ("*.gz", "*.xz", "*.bz2", "*.zst"), read_any_documents),
    "tables": Reader(write_tables, ("a.parquet", "b.arrow"), read_any_documents),
    "token cache": Reader(cache_tokens, ("cache/*/*/journal.json", "own/rows-32.json", "cache/*/*/tokens", "cache/*/*/documents"), tokens_of),
    "row store": Reader(fill_store, ("store/*.safetensors", "store/facts.json"), read_store),
    "run": Reader(write_run, ("*.json", "metrics.jsonl"), read_run),
    "tracked run": Reader(write_track, ("track.json", "metrics.jsonl"), read_track),
    "comparison": Reader(write_comparison, ("out/recipe.json", "out/arms/*/*/done.json", "out/arms/*/*/metrics.jsonl"), read_comparison),
    "moments": Reader(write_moments, ("optimizer.safetensors",), read_moments_of),
    "images": Reader(write_images, ("images.npz",), lambda f: read_images(f / "images.npz")),
}  # fmt: skip


def run_reader(reader: Reader, pristine: Path, work: Path, data: Any) -> None:
    """Read once with one file damaged; anything but success or a RegraftError of one line fails."""
    files = sorted({file for pattern in reader.files for file in pristine.glob(pattern)})
    assert files
    victim = data.draw(st.sampled_from(files))
    replacement = data.draw(damaged(victim.read_bytes(), victim.name))
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(pristine, work)
    place = work / victim.relative_to(pristine)
    if replacement is None:
        place.unlink()
    else:
        times = place.stat()
        place.write_bytes(replacement)
        os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader.read(work)
        except RegraftError as error:
            assert "\n" not in str(error), error
            assert len(str(error)) < 1000, error


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    # Pictures take a second each, and no reader looks at them.
    monkeypatch.setattr(plots, "svg", lambda drawing: b"<svg/>")
    pristine = tmp_path / "pristine"
    pristine.mkdir()
    READERS[name].make(pristine)
    READERS[name].read(shutil.copytree(pristine, tmp_path / "whole"))

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=EXAMPLES == FEW,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data: Any) -> None:
        run_reader(READERS[name], pristine, tmp_path / "work", data)

    check()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", '{"model_type": "llama", "hidden_size": ', "config.json' is not JSON"),
        ("config.json", "[" * 100_000, "nested deeper than 100"),
        ("config.json", '{"model_type": ["llama"]}', "it must be the name of a model type"),
        ("generation_config.json", "[1]", "generation_config.json' is \\[1\\], not an object"),
        ("tokenizer_config.json", "[1]", "not an object"),
        ("tokenizer.json", '{"version": 99}', "no tokenizer in"),
        ("lineage.json", '{"steps": {"a": 1}}', "lineage.json': steps is {'a': 1}, not a list"),
        ("lineage.json", '{"version": 7}', "version is 7, this regraft reads version 1"),
    ],
)
def test_the_command_line_says_one_line(
    name: str, text: str, message: str, source: Path, tmp_path: Path, capsys: Any
) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    (model / name).write_text(text)
    line = refused(capsys, "generate", model, "abc", "--tokens", 2)
    assert re.search(message, line), line
