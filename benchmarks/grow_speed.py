"""Growing a big model: time and memory of writing it, against copying as many bytes and against
mergekit.

Claims, each in one run on one disk: 4 GB of bfloat16 from a source of 2.2 GB in 500 MB shards take
at most twice the time of copying as many bytes file to file (shutil.copyfile of files of the
output's sizes, each flushed) and at most 1.2 GB of anonymous memory; depth growth is no slower than
mergekit's passthrough of the same layers and takes no more. The source is a Llama of 1.1 B random
parameters, made first. Every growth and merge is a process of its own, imports included; its
anonymous memory is RssAnon, sampled every 20 ms. Ours hashes source and output and flushes the
output to disk, mergekit does neither. `above` is the peak over a process that has done the imports,
`forecast` what the plan says it is at most. Sides take turns --repeats times; medians of seconds
and the largest memory count. Seconds of processor time stand beside seconds on the clock: far fewer
of them mean a disk that waits or a core that others use. mergekit: python3 -m venv MK && MK/bin/pip
install torch==2.13.0 mergekit==0.1.5 Run: python benchmarks/grow_speed.py [--dir DIR] [--mergekit
MK] [--repeats 3] [--small] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHARD = 500_000_000
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
         "num_hidden_layers": 22, "vocab_size": 32000}  # fmt: skip
SMALL = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2,
         "num_hidden_layers": 8, "vocab_size": 32000}  # fmt: skip
IMPORTS = (
    "from regraft.core.checkpoint import Checkpoint; from regraft.growth.sizes_to_steps import"
    " Growth"
)
SILENT = [{"filter": "o_proj", "value": 0.0}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
Row = dict[str, Any]


def make_source(folder: Path, shape: dict[str, int]) -> None:
    """A Llama of random bfloat16 weights in four shards."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        names = {
            name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()
        }
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    torch.manual_seed(0)
    places: dict[str, str] = {}
    total, quarter = 0, -(-len(names) // 4)
    for number in range(4):
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        mine = list(names)[number * quarter : (number + 1) * quarter]
        values = {
            name: (0.02 * torch.randn(names[name]) + (len(names[name]) == 1)).bfloat16()
            for name in mine
        }
        save_file(values, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(mine, file)
        total += sum(value.nbytes for value in values.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous(process: int) -> int:
    """RssAnon of a process now, bytes; 0 when it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def measure_command(command: list[str]) -> dict[str, float]:
    """Run a command: seconds on the clock and of processors, and the largest RssAnon of its
    process.
    """
    os.sync()
    begin, before, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN), 0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=said, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if process.returncode:
            said.seek(0)
            raise SystemExit(
                f"{command} ended with {process.returncode}: {said.read().decode()[-2000:]}"
            )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": seconds, "processor": processor, "peak": peak}


def time_copy(files: list[Path], folder: Path) -> dict[str, float]:
    """Copy files into a folder, each flushed to disk: seconds on the clock and of processors."""
    folder.mkdir()
    os.sync()
    begin, used = time.perf_counter(), time.process_time()
    for file in files:
        shutil.copyfile(file, folder / file.name)
        with open(folder / file.name, "rb") as stream:
            os.fsync(stream.fileno())
    row = {"seconds": time.perf_counter() - begin, "processor": time.process_time() - used}
    shutil.rmtree(folder)
    return row


def combine_runs(runs: list[dict[str, float]]) -> Row:
    """Several runs of one side as one row: median times, all seconds, the largest memory."""
    row: Row = {
        name: statistics.median(run[name] for run in runs) for name in ("seconds", "processor")
    }
    return row | {
        "all_seconds": [run["seconds"] for run in runs],
        "peak": max(run.get("peak", 0) for run in runs),
    }


def weights(folder: Path) -> list[Path]:
    """The weight files of a model."""
    return sorted(folder.glob("*.safetensors"))


def size_of(folder: Path) -> int:
    """Bytes of its weight files."""
    return sum(file.stat().st_size for file in weights(folder))


def command(source: Path, out: Path, sizes: Row) -> list[str]:
    """What `regraft grow` computes and writes, without its command line and what it measures at
    step 0.
    """
    grown = f"Growth(**{sizes!r})(Checkpoint.open({str(source)!r}))"
    return [sys.executable, "-c", f"{IMPORTS}; {grown}.save({str(out)!r}, shard_bytes={SHARD})"]


def command_line(source: Path, out: Path, sizes: Row) -> list[str]:
    """`regraft grow` itself."""
    flags = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    return [sys.executable, "-m", "regraft", "grow", str(source), str(out), *flags]


def forecast(source: Path, sizes: Row) -> int:
    """What the plan says about memory."""
    from regraft.core.checkpoint import Checkpoint
    from regraft.growth.sizes_to_steps import Growth
    from regraft.plan.plan import Plan

    opened = Checkpoint.open(source)
    return Plan.of(opened, Growth(**sizes)(opened)).peak_bytes


def grow_against_copy(sizes: Row, source: Path, folder: Path, repeats: int) -> Row:
    """The first claim: copy, growth and the command line taking turns."""
    out = folder / "out"
    runs: dict[str, list[dict[str, float]]] = {"copy": [], "grow": [], "command_line": []}
    for _ in range(repeats):
        runs["command_line"].append(measure_command(command_line(source, out, sizes)))
        shutil.rmtree(out)
        runs["grow"].append(measure_command(command(source, out, sizes)))
        runs["copy"].append(time_copy(weights(out), folder / "copy"))
        written = size_of(out)
        shutil.rmtree(out)
    imported = measure_command([sys.executable, "-c", f"{IMPORTS}; import time; time.sleep(0.3)"])[
        "peak"
    ]
    row: Row = {"sizes": sizes, "bytes": written} | {
        side: combine_runs(found) for side, found in runs.items()
    }
    row["ratio"] = row["grow"]["seconds"] / row["copy"]["seconds"]
    row["ratios"] = [
        ours / theirs
        for ours, theirs in zip(row["grow"]["all_seconds"], row["copy"]["all_seconds"], strict=True)
    ]
    return row | {"above": row["grow"]["peak"] - imported, "forecast": forecast(source, sizes)}


def llama_pro_slices(layers: int, target: int) -> list[Row]:
    """mergekit's slices for layers that start silent behind every few, as Deepen's llama_pro places
    them.
    """
    more = target - layers
    rows, begin = [], 0
    for end in [(k + 1) * layers // more for k in range(more)]:
        rows += [
            {"layer_range": [begin, end]},
            {"layer_range": [end - 1, end], "parameters": {"scale": SILENT}},
        ]
        begin = end
    return rows


def solar_slices(layers: int, target: int) -> list[Row]:
    """mergekit's slices for two overlapping copies (SOLAR)."""
    lower: Row = {"layer_range": [0, -(-target // 2)]}
    return [lower, {"layer_range": [layers - target // 2, layers]}]


def merge_command(slices: list[Row], source: Path, folder: Path, venv: Path) -> list[str]:
    """mergekit's passthrough into folder/merged."""
    rows = [{"sources": [{"model": str(source), **row}]} for row in slices]
    file = folder / "passthrough.yaml"
    file.write_text(
        json.dumps({"slices": rows, "merge_method": "passthrough", "dtype": "bfloat16"})
    )
    options = ["--out-shard-size", str(SHARD), "--no-copy-tokenizer", "--quiet"]
    return [str(venv / "bin" / "mergekit-yaml"), str(file), str(folder / "merged"), *options]


def depth_against_mergekit(
    sizes: Row, slices: list[Row], source: Path, folder: Path, venv: Path, repeats: int
) -> Row:
    """The second claim: both taking turns; whether the outputs hold the same numbers."""
    out, merged = folder / "out", folder / "merged"
    ours, theirs = [], []
    for _ in range(repeats):
        for place in (out, merged):
            shutil.rmtree(place, ignore_errors=True)
        theirs.append(measure_command(merge_command(slices, source, folder, venv)))
        ours.append(measure_command(command(source, out, sizes)))
    row = {"sizes": sizes, "bytes": size_of(out), "equal": equal(out, merged)}
    for place in (out, merged):
        shutil.rmtree(place)
    return row | {"ours": combine_runs(ours), "mergekit": combine_runs(theirs)}


def equal(left: Path, right: Path) -> bool:
    """Whether two models hold the same tensors."""
    import torch

    from regraft.io import safetensors

    first, second = safetensors.read_entries(left), safetensors.read_entries(right)
    return set(first) == set(second) and all(
        torch.equal(first[name].read(), second[name].read()) for name in first
    )


def format_row(row: Row) -> str:
    """Times and memory of one side."""
    memory = f", {row['peak'] / 1e6:.0f} MB" if row["peak"] else ""
    return f"{row['seconds']:.1f} s ({row['processor']:.1f} s of processor){memory}"


def show(result: Row) -> None:
    """The results in lines."""
    row = result["copy"]
    print(
        f"{result['cores']} core; source {result['source_bytes'] / 1e9:.2f} GB, shards of"
        f" {SHARD / 1e6:.0f} MB"
    )
    print(
        f"grow to {row['sizes']}, {row['bytes'] / 1e9:.2f} GB: {format_row(row['grow'])}; copy"
        f" {format_row(row['copy'])}"
    )
    print(
        f"  ratio {row['ratio']:.2f}, of each turn"
        f" {', '.join(f'{ratio:.2f}' for ratio in row['ratios'])}"
    )
    print(
        f"  memory above imports {row['above'] / 1e6:.0f} MB, forecast at most"
        f" {row['forecast'] / 1e6:.0f} MB"
    )
    print(f"  the whole command line: {format_row(row['command_line'])}")
    for row in result.get("mergekit", []):
        same = "equal" if row["equal"] else "different"
        print(f"{row['sizes']}, {row['bytes'] / 1e9:.2f} GB, {same} tensors: ", end="")
        print(f"ours {format_row(row['ours'])}; mergekit {format_row(row['mergekit'])}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", default=None, help="where source and outputs lie for the time of the run (11 GB)"
    )
    parser.add_argument(
        "--mergekit", type=Path, default=None, help="a virtual environment that holds mergekit"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--small", action="store_true", help="a source of 110 MB, to try the script"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    options = parser.parse_args()
    shape = SMALL if options.small else SHAPE
    old = shape["num_hidden_layers"]
    sizes = {
        "hidden": shape["hidden_size"] * 5 // 4,
        "ffn": shape["intermediate_size"] * 5 // 4,
        "layers": old + 6,
    }
    result: Row = {"cores": len(os.sched_getaffinity(0)), "shard_bytes": SHARD}
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        folder, source = Path(place), Path(place) / "source"
        make_source(source, shape)
        result["source_bytes"] = size_of(source)
        result["copy"] = grow_against_copy(sizes, source, folder, options.repeats)
        if options.mergekit:
            target = old * 3 // 2
            ways = {
                "upscale": solar_slices(old, target),
                "llama_pro": llama_pro_slices(old, target),
            }
            ways["identity"] = ways[
                "llama_pro"
            ]  # as many layers and bytes; ours draws random maps, so not equal
            result["mergekit"] = [
                depth_against_mergekit(
                    {"layers": target, "depth_init": how},
                    slices,
                    source,
                    folder,
                    options.mergekit,
                    options.repeats,
                )
                for how, slices in ways.items()
            ]
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
