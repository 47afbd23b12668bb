"""One row of a family's table: a parameter, its signature, the activations it connects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .axes import TABLES, Signature, bare_axis, parse_signature

Config = Mapping[str, Any]  # a transformers config as read from config.json
# What a model reads: tokens; images, of which it may see some patches alone; a spectrogram; texts
# and images; or, with an encoder in front of its decoder, two rows of tokens, or audio and tokens.
Inputs = Literal[
    "tokens", "pixels", "masked pixels", "spectrogram", "texts and images", "token pairs", "audio"
]
Key = tuple[str, int | None]  # role and layer of a parameter; the layer is None outside the stack


@dataclass(frozen=True)
class Part:
    """One row of a family's table: a parameter, what it computes, what it connects.

    `reads` and `writes` name activations of hidden size. They decide how a part grows when the
    model gets wider:

    - "stream": the residual stream, which runs through the whole stack;
    - "normed": the output of a norm;
    - "activated": what goes through an activation function or another norm (Whisper's convolutions,
      heads with a map and a norm), so that only whole copies keep it;
    - "branch": the output of attention or MLP that passes a norm before it is added to the stream;
    - "head": the input of the output embedding;
    - "own": used by this part alone.

    A number that reads and writes the stream multiplies all of it (Gemma 4).
    """

    # Name in the model's state dict. "{}" stands for the layer, "{e}" for the expert, "{p}" for the
    # family's prefix (`Anatomy.prefix`).
    name: str
    # What it computes over named axes, such as "hidden -> kv group dim" (see `axes.Signature`).
    signature: str
    # Order of a matrix's dimensions in the file: "out in" (nn.Linear), or "in out" (embeddings and
    # GPT-2's Conv1D). "expert out in" and "expert in out" have all experts in one tensor; their
    # outputs begin with the axis `expert`, biases too. "out in tap" is the filter of a convolution.
    stored: str = "out in"
    # Roles without ".weight" or ".bias" that are packed into this tensor, in order.
    fused: tuple[str, ...] = ()
    # Whether these maps are packed head by head: the rows of key/value head 0 of all of them, then
    # those of head 1 (Falcon). Else whole maps, one behind the other.
    by_head: bool = False
    # The parameter exists only if this config key is true; None: always.
    when: str | None = None
    # The parameter exists only if this config key is false; None: always.
    unless: str | None = None
    # The axis that counts the layers of its stack: that of a decoder, "encoder_depth" of the
    # encoder in front of one, or one that begins with a word of `axes.BESIDE`, which does not grow.
    stack: str = "depth"
    # (config, layer) -> whether that layer has the parameter; None: every layer has it.
    in_layer: Callable[[Config, int], bool] | None = None
    # Activations that a map or norm takes. Norms (see `norm`) take "stream" by default.
    reads: str = "normed"
    # Activations that a map or norm gives. Norms give "normed" by default.
    writes: str = "stream"
    # Whether it is the gain or the bias of a norm.
    norm: bool = False
    # Whether the norm subtracts the mean. Norms with a bias do without saying so.
    centered: bool = False
    # Role of the factors (LayerScale) that its output is multiplied by; None: there are none.
    scaled: str | None = None
    # Positions of a row that it is applied to, for counting FLOPs: "each", the "first" only (heads
    # over a whole row), every image "patch", those of an "image" beside the text, those that the
    # router sends to this expert, those of an encoder's row in front of a decoder ("source"), the
    # "last" one, or the frames of audio, twice as many.
    at: Literal["each", "first", "last", "patch", "image", "routed", "source", "frame"] = "each"

    @property
    def axes(self) -> Signature:
        """The parsed signature."""
        return parse_signature(self.signature)

    @property
    def subtracts_mean(self) -> bool:
        """Whether it belongs to a norm that subtracts the mean."""
        return self.norm and (self.centered or self.axes.kind == "bias")

    @property
    def is_matrix(self) -> bool:
        """Whether activations are multiplied by it: maps except tables, and the patch filter."""
        axes = self.axes
        inputs = map(bare_axis, axes.inputs)
        return self.at == "patch" or (axes.kind == "map" and not TABLES.issuperset(inputs))

    def is_present(self, config: Config) -> bool:
        """Whether a model of this config has the parameter, in some layer at least."""
        return (self.when is None or bool(config[self.when])) and (
            self.unless is None or not config[self.unless]
        )

    def is_in_layer(self, config: Config, layer: int | None) -> bool:
        """Whether a layer of a model that has the parameter has it."""
        return layer is None or self.in_layer is None or self.in_layer(config, layer)


@dataclass(frozen=True)
class PlacedPart:
    """A part in one model: one parameter of one layer, with its shape."""

    # Name in the model's state dict, layer, expert and prefix filled in.
    name: str
    # The row of the family's table.
    part: Part
    # Shape as stored.
    shape: tuple[int, ...]


def linear(
    role: str,
    name: str,
    axes: str,
    *,
    bias: bool | str = False,
    stored: str = "out in",
    fused: tuple[str, ...] = (),
    **streams: Any,
) -> dict[str, Part]:
    """The parts of a linear layer: a weight and, if it has one, a bias.

    Args:
        role: the role without its ending, such as "attn.q".
        name: the name in the state dict without its ending.
        axes: the weight's signature, such as "hidden -> kv dim".
        bias: whether it has a bias, or the config key that decides it.
        stored: order of the weight's dimensions, "out in" or "in out".
        fused: roles that are packed into it, without ending.
        streams: further fields of both parts, such as `reads`.
    """
    table = {f"{role}.weight": Part(f"{name}.weight", axes, stored, fused, **streams)}

    if bias:
        # A config key decides about the bias alone; a `when` in `streams` decides about both.
        fields = streams | ({"when": bias} if isinstance(bias, str) else {})
        table[f"{role}.bias"] = Part(
            f"{name}.bias", f"->{axes.partition('->')[2]}", stored, fused, **fields
        )

    return table


def norm(
    role: str,
    name: str,
    axis: str = "hidden",
    *,
    bias: bool = False,
    unit: bool = False,
    **streams: Any,
) -> dict[str, Part]:
    """The parts of a norm: its gain and, for most layer norms, its bias.

    Args:
        role: the role without its ending, such as "norm.attn".
        name: the name in the state dict without its ending.
        axis: the axis (or product of axes) that is normalized.
        bias: whether it has a bias.
        unit: whether the gain is stored minus one, as Gemma does.
        streams: further fields of both parts, such as `reads`, or `centered` for a layer norm
            without a bias.
    """
    fields: dict[str, Any] = {"reads": "stream", "writes": "normed", "norm": True} | streams
    table = {
        f"{role}.weight": Part(f"{name}.weight", f"{'1+gain' if unit else 'gain'} {axis}", **fields)
    }
    return table | ({f"{role}.bias": Part(f"{name}.bias", f"-> {axis}", **fields)} if bias else {})


# An output embedding that a config may tie to the embedding, behind the final norm.
TIED_HEAD = Part("lm_head.weight", "hidden -> vocab", unless="tie_word_embeddings", reads="head")
