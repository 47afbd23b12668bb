"""Text on disk as rows of tokens: processor time and memory as ratios in one run.

Claims: filling the cache takes little more than tokenising the same documents in memory, whatever
the format; reading rows from the cache takes little of a training step; peak memory does not grow
with the file; a cache that is there is not made again. The text is the documentation of Python,
repeated, in the tokenizer of a model. Run: python benchmarks/text_speed.py MODEL [--megabytes 4,16]
[--length 1024] [--json]
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import lzma
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regraft import modeling
from regraft.data import default_text
from regraft.data.corpus import TextMixture
from regraft.data.files import import_zstd, open_decompressed
from regraft.data.packing import pack, read_documents
from regraft.data.text import Text
from regraft.data.tokenizer import BatchTokenizer

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".jsonl": bytes,
    ".jsonl.gz": gzip.compress,
    ".jsonl.xz": lambda data: lzma.compress(data, preset=1),
    ".jsonl.zst": lambda data: import_zstd().compress(data),
}


def lines(megabytes: int) -> bytes:
    """So many MB of JSON lines."""
    documents, found, size = default_text.documentation(), [], 0
    while size < megabytes * 1_000_000:
        line = (
            json.dumps({"text": f"{len(found)} {documents[len(found) % len(documents)]}"}).encode()
            + b"\n"
        )
        found.append(line)
        size += len(line)
    return b"".join(found)


def write(folder: Path, suffix: str, data: bytes) -> Path:
    """The lines in a file."""
    file = folder / f"text{suffix}"
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        rows = [json.loads(line)["text"] for line in data.splitlines()]
        parquet.write_table(pyarrow.table({"text": rows}), file, row_group_size=256)
    else:
        file.write_bytes(PACKERS[suffix](data))
    return file


def time_call(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of all threads, which others on the machine do not lengthen, and what came
    of it.
    """
    begin = time.process_time()
    found = work()
    return time.process_time() - begin, found


def drain(file: Path) -> int:
    """Bytes of a file, decompressed and not looked at."""
    with open_decompressed(file) as stream:
        return sum(len(chunk) for chunk in iter(lambda: stream.read(1 << 20), b""))


def parts(documents: list[str]) -> Iterator[list[str]]:
    """64 documents at a time."""
    return (documents[start : start + 64] for start in range(0, len(documents), 64))


def fill_cache(tokenizer: Any, file: Path, cache: Path, length: int = 128) -> Any:
    """Rows of a file, its cache filled."""
    return TextMixture([Text(str(file), max_tokens=0)], tokenizer, cache=cache)(length)


def resident(key: str) -> float:
    """A figure of this process's memory, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def measure_fill(model: str, file: str, cache: str, result: Any) -> None:
    """In a process of its own: fill the cache; memory before and its peak, MB (Linux), and seconds."""
    tokenizer = modeling.load_tokenizer(model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    seconds, _ = time_call(partial(fill_cache, tokenizer, Path(file), Path(cache)))
    result.put((seconds, before, resident("VmHWM")))


def measure_fill_in_process(model: str, file: Path, cache: Path) -> tuple[float, float, float]:
    """`built` in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=measure_fill, args=(model, str(file), str(cache), result))
    process.start()
    found: tuple[float, float, float] = result.get()
    process.join()
    return found


def each(rows: Any, order: Sequence[torch.Tensor]) -> None:
    """Get all rows."""
    for part in order:
        rows[part]


def row_times(model: Any, file: Path, cache: Path, length: int) -> dict[str, float]:
    """Microseconds to get a row of the cache and of memory, in a random order, eight at a time."""
    stored = fill_cache(model, file, cache, length)
    packed = pack(read_documents(file), model, length)
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0)).split(8)
    found = {}
    for name, rows in {"stored": stored, "memory": packed}.items():
        best = min(time_call(partial(each, rows, order))[0] for _ in range(3))
        found[name] = 1e6 * best / len(packed)
    return found


def measure(model: str, megabytes: list[int], length: int) -> dict[str, Any]:
    """All figures."""
    tokenizer = modeling.load_tokenizer(model)
    tokens = BatchTokenizer(tokenizer)
    folder = Path(tempfile.mkdtemp())
    try:
        data = lines(megabytes[0])
        documents = [json.loads(line)["text"] for line in data.splitlines()]
        plain, count = time_call(
            lambda: sum(map(len, itertools.chain(*map(tokens, parts(documents)))))
        )
        rows = []
        for suffix in (*PACKERS, ".parquet"):
            work = partial(
                fill_cache, tokenizer, write(folder, suffix, data), folder / f"cache{suffix}"
            )
            seconds, again = time_call(work)[0], time_call(work)[0]
            read = (
                time_call(partial(drain, folder / f"text{suffix}"))[0]
                if suffix != ".parquet"
                else None
            )
            rows.append(
                {
                    "format": suffix,
                    "tokens_per_second": (count + len(documents)) / seconds,
                    "to_tokenising_alone": seconds / plain,
                    "read_alone_share": None if read is None else read / seconds,
                    "again_share": again / seconds,
                }
            )
        memory = []
        for size in megabytes:
            file = write(folder, ".jsonl", lines(size))
            seconds, before, peak = measure_fill_in_process(model, file, folder / f"memory{size}")
            memory.append(
                {"megabytes": size, "seconds": seconds, "before_MB": before, "peak_MB": peak}
            )
        by_row = row_times(tokenizer, file, folder / f"memory{megabytes[-1]}", length)
        return {"formats": rows, "memory": memory, "microseconds_a_row": by_row}
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--megabytes", default="4,16")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(
        options.model, [int(word) for word in options.megabytes.split(",")], options.length
    )
    if options.json:
        print(json.dumps(found))
        return
    for row in found["formats"]:
        reading = (
            ""
            if row["read_alone_share"] is None
            else f", reading alone {row['read_alone_share']:.1%} of it"
        )
        speed = f"{row['format']:<11} {row['tokens_per_second']:10,.0f} tokens/s"
        ratio = f"{row['to_tokenising_alone']:.2f} x tokenising alone"
        print(f"{speed}, {ratio}{reading}, a second time {row['again_share']:.1%}")
    for row in found["memory"]:
        print(
            f"{row['megabytes']:>4} MB of text: peak {row['peak_MB']:.0f} MB,"
            f" {row['before_MB']:.0f} MB before it"
        )
    by_row = found["microseconds_a_row"]
    print(
        f"a row of {options.length}: {by_row['stored']:.0f} us from the cache,"
        f" {by_row['memory']:.0f} us from memory"
    )


if __name__ == "__main__":
    main()
