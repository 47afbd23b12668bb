"""Linearizations that stand for all: every mixer, with a window and without."""

from __future__ import annotations

from helpers.mixers import QWEN35
from regraft.mixers.remix import Remix

# One converted layer of two or three kinds of layers.
REMIXES = {
    "window": Remix("window", "0", window=8, sinks=2),
    "sink_window": Remix("sink_window", "0", window=8),
    "gated_deltanet": Remix("gated_deltanet", "none", window=0),
    "gated_deltanet-window": Remix("gated_deltanet", "every:3", window=8, sinks=2),
    "qwen3_5": Remix("gated_deltanet", "1", window=0, options=QWEN35 | {"eps": "source"}),
    "supra": Remix("supra", "none", window=0),
    "supra-window": Remix("supra", "0", window=8),
    "t2r": Remix("t2r", "none", window=0),
    "hedgehog": Remix("hedgehog", "none", window=0),
    "retnet": Remix("retnet", "none", window=0),
    "lightning": Remix("lightning", "none", window=0),
    "gla": Remix("gla", "none", window=0),
    "gla-window": Remix("gla", "0", window=8),
    "rwkv6": Remix("rwkv6", "none", window=0),
    "mamba": Remix("mamba", "none", window=0),
    "mamba2": Remix("mamba2", "none", window=0),
    "mamba2-heads": Remix(
        "mamba2",
        "1",
        window=0,
        options={"layout": "attention", "norm": "head", "start": "identity", "eps": "source"},
    ),
    "lolcats": Remix("lolcats", "none", window=0, options={"window": 8}),
}
# The other mixers beside a window.
ATTENTION = {"layout": "attention"}  # of the mixers that have another one
BESIDE = {
    f"{mixer}-window": Remix(mixer, "0", window=8, sinks=2, options=options)
    for mixer, options in {
        "t2r": {},
        "hedgehog": {},
        "retnet": {},
        "lightning": {},
        "rwkv6": {},
        "mamba": ATTENTION,
        "mamba2": ATTENTION,
    }.items()
}
