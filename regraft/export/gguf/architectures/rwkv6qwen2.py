"""rwkv6qwen2: Llama-shaped, RWKV-6 without norm and bonus in every layer, as RADLADS trains it.

From llama.cpp's src/models/rwkv6-base.cpp, where a layer without `time_mix_first` multiplies keys
by one minus decay, queries by 1/sqrt(dim) and outputs by a sigmoid gate, and nothing is rotated. It
is the mixer `rwkv6` with the options `balance`, norm "none" and gate "sigmoid". No class of
transformers computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ....core.anatomy import Config, find_anatomy
from ....core.checkpoint import Checkpoint
from ....errors import RegraftError
from ....mixers.attention import Attention
from ....mixers.rwkv6 import Rwkv6
from ...conversion import find_own, mixers_of
from ..architecture import GGUFArchitecture
from ..tensors import GGUFTensor, copy_head

CONTEXT = 1 << 20  # what llama.cpp's converter writes: nothing depends on positions
RANK = 8  # of maps that are zero
STREAMS = "wkvrg"  # the file's order of what reads the input
OUTER = {
    "embed.weight": "token_embd.weight",
    "norm.final.weight": "output_norm.weight",
    "head.weight": "output.weight",
}
SHELL = {
    "norm.attn.weight": "attn_norm.weight",
    "norm.mlp.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate.weight",
    "mlp.up.weight": "ffn_up.weight",
    "mlp.down.weight": "ffn_down.weight",
}
PROJECTIONS = {"receptance": "q", "key": "k", "value": "v"}


def find_metadata(config: Config) -> dict[str, Any]:
    """The metadata of a model that fits, without the architecture's prefix."""
    whole = find_anatomy(config)
    host, sizes = whole.host(config), whole.solve(config)
    shift, decay = find_ranks(config)
    return {
        "vocab_size": sizes["vocab"],
        "context_length": CONTEXT,
        "embedding_length": sizes["hidden"],
        "block_count": sizes["depth"],
        "feed_forward_length": sizes["ffn"],
        "attention.head_count": 0,  # read by llama.cpp, not used
        "attention.head_count_kv": Rwkv6.state_heads(attention_of(config, 0), parse(config, 0)),
        "attention.layer_norm_rms_epsilon": float(
            host.fill_defaults(whole.host_config(config))[host.eps]
        ),
        "wkv.head_size": sizes["dim"],
        "time_mix_extra_dim": shift,
        "time_decay_extra_dim": decay,
        "token_shift_count": 1,
    }


def parse(config: Config, layer: int) -> Any:
    """Options of a layer's mixer."""
    spec = mixers_of(config)[layer]
    assert spec is not None
    return Rwkv6.parse(spec)


def attention_of(config: Config, layer: int) -> Attention:
    """The attention that a layer's mixer replaces."""
    return Attention(**config["attention"][layer])


def find_ranks(config: Config) -> tuple[int, int]:
    """Ranks of the maps of (token shift, decay): the largest of all layers, which have one size."""
    options = [parse(config, layer) for layer in range(len(mixers_of(config)))]
    shift = max((one.shift_rank for one in options if one.shift), default=RANK)
    decay = max((one.rank for one in options if one.decay == "dynamic"), default=RANK)
    return shift, decay


def build_tensors(checkpoint: Checkpoint) -> list[GGUFTensor]:
    """Every tensor of a model that fits."""
    made = list(carry_parts(checkpoint, OUTER, None))
    for layer in range(checkpoint.layers):
        inner = [*carry_parts(checkpoint, SHELL, layer), *TimeMix(checkpoint, layer).build()]
        made += [
            GGUFTensor(f"blk.{layer}.{one.name}", one.shape, one.dtype, one.read) for one in inner
        ]
    return copy_head(made)


def carry_parts(
    checkpoint: Checkpoint, names: dict[str, str], layer: int | None
) -> Iterator[GGUFTensor]:
    """Tensors that are stored as they are, by role -> name in the file; a tied head is none."""
    for role, name in names.items():
        own = find_own(checkpoint, role, layer)
        if own is not None:
            yield GGUFTensor(name, own.shape, own.dtype, own.read)


class TimeMix:
    """A layer's mixer as llama.cpp stores it.

    Args:
        checkpoint: of the model.
        layer: its number.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int) -> None:
        config = checkpoint.config
        self.checkpoint, self.layer = checkpoint, layer
        self.options, self.attention = parse(config, layer), attention_of(config, layer)
        self.hidden = self.attention.hidden
        self.shift_rank, self.decay_rank = find_ranks(config)
        self.states = Rwkv6.state_heads(self.attention, self.options)
        self.folds = not self.options.balance  # one minus decay is taken out of the queries

    def build(self) -> Iterator[GGUFTensor]:
        """Every tensor, by its name in the layer."""
        hidden, count = self.hidden, len(STREAMS)
        shapes: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {
            "lerp_x": ((hidden,), self.read_lerp),
            "lerp_fused": ((count, 1, 1, hidden), self.read_lerps),
            "w1": ((count * self.shift_rank, hidden), self.read_shift_in),
            "w2": ((count, hidden, self.shift_rank), self.read_shift_out),
            "decay": ((hidden,), self.read_decay),
            "decay_w1": ((self.decay_rank, hidden), self.read_decay_in),
            "decay_w2": ((hidden, self.decay_rank), self.read_decay_out),
        }
        for name, (shape, read) in shapes.items():
            yield GGUFTensor(f"time_mix_{name}.weight", shape, torch.float32, read)

        for name, letter in PROJECTIONS.items():
            for kind in ("weight", "bias") if self.attention.qkv_bias else ("weight",):
                yield self.build_projection(f"time_mix_{name}.{kind}", f"{letter}_proj.{kind}")
        out = self.checkpoint.tensors["mixer.o_proj.weight", self.layer]
        yield GGUFTensor("time_mix_gate.weight", (hidden, hidden), out.dtype, self.read_gate)
        yield GGUFTensor("time_mix_output.weight", out.shape, out.dtype, self.read_output)

    def build_projection(self, name: str, local: str) -> GGUFTensor:
        """Queries, keys or values; queries with factors are float32."""
        own = self.checkpoint.tensors[f"mixer.{local}", self.layer]
        if not (self.folds and local.startswith("q")):
            return GGUFTensor(name, own.shape, own.dtype, own.read)
        return GGUFTensor(
            name,
            own.shape,
            torch.float32,
            lambda: self.scale_rows(self.read(local)),
        )

    def read(self, name: str) -> Tensor:
        """A tensor of the mixer, in float32."""
        return self.checkpoint.tensors[f"mixer.{name}", self.layer].read().float()

    def scale_rows(self, value: Tensor) -> Tensor:
        """Queries by one minus decay, by which llama.cpp multiplies keys.

        RegraftError where that is zero.
        """
        kept = 1 - (-self.read_decay().exp()).exp()
        if not bool((kept > 0).all()):
            raise RegraftError(
                f"a decay of layer {self.layer} is 1 in float32, and llama.cpp multiplies keys by"
                " one minus decay: linearize with --for rwkv6qwen2, which has the option balance"
            )
        return value / kept.view(-1, *[1] * (value.ndim - 1))

    def read_lerp(self) -> Tensor:
        """The first mix with the token before; zero: none."""
        return self.read("shift_base") if self.options.shift else torch.zeros(self.hidden)

    def order_streams(self, parts: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A part for each stream in the file's order; zeros for a stream that the mixer lacks.

        Args:
            parts: (streams of the mixer, ...).
            shape: of a part in the file, which is at least as large.
        """
        own, made = Rwkv6.shifted_streams(self.options), torch.zeros(len(STREAMS), *shape)
        for number, letter in enumerate(STREAMS):
            if self.options.shift and letter in own:
                part = parts[own.index(letter)]
                made[number][tuple(slice(size) for size in part.shape)] = part
        return made

    def read_lerps(self) -> Tensor:
        """The constant mix of each stream."""
        parts = self.read("shift_bias") if self.options.shift else torch.zeros(0)
        return self.order_streams(parts, (self.hidden,))[:, None, None]

    def read_shift_in(self) -> Tensor:
        """The first map of each stream's mix, one below the other."""
        shift, rank = self.options.shift, self.options.shift_rank
        parts = self.read("shift_in.weight").unflatten(0, (-1, rank)) if shift else torch.zeros(0)
        return self.order_streams(parts, (self.shift_rank, self.hidden)).flatten(0, 1)

    def read_shift_out(self) -> Tensor:
        """The second map of each stream's mix, outputs first."""
        parts = self.read("shift_out").mT if self.options.shift else torch.zeros(0)
        return self.order_streams(parts, (self.hidden, self.shift_rank))

    def repeat(self, value: Tensor) -> Tensor:
        """Rows of a state for each query head that reads it."""
        group = self.attention.heads // self.states
        heads = value.unflatten(0, (self.states, 1, -1))
        return heads.expand(-1, group, *heads.shape[2:]).flatten(0, 2)

    def read_decay(self) -> Tensor:
        """The constant part of the decay."""
        dynamic = self.options.decay == "dynamic"
        return self.repeat(self.read("decay_out.bias" if dynamic else "decay"))

    def read_decay_in(self) -> Tensor:
        """The first map of a dynamic decay; zero for a static one."""
        made = torch.zeros(self.decay_rank, self.hidden)
        if self.options.decay == "dynamic":
            made[: self.options.rank] = self.read("decay_in.weight")
        return made

    def read_decay_out(self) -> Tensor:
        """The second map of a dynamic decay; zero for a static one."""
        made = torch.zeros(self.hidden, self.decay_rank)
        if self.options.decay == "dynamic":
            made[:, : self.options.rank] = self.repeat(self.read("decay_out.weight"))
        return made

    def read_gate(self) -> Tensor:
        """The gate; zero, which is one half, where there is none."""
        if self.options.gate == "none":
            return torch.zeros(self.hidden, self.hidden)
        return self.read("gate.weight")

    def read_output(self) -> Tensor:
        """The output projection, doubled where the gate is one half."""
        return self.read("o_proj.weight") * (2 if self.options.gate == "none" else 1)


architecture = GGUFArchitecture(
    name="rwkv6qwen2",
    families=(),
    names="RWKV6QWEN2",
    find_metadata=find_metadata,
    build_tensors=build_tensors,
)
