"""Linearized models: a stock decoder's own classes with mixers in the attention slots."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, get_layer_types_and_kwargs
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import ModelOutput

from ..core.auto_map import TEXT_CONFIG
from ..core.shapes import Float, Int
from ..errors import RegraftError
from ..mixers.attention import Attention
from ..mixers.int8 import FEW as FEW_INT8_ROWS
from ..mixers.int8 import Int8Linear
from ..mixers.older_names import OLDER_NAMES
from .cache import cache_kwargs
from .configuration_regraft import RegraftConfig
from .mixer_slot import (
    MixerSlot,
    RowLayout,
    check_cache_reached,
    hand_positions,
    hand_rows,
    lay_out_rows,
    name_arguments,
    passes_keywords,
)

FEW_ROWS = 2
# Arguments of `from_pretrained` that are keys of a config too.
OF_THE_MODEL = ("dtype", "torch_dtype", "quantization_config")


class RegraftPreTrainedModel(PreTrainedModel):
    """What the models below share: they are a host's own class with mixers in its slots.

    `RegraftForCausalLM(config)` is an instance of a class that is made for the host, a subclass of
    both `RegraftForCausalLM` and, say, `LlamaForCausalLM`: modules, names of weights, heads and
    what transformers supports are the host's.
    """

    config_class = RegraftConfig
    # States are replaced, not written in place, as graphs of a whole step need them to be.
    _can_compile_fullgraph = False

    # The auto class that finds the host's class.
    host_auto_class: ClassVar[Any] = None
    # In a class that is made for a host, the name of the one below that it is made of.
    front: ClassVar[str] = ""

    def __new__(cls, config: RegraftConfig, *args: Any, **kwargs: Any) -> Any:
        """An instance of the class for the config's host."""
        return super().__new__(find_class(cls, str(config.host)))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """See transformers' `PreTrainedModel.from_pretrained`."""
        path = pretrained_model_name_or_path
        kwargs.pop("trust_remote_code", None)  # this is that code
        if cls.front:
            given = kwargs.pop("key_mapping", None) or {}
            found = super().from_pretrained(
                path,
                *args,
                config=config,
                key_mapping=OLDER_NAMES | given,
                trust_remote_code=False,
                **kwargs,
            )
            # Names of earlier versions are not written again when the model is saved.
            model = found[0] if isinstance(found, tuple) else found
            model._weight_conversions = [
                change
                for change in model._weight_conversions
                if change.source_patterns[0] not in OLDER_NAMES
            ]
            return found
        if not isinstance(config, PreTrainedConfig):
            # What the model's own loading decides; a config would take it for one of its keys.
            held = {key: kwargs.pop(key) for key in OF_THE_MODEL if key in kwargs}
            config, kwargs = RegraftConfig.from_pretrained(
                config or path, return_unused_kwargs=True, trust_remote_code=False, **kwargs
            )
            kwargs.pop("trust_remote_code", None)
            kwargs |= held
        kind = find_class(cls, str(config.host))
        return kind.from_pretrained(path, *args, config=config, trust_remote_code=False, **kwargs)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As a stock class: custom code's modules without parameters of their own are passed over,
        # and some hosts fill buffers of their layers there.
        super()._initialize_weights(module)

    @classmethod
    def _from_config(cls, config: RegraftConfig, **kwargs: Any) -> Any:
        if cls.front:
            return super()._from_config(config, **kwargs)
        return find_class(cls, str(config.host))._from_config(config, **kwargs)

    def __reduce__(self) -> Any:
        """How to copy and pickle: the class is found again by its host."""
        return rebuild, (type(self).front, self.config.host), self.__dict__

    def prepare_decoding(self, rows: int = 1) -> None:
        """Store the weights as steps of one token read them fastest on a processor.

        Parameters stay the same objects with the same values, in another order in memory: (inputs,
        outputs), and what reads one input in one matrix. Saving the model undoes it. Does nothing
        on an accelerator or for many rows, where products are no faster.

        Args:
            rows: that will be decoded together.
        """
        int8 = any(isinstance(module, Int8Linear) for module in self.modules())
        if self.device.type != "cpu" or rows > (FEW_INT8_ROWS if int8 else FEW_ROWS):
            return
        packed: set[nn.Module] = set()
        for slot in self.slots():
            if isinstance(slot, MixerSlot):
                slot.mixer.pack()
                packed.update(slot.mixer.input_layers() if slot.mixer.packed else ())
        for module in self.modules():
            wide = isinstance(module, nn.Linear) and module.out_features >= module.in_features
            if wide and module not in packed:
                module.weight.data = module.weight.data.t().contiguous().t()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `PreTrainedModel.save_pretrained`."""
        for slot in self.slots():
            if isinstance(slot, MixerSlot):
                slot.mixer.packed = None
        for parameter in self.parameters():
            parameter.data = parameter.data.contiguous()
        return super().save_pretrained(*args, **kwargs)

    def backbone(self) -> Any:
        """The module that has the layers with mixers."""
        return self.base_model

    def slots(self) -> list[nn.Module]:
        """The attention slot of every layer, in order; an `nn.Identity` for a layer without."""
        backbone = self.backbone()
        return [
            find_submodule(backbone, name_in_backbone(backbone, i))
            for i in range(backbone.config.num_hidden_layers)
        ]

    def mixer_slots(self) -> list[nn.Module]:
        """The slots that hold mixers, but for those of layers that are left out."""
        return [module for module in self.backbone().modules() if isinstance(module, MixerSlot)]


class RegraftModel(RegraftPreTrainedModel):
    """The backbone: the host's, with mixers in the slots that `config.mixers` names.

    Left and right padding are read from `attention_mask` (batch, time), packed documents from
    `position_ids` that restart, without a mask or cache. The decoding state is in a
    `DynamicCache(config=model.config)`. Layers that keep softmax attention run it in the ways that
    the host's class supports.
    """

    host_auto_class = AutoModel
    # Positions of the call, from a head that does not pass them on.
    handed_positions: Tensor | None = None
    # Whether a slot has to be told of padding and documents, since its host passes nothing on.
    hands_rows = False

    def __init__(self, config: RegraftConfig, *args: Any, **kwargs: Any):
        config.fit_layers()
        super().__init__(config, *args, **kwargs)
        # Whether layers have a state beside their attention, which padding must not enter.
        self.has_states_beside = "hybrid" in get_layer_types_and_kwargs(config)[0]
        put_mixers(self)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Int[Tensor, "rows time"] | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time hidden"] | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        rows: RowLayout | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """The host's output, with last_hidden_state (batch, time, hidden).

        Args:
            input_ids: tokens; or `inputs_embeds` in their place.
            attention_mask: (batch, time), 1 where a token counts, the cache's tokens included.
            position_ids: positions; where they restart, a new document begins.
            cache: a `DynamicCache(config=model.config)`.
            inputs_embeds: embedded tokens.
            use_cache: whether to return a cache; the config's value when left out.
            past_key_values: the older name of `cache`.
            rows: padding and documents; None: what the mask and the positions say.
            kwargs: passed on to the host.

        Raises RegraftError without an input, for two different caches, for a mask that is not 2-D,
        and for a cache of another model.
        """
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", False)
        if cache is not None and past_key_values is not None and cache is not past_key_values:
            kinds = type(cache).__name__, type(past_key_values).__name__
            raise RegraftError(
                f"cache ({kinds[0]}) and past_key_values ({kinds[1]}) are two names of one thing: "
                "pass one of them"
            )
        cache = past_key_values if cache is None else cache
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise RegraftError(
                f"input_ids is {input_ids} and inputs_embeds is {inputs_embeds}: pass one of them"
            )

        if self.handed_positions is not None:
            position_ids, self.handed_positions = self.handed_positions, None
        rows = rows or lay_out_rows(tokens.shape[1], attention_mask, position_ids, cache)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and position_ids is None:
            # Padding takes no position, as `generate` has it.
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            position_ids = position_ids[:, -tokens.shape[1] :]
        # Nothing goes on from several documents at once, nor from layers that run twice.
        checkpoints = getattr(self, "gradient_checkpointing", False) and self.training
        if rows.segments is not None or checkpoints:
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if all(self.config.mixers) and not self.has_states_beside:
            attention_mask = None  # no softmax layer is left that reads it

        # Most hosts pass `rows` through to every slot with their other keyword arguments.
        with hand_rows(self.mixer_slots() if self.hands_rows else (), rows):
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                rows=rows,
                **cache_kwargs(cache),
                **kwargs,
            )
        if use_cache and cache is not None:
            check_cache_reached(cache, tokens.shape[1])
        return output


class RegraftWithHead(RegraftPreTrainedModel):
    """A host's class with a head, whose backbone is a `RegraftModel`."""

    def __init__(self, config: RegraftConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # The host's class has made its own backbone. It goes before the one that knows mixers
        # comes, since there may be no memory for both.
        stock = self.backbone()
        name = next(name for name, module in self.named_modules() if module is stock)
        del stock
        self.set_submodule(name, nn.Identity())
        decoder = config.build_decoder_config()
        self.set_submodule(name, find_class(RegraftModel, str(decoder.host))(decoder))
        if "." not in name and f"self.{name}(" not in inspect.getsource(type(self).forward):
            # The head calls a part of the backbone, as OPT's does, and not the backbone.
            self.register_forward_pre_hook(tell_rows, with_kwargs=True)
            self.register_forward_hook(forget_rows)
        known = inspect.signature(self.forward).parameters
        passes = "." in name or passes_keywords(type(self).forward, name)
        if "position_ids" not in known and not passes:
            self.register_forward_pre_hook(hand_positions, with_kwargs=True)
        self.post_init()

    def backbone(self) -> Any:
        """The module that has the layers with mixers."""
        if self.base_model is not self:
            return self.base_model
        # The class says another name than its backbone has, as Llama 4's does.
        return next(part for part in self.children() if isinstance(part, PreTrainedModel))


def tell_rows(model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Tell the slots of a model of padding and documents, before its head calls their layers."""
    tokens = given[0] if given else named.get("input_ids")
    tokens = named["inputs_embeds"] if tokens is None else tokens
    caches = (named.get(name) for name in ("cache", "past_key_values"))
    cache = next((one for one in caches if one is not None), None)
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    rows = lay_out_rows(tokens.shape[1], mask, positions, cache)
    for slot in model.backbone().mixer_slots():
        slot.rows = rows


def forget_rows(model: Any, given: Any, output: Any) -> None:
    """The end of a call that began with `tell_rows`."""
    for slot in model.backbone().mixer_slots():
        slot.rows = None


class RegraftForCausalLM(RegraftWithHead, GenerationMixin):
    """A causal language model: `RegraftModel` and the host's head."""

    host_auto_class = AutoModelForCausalLM

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """See transformers' `ContinuousMixin`; `generate_batch` comes here too.

        Raises RegraftError for a model with mixers.
        """
        converted = [layer for layer, spec in enumerate(self.config.mixers) if spec]
        if converted:
            # Its forward gets pages of keys and values, not which tokens are of which request.
            raise RegraftError(
                f"layers {converted} hold mixers, whose states continuous batching has no place "
                "for: use generate() with a padded batch"
            )
        return super().init_continuous_batching(*args, **kwargs)


class RegraftForImageTextToText(RegraftForCausalLM):
    """A model of several parts: its language model is a `RegraftModel`, the rest the host's."""

    host_auto_class = AutoModelForImageTextToText

    def backbone(self) -> Any:
        """The language model."""
        return self.get_decoder()


class RegraftForSequenceClassification(RegraftWithHead):
    """A classifier of texts: `RegraftModel` and the host's head."""

    host_auto_class = AutoModelForSequenceClassification


class RegraftForTokenClassification(RegraftWithHead):
    """A classifier of tokens: `RegraftModel` and the host's head."""

    host_auto_class = AutoModelForTokenClassification


FRONTS = {
    kind.__name__: kind
    for kind in (
        RegraftModel,
        RegraftForCausalLM,
        RegraftForImageTextToText,
        RegraftForSequenceClassification,
        RegraftForTokenClassification,
    )
}
WRAPPERS = (RegraftForImageTextToText,)  # those that are made of a host with several parts
# By the config's class, of which every copy of this code has its own: some heads of hosts build
# their backbone by `AutoModel`.
for front in FRONTS.values():
    front.host_auto_class.register(RegraftConfig, front, exist_ok=True)


def find_class(kind: Any, host: str) -> Any:
    """The class of `kind`, one of FRONTS, for a host; `kind` itself when it is made for one.

    Raises RegraftError when transformers has no such class for the host.
    """
    return kind if kind.front else make_class(kind.__name__, host)


@functools.cache
def make_class(front: str, host: str) -> Any:
    """The subclass of FRONTS[front] and of the host's own class, the same one for every call."""
    kind, host_config = FRONTS[front], CONFIG_MAPPING[host]
    mapping = kind.host_auto_class._model_mapping
    has_parts, takes_parts = TEXT_CONFIG in host_config.sub_configs, kind in WRAPPERS
    if host_config not in mapping or has_parts != takes_parts:
        other = WRAPPERS[0] if has_parts else RegraftModel
        raise RegraftError(
            f"transformers has no {front.removeprefix('Regraft')} of a {host}: use {other.__name__}"
        )

    stock = mapping[host_config]
    name = f"Regraft{stock.__name__}"
    # Where the host's files have other tensors than its modules, so have those of a linearized one.
    conversion = get_checkpoint_conversion_mapping(stock.__name__)
    conversion = conversion or get_checkpoint_conversion_mapping(host)
    if conversion is not None:
        register_checkpoint_conversion_mapping(name, conversion, overwrite=True)
    fields = {"__module__": __name__, "__doc__": kind.__doc__, "front": front}
    return type(name, (kind, stock), {**fields, "config_class": RegraftConfig})


def rebuild(front: str, host: str) -> Any:
    """An instance without content, for copies and pickles."""
    return nn.Module.__new__(make_class(front, host))


def name_in_backbone(backbone: Any, layer: int) -> str:
    """The name of a layer's attention module inside the backbone."""
    first, _, rest = backbone.config.slot.format(layer).partition(".")
    # Some classes have another name for their backbone in files; in a wrapper it lies deeper.
    while first == backbone.base_model_prefix or not hasattr(backbone, first):
        first, _, rest = rest.partition(".")
    return f"{first}.{rest}"


def find_submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by its name; an `nn.Identity` where there is none, as in layers of other kinds."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return nn.Identity()


def put_mixers(backbone: Any) -> None:
    """Replace the attention of converted layers by mixers."""
    config = backbone.config
    for layer, (spec, attention) in enumerate(zip(config.mixers, config.attention, strict=True)):
        if spec is not None:
            name = name_in_backbone(backbone, layer)
            stock = backbone.get_submodule(name)
            parent = backbone.get_submodule(name.rpartition(".")[0])
            # Layers in a module of their own, as OPT's, may get nothing from the model around it.
            direct = isinstance(backbone.get_submodule(name.partition(".")[0]), nn.ModuleList)
            told = direct and passes_keywords(type(parent).forward, name.rpartition(".")[2])
            backbone.hands_rows = backbone.hands_rows or not told
            names, tables = name_arguments(stock), getattr(stock, "rotary_emb", None)
            slot = MixerSlot(spec, Attention(**attention), layer, names, told, tables)
            backbone.set_submodule(name, slot)
