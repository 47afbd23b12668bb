"""Tokens per second in llama.cpp at several context lengths, for GGUF files beside each other.

Claim: what `regraft export` writes decodes level with its teacher at 1,024 tokens, and faster the
longer the text, both quantised alike.

Run: python benchmarks/serve_speed.py TEACHER.gguf STUDENT.gguf --contexts 1024,4096,16384,65536

Needs the extra `serve`. One run, files in turn at each length and again each round, so that they
share the machine's mood; the median of the rounds counts. Caches are float16, as llama-server keeps
them, and the attention is llama.cpp's own choice. Up to `--prefill` tokens are read for real, and
that speed is printed too. A longer context is the cache of those tokens repeated: decoding costs
the same whatever they say, and 65,536 tokens would take an hour to read.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import struct
import time
from pathlib import Path
from typing import Any

from regraft.export.gguf.engine import import_engine

BATCH, NEW = 512, 32
RECURRENT = ("qwen35", "granitehybrid")  # a state beside the cache
CONSTANT = ("rwkv6qwen2",)  # a state alone, which costs the same behind any text
POSITIONS = ("qwen35",)  # cells with two more numbers: positions in an image


class Reader:
    """A llama.cpp state of one sequence, read piece by piece."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        piece = self.data[self.at : self.at + size]
        if len(piece) < size:
            raise SystemExit("serve_speed: llama.cpp writes states in another format now")
        self.at += size
        return piece

    def number(self, form: str = "I") -> int:
        """The next number of a `struct` format."""
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0])


def repeat_cells(state: bytes, cells: int, architecture: str) -> bytes:
    """The state of a longer text: the cache's cells repeated until there are `cells`.

    llama_kv_cache::state_write and llama_memory_recurrent::state_write say what is in it. Windows
    and states of recurrent layers stay as they are, at the new end of the text.
    """
    reader, extra = Reader(state), 8 if architecture in POSITIONS else 0
    head = reader.take(8)  # a magic number and the sequence's
    cache, have = _copy_cache(reader, cells, 0, extra)
    out = head + cache
    if reader.at == len(state):
        return out
    if architecture not in RECURRENT:  # the windows' cache
        return out + _copy_cache(reader, 0, cells - have, extra)[0]
    count = reader.number()
    out += struct.pack("<I", count)
    for _ in range(count):
        position, ids = reader.number("i"), reader.number()
        out += struct.pack("<iI", position + cells - have, ids) + reader.take(4 * ids)
    return out + reader.take(len(state) - reader.at)


def _copy_cache(reader: Reader, cells: int, shift: int, extra: int) -> tuple[bytes, int]:
    """(a cache of `cells` cells, or as many as it has, moved by `shift`; how many it has)."""
    streams, have = reader.number(), reader.number()
    if streams != 1 or not have:
        raise SystemExit("serve_speed: one sequence in one stream is expected")
    cells, metas = cells or have, []
    for _ in range(have):
        position, ids = reader.number("i"), reader.number()
        metas.append((position, ids, reader.take(extra + 4 * ids)))
    out = [struct.pack("<II", streams, cells)]
    begin = metas[0][0] + shift
    for cell in range(cells):
        _, ids, rest = metas[cell % have]
        out.append(struct.pack("<iI", begin + cell, ids) + rest)

    transposed, layers = reader.number(), reader.number()
    out.append(struct.pack("<II", transposed, layers))
    for is_value in (False, True):
        for _ in range(layers):
            out.append(reader.take(4))  # type
            if is_value and transposed:
                size, rows = reader.number(), reader.number()
                out.append(struct.pack("<II", size, rows))
            else:
                size, rows = reader.number("Q"), 1
                out.append(struct.pack("<Q", size))
            for _ in range(rows):
                row = reader.take(size * have)
                out.append((row * (cells // have + 1))[: size * cells])
    return b"".join(out), have


def fill(model: Any, context: int) -> None:
    """Make the model's cache that of `context` tokens, from the shorter text it has read."""
    import llama_cpp

    handle = model._ctx.ctx
    size = llama_cpp.llama_state_seq_get_size(handle, 0)
    buffer = (ctypes.c_uint8 * size)()
    llama_cpp.llama_state_seq_get_data(handle, buffer, size, 0)
    longer = repeat_cells(bytes(buffer), context, model.metadata["general.architecture"])
    model.reset()
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), True)
    given = (ctypes.c_uint8 * len(longer)).from_buffer_copy(longer)
    if not llama_cpp.llama_state_seq_set_data(handle, given, len(longer), 0):
        raise SystemExit(f"serve_speed: llama.cpp does not take a cache of {context} tokens")
    model.n_tokens = context


def measure(file: Path, context: int, prefill: int, threads: int) -> tuple[float, float]:
    """(tokens read per second, tokens written per second behind `context` tokens)."""
    model = import_engine().Llama(
        str(file),
        n_ctx=context + NEW,
        n_batch=BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        swa_full=False,
        verbose=False,
    )
    read = min(context, prefill)
    ids = [random.Random(0).randrange(10, model.n_vocab() - 10) for _ in range(read + NEW)]
    begin = time.perf_counter()
    model.eval(ids[:read])
    speed = read / (time.perf_counter() - begin)
    if context > read and model.metadata["general.architecture"] not in CONSTANT:
        fill(model, context)
    begin = time.perf_counter()
    for token in ids[read:]:
        model.eval([token])
    done = time.perf_counter()
    model.close()
    return speed, NEW / (done - begin)


def main() -> None:
    """Print a table: a line a context, two columns a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="the first is the teacher")
    parser.add_argument("--contexts", default="1024,4096,16384,65536")
    parser.add_argument("--prefill", default=4096, type=int, help="tokens that are read at most")
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--rounds", default=3, type=int)
    given = parser.parse_args()
    columns = (f"{file.stem}: read | write | of the first" for file in given.files)
    print("| context | " + " | ".join(columns) + " |")
    print("|---|" + "---|---|---|" * len(given.files))
    for context in (int(text) for text in given.contexts.split(",")):
        rounds = [
            [measure(file, context, given.prefill, given.threads) for file in given.files]
            for _ in range(given.rounds)
        ]
        cells = []
        for speeds in zip(*rounds, strict=True):
            read, wrote = (statistics.median(values) for values in zip(*speeds, strict=True))
            ratios = [one[1] / first[0][1] for one, first in zip(speeds, rounds, strict=True)]
            cells.append(f"{read:.1f} | {wrote:.1f} | {statistics.median(ratios):.2f}")
        print(f"| {context} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
