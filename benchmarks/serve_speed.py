"""Tokens per second in llama.cpp at several context lengths, for GGUF files beside each other.

    python benchmarks/serve_speed.py TEACHER.gguf STUDENT.gguf --contexts 1024,4096,16384

Needs the extra `serve`. One run, files in turn at each length, so that they share the machine's
mood; one thread unless told otherwise. Cache in float16, as llama-server keeps it.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

from regraft.export.gguf.engine import import_engine

BATCH, NEW = 512, 32


def measure(file: Path, context: int, threads: int) -> tuple[float, float]:
    """(tokens read per second, tokens written per second) behind `context` tokens."""
    model = import_engine().Llama(
        str(file),
        n_ctx=context + NEW,
        n_batch=BATCH,
        n_threads=threads,
        n_threads_batch=threads,
        swa_full=False,
        verbose=False,
    )
    ids = [random.Random(0).randrange(10, model.n_vocab() - 10) for _ in range(context + NEW)]
    begin = time.perf_counter()
    model.eval(ids[:context])
    read = time.perf_counter()
    for token in ids[context:]:
        model.eval([token])
    done = time.perf_counter()
    model.close()
    return context / (read - begin), NEW / (done - read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--contexts", default="1024,4096,16384")
    parser.add_argument("--threads", default=1, type=int)
    given = parser.parse_args()
    print("| context | " + " | ".join(f"{file.name} read | write" for file in given.files) + " |")
    print("|---|" + "---|---|" * len(given.files))
    for context in (int(text) for text in given.contexts.split(",")):
        found = [measure(file, context, given.threads) for file in given.files]
        cells = " | ".join(f"{read:.1f} | {wrote:.1f}" for read, wrote in found)
        print(f"| {context} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
