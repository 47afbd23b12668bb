"""Layer-streamed alignment: memory whatever the depth, and a model that does not fit whole.

Claims. First: the peak of anonymous memory over a process that has done the imports stays under 2
layers in float32 + 1 shard + the activations of a batch, for 8, 32 and 128 layers of the same
width, saving included. The models are Llamas of random bfloat16 weights written tensor by tensor; a
layer has 51 MB in float32, a shard 100. Activations are counted as 24 tensors of (batch, length,
hidden) and 4 of (batch, length, ffn), float32, which one layer holds for its backward. Second
(--big): a model whose float32 weights are larger than the memory the process may have (RLIMIT_DATA:
heap and anonymous maps), which loading it whole under the same limit shows by failing, is aligned
and saved. Every run is a process of its own; RssAnon is sampled every 5 ms. Seconds are those of
alignment, without saving. Run: python benchmarks/streamed_memory.py [--dir DIR] [--depths 8,32,128]
[--big] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from regraft.io import files

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16,
         "vocab_size": 8000}  # fmt: skip
SHARD = 100_000_000
ROWS, LENGTH, BATCH, TOKENS = 4, 128, 1, 256
BIG = {"layers": 96, "limit": 1_600_000_000}

STREAM = """
import json, re, resource, sys, threading, time
from pathlib import Path
import torch
from regraft.core.checkpoint import Checkpoint
from regraft.mixers.remix import Remix
from regraft.train.layerwise import align
from regraft.data.rows import Packed
from regraft.train.stage import Stage
from regraft.train.layerwise.state import LayerwiseRun
import transformers.models.llama.modeling_llama

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def sample():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)

source, out, limit, rows, length, batch, tokens, shard = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
torch.set_num_threads(1)
torch.ones(64, 64, requires_grad=True).matmul(torch.ones(64, 64)).sum().backward()
begin = peak = anonymous()
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
threading.Thread(target=sample, daemon=True).start()
opened = Checkpoint.open(source)
ids = torch.randint(0, opened.sizes["vocab"], (rows, length), generator=torch.Generator().manual_seed(0))
text = Packed(ids, torch.arange(length).expand_as(ids), torch.zeros(rows))
stage = Stage("align", tokens, length=length, batch=batch, precision="float32")
tick = time.monotonic()
trained, ledger = align.align(LayerwiseRun(opened, Remix(keep="none", window=16)(opened), stage, text, out / "run"))
seconds = time.monotonic() - tick
aligned = peak
trained.save(out / "model", shard_bytes=shard)
print(json.dumps({"align": aligned - begin, "all": peak - begin, "seconds": seconds, "total": peak}))
"""
WHOLE = """
import resource, sys
import torch
from regraft import modeling
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
modeling.load(sys.argv[1])
"""


def make_source(folder: Path, layers: int, seed: int = 0) -> int:
    """A Llama of random bfloat16 weights in shards, written tensor by tensor; its bytes in float32."""
    import torch
    from transformers import LlamaConfig

    from regraft.core.anatomy import find_anatomy
    from regraft.core.checkpoint import LazyTensor, Provenance, with_older_keys
    from regraft.io import shard_writer

    config = LlamaConfig(**SHAPE, num_hidden_layers=layers, dtype="bfloat16").to_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}

    def values(shape: tuple[int, ...], number: int) -> torch.Tensor:
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed + number))
        return (0.02 * drawn + (len(shape) == 1)).bfloat16()

    placed = sorted(find_anatomy(config).place(config).values(), key=lambda spot: spot.name)
    tensors = {}
    for number, spot in enumerate(placed):
        read = lambda shape=spot.shape, number=number: values(shape, number)  # noqa: E731  # one promise per tensor
        tensors[spot.name] = LazyTensor(spot.shape, torch.bfloat16, Provenance("fresh"), read)
    with shard_writer.new_directory(folder) as partial:
        shard_writer.write_weights(partial, tensors, SHARD)
        files.write_json(partial.path / "config.json", with_older_keys(config))
    return 4 * sum(lazy.size for lazy in tensors.values())


def memory_bound() -> dict[str, int]:
    """Bytes of the claim: two layers in float32, a shard, activations."""
    hidden, ffn = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    layer = 4 * (4 * hidden**2 + 3 * hidden * ffn)
    activations = 4 * BATCH * LENGTH * (24 * hidden + 4 * ffn)
    return {
        "layer": layer,
        "shard": SHARD,
        "activations": activations,
        "all": 2 * layer + SHARD + activations,
    }


def child(program: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a fresh process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def run_streamed(source: Path, out: Path, limit: int = 0) -> dict[str, Any]:
    """Memory and seconds of one streamed alignment."""
    ran = child(STREAM, source, out, limit, ROWS, LENGTH, BATCH, TOKENS, SHARD)
    if ran.returncode:
        raise SystemExit(ran.stderr[-3000:])
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def format_row(row: dict[str, Any]) -> str:
    """One run in words."""
    said = (
        f"{row['layers']:4} layers, {row['float32'] / 1e6:6.0f} MB in float32: peak"
        f" {row['align'] / 1e6:.0f} MB"
    )
    said += f" aligning, {row['all'] / 1e6:.0f} MB with saving, {row['seconds']:.0f} s"
    if row["limit"]:
        said += (
            f"; libraries included {row['total'] / 1e6:.0f} MB of at most {row['limit'] / 1e6:.0f}"
        )
        said += f"; whole: {row['whole']}"
    return said


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--depths", default="8,32,128")
    parser.add_argument("--big", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limits, rows = memory_bound(), []
    print(f"bound {limits['all'] / 1e6:.0f} MB: 2 layers of {limits['layer'] / 1e6:.0f}, a shard of {SHARD / 1e6:.0f}, "
          f"activations {limits['activations'] / 1e6:.0f}")  # fmt: skip
    runs = [(int(depth), 0) for depth in options.depths.split(",") if depth]
    runs += [(BIG["layers"], BIG["limit"])] if options.big else []
    for layers, limit in runs:
        with tempfile.TemporaryDirectory(dir=options.dir) as folder:
            place = Path(folder)
            row: dict[str, Any] = {
                "layers": layers,
                "float32": make_source(place / "source", layers),
                "limit": limit,
            }
            if limit:
                whole = child(WHOLE, place / "source", limit)
                row["whole"] = (
                    "loads"
                    if whole.returncode == 0
                    else whole.stderr.strip().splitlines()[-1][:120]
                )
            row |= run_streamed(place / "source", place / "out", limit)
            rows.append(row)
        print(format_row(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"bound": limits, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
