"""Training-step time of one converted attention layer against the softmax attention it replaces, as
ratios in one run.

Claim: forward + backward of the gated delta rule beside a window on CPU is no slower than softmax
attention (PyTorch's fused kernel) at 2,048 tokens and faster at 8,192, for a SmolLM2-135M layer
(hidden 576, 9 query heads, 3 key/value heads of 64). Beside it every registered mixer with its own
defaults. Weights are random; time does not depend on them. `--decoder` measures the whole decoder
layer, MLP and norms included. Run: python benchmarks/layer_speed.py [--lengths 2048,8192]
[--repeats 5] [--decoder] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from regraft.mixers import registry
from regraft.mixers.attention import Attention
from regraft.mixers.initialize import create_initial_tensor
from regraft.modeling.modeling_regraft import MixerSlot

CONFIG = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    num_hidden_layers=1, rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, max_position_embeddings=8192,
)  # fmt: skip
ATTENTION = Attention(hidden=576, kv=3, group=3, dim=64, scale=64**-0.5)
WINDOW = {"name": "window", "window": 64, "sinks": 4}
MIXERS = {
    "gated(gated_deltanet, window)": {
        "name": "gated",
        "linear": {"name": "gated_deltanet"},
        "window": WINDOW,
    },
    "gated(expanded, window)": {
        "name": "gated",
        "linear": {"name": "gated_deltanet", "grouped": False},
        "window": WINDOW,
    },
    "window": WINDOW,
} | {name: {"name": name} for name in sorted(registry.mixers()) if name not in ("gated", "window")}


def layers() -> dict[str, nn.Module]:
    """Decoder layers by name: softmax, and one for each mixer in its slot."""
    torch.manual_seed(0)
    CONFIG._attn_implementation = "sdpa"
    made: dict[str, nn.Module] = {"softmax": LlamaDecoderLayer(CONFIG, 0)}
    for name, spec in MIXERS.items():
        layer = LlamaDecoderLayer(CONFIG, 0)
        layer.self_attn = MixerSlot(spec, ATTENTION, 0)
        generator = torch.Generator().manual_seed(0)
        for local, weight in registry.weights(spec, ATTENTION).items():
            parameter = layer.self_attn.mixer.get_parameter(local)
            start = weight.fresh or "normal 0.04"
            parameter.data = create_initial_tensor(start, tuple(parameter.shape), generator)
        made[name] = layer
    return made


def step(
    layer: nn.Module, x: Tensor, rotary: tuple[Tensor, Tensor], decoder: bool
) -> Callable[[], None]:
    """One forward and backward of the layer or of its attention alone."""

    def run() -> None:
        part = layer if decoder else layer.self_attn
        out = part(hidden_states=x, attention_mask=None, position_embeddings=rotary)
        (out if isinstance(out, Tensor) else out[0]).sum().backward()

    return run


def measure(length: int, repeats: int, decoder: bool) -> dict[str, float]:
    """Best seconds of a training step by layer; the layers take turns, so that load falls on all
    alike.
    """
    x = torch.randn(1, length, 576, requires_grad=True)
    rotary = LlamaRotaryEmbedding(CONFIG)(x, torch.arange(length).unsqueeze(0))
    runs = {name: step(layer, x, rotary, decoder) for name, layer in layers().items()}
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if turn:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def main() -> None:
    """Print seconds and the ratio to softmax."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--decoder", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for length in map(int, options.lengths.split(",")):
        best = measure(length, options.repeats, options.decoder)
        for name, seconds in best.items():
            rows.append(
                {
                    "length": length,
                    "layer": name,
                    "seconds": seconds,
                    "ratio": seconds / best["softmax"],
                }
            )
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(
            f"{row['length']:>6} tokens  {row['layer']:<30}"
            f" {row['seconds'] * 1e3:8.1f} ms  {row['ratio']:.2f} x softmax"
        )


if __name__ == "__main__":
    main()
