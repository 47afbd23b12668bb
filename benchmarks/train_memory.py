"""Memory of training: what `regraft plan --train` forecasts against what the loop takes, on sizes
that fit here.

Each line is a process of its own: a random Llama (or what `linearize` makes of it) trains two steps
through the real loop. Measured is the peak of its anonymous memory in the second step (the highest
mark of resident memory without the pages of files) above what it was with everything imported and
no model; the C library gives blocks above 1 MB back at once, so that what is measured is in use.
The forecast is `regraft plan --train`'s for one GPU. Run: python benchmarks/train_memory.py [--only
NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SIZES = {
    "20M": {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 2,
            "num_hidden_layers": 8, "vocab_size": 16384},
    "60M": {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4,
            "num_hidden_layers": 12, "vocab_size": 32768},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
             "num_hidden_layers": 30, "vocab_size": 49152, "tie_word_embeddings": True},
    "200M": {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4,
             "num_hidden_layers": 12, "vocab_size": 32768},
}  # fmt: skip
# name: size, mixer, stage, length, rows, precision, checkpointing
CASES: dict[str, tuple[str, str | None, str, int, int, str, bool]] = {
    "20M next": ("20M", None, "next", 512, 2, "float32", False),
    "20M next, bfloat16": ("20M", None, "next", 512, 2, "bfloat16", False),
    "20M next, checkpointing": ("20M", None, "next", 512, 2, "float32", True),
    "20M next, long": ("20M", None, "next", 2048, 1, "float32", False),
    "20M distil": ("20M", None, "distil", 512, 2, "float32", False),
    "20M mixers distil": ("20M", "gated_deltanet", "distil", 512, 2, "float32", False),
    "20M mixers align": ("20M", "gated_deltanet", "align", 512, 8, "float32", False),
    "60M next": ("60M", None, "next", 512, 1, "float32", False),
    "135M next": ("135M", None, "next", 512, 1, "float32", False),
    "135M distil": ("135M", None, "distil", 256, 1, "float32", False),
    "200M next": ("200M", None, "next", 256, 1, "float32", False),
}


def blank(size: str, folder: Path) -> Path:
    """A directory with a random Llama in bfloat16, so that float32 weights are memory and not pages
    of its file.
    """
    import torch

    from regraft import modeling

    torch.manual_seed(0)
    if not (folder / "config.json").exists():
        modeling.build_random_model(
            {"model_type": "llama", "max_position_embeddings": 4096, **SIZES[size]}, 0
        ).bfloat16().save_pretrained(folder)
    return folder


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def open_case(name: str, folder: Path) -> tuple[Any, Any]:
    """(source, target) of a case, as checkpoints."""
    from regraft.core.checkpoint import Checkpoint
    from regraft.mixers.remix import Remix

    source = Checkpoint.open(folder)
    return source, Remix(CASES[name][1], keep="every:4")(source) if CASES[name][1] else source


def forecast_bytes(name: str, folder: Path) -> float:
    """Bytes by the memory model."""
    from regraft.plan import forecast

    _, _, stage, length, rows, precision, again = CASES[name]
    asked: Any = forecast.TrainingForecastRequest(
        stage=stage, length=length, precision=precision, checkpointing=again, batch=rows
    )
    source, target = open_case(name, folder)
    step = forecast.plan_step_memory(target, None if stage == "next" else source, asked)
    return sum(forecast.peak_memory(step, asked, rows, False).values())


class Enough(Exception):
    """Two steps are done."""


def measure_bytes(name: str, folder: Path) -> int:
    """Bytes above what was there before the models; in a process of its own."""
    import torch

    from regraft import modeling
    from regraft.data.rows import Packed
    from regraft.train import loop, throughput
    from regraft.train.stage import Stage

    _, _, kind, length, rows, precision, again = CASES[name]
    source, target = open_case(name, folder)
    throughput.measure_peak_flops(torch.device("cpu"), precision == "bfloat16")
    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (4 * rows, length))
    places = torch.arange(length).remainder(length // 2).expand_as(ids)  # two documents in a row
    packed = Packed(ids, places, torch.full((len(ids),), length))
    before = status("RssAnon")
    teacher = modeling.materialize(source) if kind != "next" else None
    slots = modeling.slots(teacher, source) if kind == "align" else []
    model = modeling.materialize(target)

    def progress(stage: Any, step: int, steps: int, row: Row) -> None:
        if step == 2:
            raise Enough
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew

    stage: Any = Stage(kind, 10 * rows * length, length, rows, precision=precision)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as out:
        run = loop.Run(
            model,
            [stage],
            lambda _: packed,
            Path(out),
            teacher,
            slots,
            checkpointing=again,
            progress=progress,
            save_seconds=1e9,
        )
        with suppress(Enough):
            loop.train(run)
    return status("VmHWM") - status("RssFile") - before


def main() -> None:
    """Print a line a case: measured, forecast, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="the cases whose names contain this")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure_bytes(asked.measure[0], Path(asked.measure[1]))))
        return
    rows: list[Row] = []
    print(f"{'case':28} {'measured MB':>12} {'forecast MB':>12} {'forecast/measured':>18}")
    with tempfile.TemporaryDirectory() as place:
        for name in (name for name in CASES if (asked.only or "") in name):
            folder = blank(CASES[name][0], Path(place) / CASES[name][0])
            command = [sys.executable, __file__, "--measure", name, str(folder)]
            place_of = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=place_of)
            taken, told = json.loads(done.stdout.splitlines()[-1]), forecast_bytes(name, folder)
            rows.append({"case": name, "measured": taken, "forecast": told})
            print(
                f"{name:28} {taken / 1e6:12,.0f} {told / 1e6:12,.0f} {told / taken:18.2f}",
                flush=True,
            )
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
