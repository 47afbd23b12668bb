"""What a cache of teacher outputs saves: seconds, FLOPs and disk without it, in a run that fills
it, in the next.

Claim: a second run over the same rows runs no teacher at all and takes less time than a run without
a cache; with the exact kind its losses are those without. Teacher and student are Llamas of 30 M
random parameters, the student is linearized from the teacher; distil over --rows rows of --length
tokens, a row a step. Each run is a process of its own, sides in turns, medians of --repeats;
seconds are the ledger's (the first step, which counts FLOPs, included). Run: python
benchmarks/teacher_cache.py [--rows 24] [--length 256] [--repeats 3] [--dir DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6,
         "num_hidden_layers": 12, "vocab_size": 16000, "tie_word_embeddings": True}  # fmt: skip
KINDS = ("hidden", "hidden:bfloat16", "topk:64")
TRAIN = """
import json, sys
from pathlib import Path
import torch
from regraft import modeling
from regraft.train import loop
from regraft.data.rows import Packed
from regraft.train.stage import Stage
from regraft.train.teacher_cache import CachedTeacher, TeacherCacheConfig

torch.set_num_threads(1)
teacher, student, out, cache, kind = sys.argv[1:6]
rows, length = map(int, sys.argv[6:])
ids = torch.randint(0, 16000, (rows, length), generator=torch.Generator().manual_seed(0))
text = Packed(ids, torch.arange(length).expand_as(ids), torch.zeros(rows))
guide = CachedTeacher(teacher, TeacherCacheConfig(Path(cache), 10**10, kind)) if cache else modeling.load(teacher)
stage = Stage("distil", rows * length, length=length, precision="float32", lr_body=0.0)
ledger = loop.train(loop.Run(modeling.load(student), [stage], lambda length: text, Path(out), guide))
told = guide.flush() if cache else {}
losses = [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
print(json.dumps({"seconds": ledger["seconds"], "flops": ledger["flops"], "losses": losses} | told))
"""


def make(folder: Path) -> None:
    """Teacher and student."""
    from regraft import modeling
    from regraft.core.checkpoint import Checkpoint
    from regraft.mixers.remix import Remix

    modeling.build_random_model(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE}, 0
    ).save_pretrained(folder / "teacher")
    Remix(keep="every:4")(Checkpoint.open(folder / "teacher")).save(folder / "student")


def run(folder: Path, kind: str, rows: int, length: int) -> dict[str, Any]:
    """One run; with a kind through the cache of that kind."""
    out, cache = folder / "out", folder / f"cache {kind}" if kind else ""
    words = [folder / "teacher", folder / "student", out, cache, kind, rows, length]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", TRAIN, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
    )
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    shutil.rmtree(out)
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, usual in (("rows", 24), ("length", 256), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sides: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        folder = Path(place)
        make(folder)
        for _ in range(options.repeats):
            sides.setdefault("no cache", []).append(run(folder, "", options.rows, options.length))
            for kind in KINDS:
                shutil.rmtree(folder / f"cache {kind}", ignore_errors=True)
                for turn in ("first", "second"):
                    found = run(folder, kind, options.rows, options.length)
                    found["disk"] = sum(
                        file.stat().st_size for file in (folder / f"cache {kind}").rglob("*.*")
                    )
                    sides.setdefault(f"{kind}, {turn}", []).append(found)
    plain = sides["no cache"]
    usual = statistics.median(found["seconds"] for found in plain)
    for name, runs in sides.items():
        seconds = statistics.median(found["seconds"] for found in runs)
        away = max(
            abs(a - b) / b for a, b in zip(runs[0]["losses"], plain[0]["losses"], strict=True)
        )
        ran, disk = runs[0].get("computed", options.rows), runs[0].get("disk", 0) / 1e6
        share = runs[0]["flops"] / plain[0]["flops"]
        said = (
            f"{name:24} {seconds:6.1f} s, {seconds / usual:4.0%} of the time, {share:4.0%} of the"
            " FLOPs"
        )
        print(f"{said}, losses within {away:.1e}, teacher on {ran} rows, {disk:.1f} MB")
    if options.json:
        options.json.write_text(json.dumps(sides, indent=1))


if __name__ == "__main__":
    main()
