"""A random model of a type, tiny: its class, its config and what it computes."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.class_heads import find_class
from ...core.part import Config
from ...core.stock_config import config_class, decode_floats, silence_transformers
from ...errors import RegraftError, first_line
from .layer_keys import has_numbered_layers
from .tiny_config import (
    EXPERTS,
    HEADS,
    TENSORS,
    VOCAB,
    fill_sizes,
    find_inner_heads,
    find_key,
    shrink_config,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ROWS, LENGTH = 2, 21  # of the token ids that a tiny model reads
LARGEST = 3_000_000  # parameters of a tiny model
# Names of buffers that classes compute from the config, whatever a file says.
COMPUTED = re.compile(r"inv_freq|cos|sin|angle|position")
NOT_SAID = ("transformers_version", "model_type", "_name_or_path", "architectures", "auto_map")


@dataclass(frozen=True)
class TinyModel:
    """The class of a model type and a tiny config of it."""

    # The config's `model_type`.
    family: str
    # Class of transformers that computes the model.
    kind: Any
    # Class of its config.
    config_kind: Any
    # The config as its class reads it, before it was shrunk.
    full: dict[str, Any]
    # The tiny one, without `model_type`.
    config: dict[str, Any]
    # Other names of config keys -> the keys.
    aliases: dict[str, str]

    def key(self, kind: str) -> str | None:
        """The config key that counts something, one of `tiny_config.NAMES`."""
        return find_key(self.full, self.aliases, kind)

    def build(self, changes: Mapping[str, Any] | None = None, device: str = "cpu") -> Any:
        """A model of the tiny config, with changed keys, in eval mode.

        Args:
            changes: other values of config keys.
            device: "meta" for shapes alone.
        """
        import torch

        config = self.config_kind(**copy.deepcopy(self.config | dict(changes or {})))
        config._attn_implementation = "eager"
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            model = self.kind(config)
        return model.eval()

    def build_random(self) -> PreTrainedModel:
        """The tiny model with random weights, none of which is zero or one."""
        with silence_transformers():
            model: PreTrainedModel = self.build().float()
        model.config.architectures = [self.kind.__name__]
        randomize(model)
        model.tie_weights()
        return model

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Random arguments of a forward pass."""
        import torch

        generator = torch.Generator().manual_seed(1)
        vocab = self.config.get(self.key("vocab") or "", VOCAB)
        shape = (ROWS, LENGTH)
        return {"input_ids": torch.randint(3, vocab, shape, generator=generator)}


def randomize(model: Any, seed: int = 0) -> None:
    """Give a model random weights under which nothing is hidden by ones and zeros."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim < 2:
                    # What a class starts near one are factors; the rest is added.
                    start = (
                        float(parameter.float().mean()) if torch.isfinite(parameter).all() else 0
                    )
                    factor = not name.endswith("bias") and abs(start) > 0.5
                    parameter.copy_((start if factor else 0.0) + 0.3 * noise)
                elif isinstance(module, torch.nn.Embedding):
                    parameter.copy_(0.7 * noise)
                else:
                    parameter.copy_(1.2 * noise / max(1, parameter.shape[-1]) ** 0.5)
            for name, buffer in module.named_buffers(recurse=False):
                saved = name not in module._non_persistent_buffers_set
                if saved and buffer.is_floating_point() and not COMPUTED.search(name):
                    # Variances and factors stay positive.
                    buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))


def find_tiny_model(config: Config) -> TinyModel:
    """The class of a config and a tiny config that it can be built and run with.

    RegraftError when transformers does not know the type, or no tiny model of it runs.
    """
    family = str(config.get("model_type"))
    config_kind = find_config_class(family)
    with silence_transformers():
        stock = read_whole(config_kind, config)
        kind = find_model_class(family, config_kind, config)
        full, lists = read_fields(stock), find_lists(config_kind, config, stock)
        lists |= {TENSORS: find_tensors(kind, stock)} if has_numbered_layers(full) else {}
        aliases = dict(getattr(config_kind, "attribute_map", None) or {})
        full = {key: value for key, value in full.items() if key not in NOT_SAID}
        full |= {key: value for key, value in lists.items() if key in full}
        tiny = shrink_config(full, aliases, lists)
        model = TinyModel(family, kind, config_kind, full, tiny, aliases)
        return find_running(model)


def read_fields(stock: Any) -> dict[str, Any]:
    """The keys of a config, with the number of layers where its class counts a list of them."""
    fields: dict[str, Any] = stock.to_dict()
    depth = getattr(stock, "num_hidden_layers", None)
    if isinstance(depth, int) and "num_hidden_layers" not in stock.attribute_map:
        fields.setdefault("num_hidden_layers", depth)
    return fields


def find_tensors(kind: Any, stock: Any) -> list[Any]:
    """What tensors each layer of a model has, by its class on the meta device; empty where that
    takes something else.
    """
    import torch

    from .shapes import LAYER

    depth = int(stock.num_hidden_layers)
    found: list[set[str]] = [set() for _ in range(depth)]
    try:
        with torch.device("meta"):
            names = [name for name, _ in kind(copy.deepcopy(stock)).named_parameters()]
    except Exception:  # classes raise anything for sizes that do not go together
        return []
    for name in names:
        place = LAYER.search(name)
        if place and int(place[1]) < depth:
            found[int(place[1])].add(name[place.end() :])
    return [sorted(one) for one in found]


def find_config_class(family: str) -> Any:
    """transformers' config class of a type; RegraftError when it has none."""
    import transformers

    try:
        return config_class(family)
    except KeyError:
        raise RegraftError(
            f"unknown family '{family}': transformers {transformers.__version__} has no such "
            "model_type: install the release that has it, or give --trust-remote-code where its "
            "classes are code beside the weights"
        ) from None


def read_whole(config_kind: Any, config: Config) -> Any:
    """A config as its class reads it; RegraftError when the class refuses it."""
    fields = {key: value for key, value in config.items() if key not in NOT_SAID}
    try:
        return config_kind.from_dict(decode_floats(copy.deepcopy(fields)))
    except Exception as error:  # whatever its checks raise
        raise RegraftError(
            f"transformers cannot read this {config.get('model_type')} config "
            f"({first_line(error)}): fix it"
        ) from error


def find_model_class(family: str, config_kind: Any, config: Config) -> Any:
    """The class that a config names, else a decoder with its head, else the base model.

    RegraftError for models of several parts, naming the part that could be opened.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    refuse_several_parts(family, config_kind, config)
    named = find_class((config.get("architectures") or [""])[0])
    if named is not None and issubclass(config_kind, named.config_class or ()):
        refuse_other_inputs(family, named)
        return named
    autos: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel)
    for auto in autos:
        if config_kind in auto._model_mapping:
            kind = auto._model_mapping[config_kind]
            refuse_other_inputs(family, kind)
            return kind
    raise RegraftError(
        f"transformers has no model class for '{family}': name one in config.json's architectures"
    )


def refuse_other_inputs(family: str, kind: Any) -> None:
    """RegraftError for a class that reads something else than tokens, such as images."""
    name = getattr(kind, "main_input_name", "input_ids")
    if name != "input_ids":
        raise RegraftError(
            f"'{family}' reads {name}, and tables are inferred for models of text alone: give a "
            "type that has one, such as vit, dinov2, beit or audio-spectrogram-transformer"
        )


def refuse_several_parts(family: str, config_kind: Any, config: Config) -> None:
    """RegraftError for types that one stack of layers cannot hold, with what would work."""
    parts = dict(getattr(config_kind, "sub_configs", None) or {})
    text = parts.get("text_config")
    if text is not None or isinstance(config.get("text_config"), Mapping):
        name = (config.get("text_config") or {}).get("model_type") or getattr(
            text, "model_type", ""
        )
        raise RegraftError(
            f"'{family}' is a model of several parts: its language model is a "
            f"'{name or 'text model'}', whose module can be saved alone and opened"
        )
    if config.get("is_encoder_decoder", getattr(config_kind(), "is_encoder_decoder", False)):
        raise RegraftError(
            f"'{family}' has an encoder and a decoder: tables hold one stack of layers, give "
            "a decoder or an encoder"
        )


def find_lists(config_kind: Any, config: Config, stock: Any) -> dict[str, list[Any]]:
    """Lists of a config with one entry per layer, stated or derived by the class.

    Args:
        config_kind: class of the config.
        config: the mapping in a config.json.
        stock: the same as its class reads it.
    """
    depth = getattr(stock, "num_hidden_layers", None)
    if not isinstance(depth, int):
        return {}
    return {
        key: list(value)
        for key, value in vars(stock).items()
        if isinstance(value, list | tuple)
        and len(value) == depth
        and not key.startswith("_")
        and not (key.endswith("token_id") or key == "architectures")
    }


def find_running(model: TinyModel) -> TinyModel:
    """The model with the first of a few tiny configs that its class builds and runs.

    RegraftError, with what the class says, when none does.
    """
    reason = ""
    for changes in iter_changes(model):
        config = model.config | changes
        tried = TinyModel(
            model.family, model.kind, model.config_kind, model.full, config, model.aliases
        )
        try:
            check_is_tiny(tried)
            run(tried.build_random(), tried)
        except Exception as error:  # classes raise anything for sizes that do not go together
            reason = reason or first_line(error)
        else:
            return tried
    raise RegraftError(
        f"no tiny {model.kind.__name__} runs ({reason}), so that nothing can be inferred of "
        f"'{model.family}': only types with a table work there"
    )


def check_is_tiny(model: TinyModel) -> None:
    """RegraftError when sizes that no rule names make a model large: it is not built then."""
    count = sum(value.numel() for value in model.build(device="meta").parameters())
    if count > LARGEST:
        raise RegraftError(f"it has {count:,} parameters, the limit is {LARGEST:,}")


def iter_changes(model: TinyModel) -> Iterator[dict[str, Any]]:
    """Changes of a tiny config that classes with further demands on sizes may need."""
    heads, kv, dim = (model.key(kind) for kind in ("heads", "kv", "dim"))
    as_many: dict[str, Any] = {kv: HEADS} if kv else {}
    even: dict[str, Any] = {dim: 16} if dim and model.full.get(dim) is not None else {}
    wide: dict[str, Any] = {dim: 8} if dim and model.full.get(dim) is not None else {}
    yield {}
    yield as_many
    yield even
    yield as_many | even
    yield as_many | wide
    # Numbers of experts have no default in some classes.
    experts = {
        key: size
        for key, size in ((model.key("expert"), EXPERTS), (model.key("routed"), 2))
        if key and model.full.get(key) is None
    }
    for inner in find_inner_heads(model.config):
        yield inner
        yield inner | as_many
    yield experts
    yield experts | as_many
    yield experts | as_many | wide
    # Numbers that no rule names keep their values.
    named = {key for key in model.full if key in (heads, kv, dim)}
    unnamed = {
        key: value
        for key, value in model.full.items()
        if isinstance(value, int)
        and key not in named
        and not any(model.key(kind) == key for kind in ("hidden", "depth", "ffn", "vocab", "pos"))
        and value <= 256
    }
    yield unnamed
    yield unnamed | as_many | even
    filled = fill_sizes(model.full, model.aliases)
    yield filled
    yield filled | as_many | even


def run(model: Any, tiny: TinyModel) -> Tensor:
    """What a model gives: logits, or the last hidden states; (rows, length, size)."""
    import torch

    with torch.no_grad():
        found = model(**tiny.inputs, use_cache=False)
    for name in ("logits", "last_hidden_state"):
        value = found.get(name)
        if torch.is_tensor(value):
            return value.float()
    raise RegraftError(f"{tiny.kind.__name__} gives no logits: only types with a table work there")
