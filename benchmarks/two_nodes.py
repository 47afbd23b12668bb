"""Two machines on one: network namespaces with a cable between them train a model together, sharded
inside each.

python benchmarks/two_nodes.py FOLDER MODEL -- [flags of regraft train: --data .. --stage ..
--teacher .. --tokens ..]

As root, with iproute2. Each namespace has its own loopback, its own address and two processes; they
meet over the cable only. Trains MODEL once so (into FOLDER/two) and once in one process
(FOLDER/one), prints the commands, and the largest relative difference between the losses of the
two.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

NODES = {"regraft-a": "10.77.0.1", "regraft-b": "10.77.0.2"}
PORT = 29511


def ip(*words: str) -> None:
    """One command of iproute2."""
    subprocess.run(["ip", *words], check=True)


def connect_namespaces() -> None:
    """Two namespaces and a pair of virtual network cards between them."""
    first, second = NODES
    for name in NODES:
        ip("netns", "add", name)
    ip(
        "link",
        "add",
        "cable-a",
        "netns",
        first,
        "type",
        "veth",
        "peer",
        "name",
        "cable-b",
        "netns",
        second,
    )
    for (name, address), card in zip(NODES.items(), ("cable-a", "cable-b"), strict=True):
        ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
        ip("-n", name, "link", "set", card, "up")
        ip("-n", name, "link", "set", "lo", "up")


def launch(name: str, card: str, words: list[str]) -> subprocess.Popen[bytes]:
    """torchrun inside a namespace."""
    rank = list(NODES).index(name)
    place = [
        "--nnodes",
        "2",
        "--node-rank",
        str(rank),
        "--nproc-per-node",
        "2",
        "--master-port",
        str(PORT),
    ]
    module = ["-m", "torch.distributed.run", *place, "--master-addr", next(iter(NODES.values()))]
    command = ["ip", "netns", "exec", name, sys.executable, *module, *words]
    print(f"GLOO_SOCKET_IFNAME={card}", shlex.join(command))
    return subprocess.Popen(
        command, env=os.environ | {"GLOO_SOCKET_IFNAME": card, "OMP_NUM_THREADS": "1"}
    )


def losses(out: Path) -> list[float]:
    """Of every step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def main() -> None:
    """Train both ways and compare."""
    folder, model, _, *flags = sys.argv[1:]
    words = ["-m", "regraft", "train", model]
    try:
        connect_namespaces()
        runs = [
            launch(name, card, [*words, f"{folder}/two", *flags, "--hybrid"])
            for name, card in zip(NODES, ("cable-a", "cable-b"), strict=True)
        ]
        codes = [run.wait() for run in runs]
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], check=False)
    if any(codes):
        sys.exit(f"the two machines ended with {codes}")
    subprocess.run([sys.executable, *words, f"{folder}/one", *flags], check=True)
    pairs = list(zip(losses(Path(folder) / "one"), losses(Path(folder) / "two"), strict=True))
    print(
        f"{len(pairs)} steps, losses differ by {max(abs(a - b) / abs(a) for a, b in pairs):.2g} of"
        " themselves at most"
    )


if __name__ == "__main__":
    main()
