"""A runnable model from a directory, a GGUF file or an open checkpoint, and its attention slots."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..core.anatomy import Anatomy, find_anatomy
from ..core.checkpoint import Checkpoint
from ..core.model_files import check_model_files, check_tokenizer_config, find_tokenizer_code
from ..errors import RegraftError
from ..families.multimodal.two_towers import TwoTowerAnatomy
from ..io.files import read_json
from ..io.finite import cast_finite
from ..io.identity import TOKENIZER
from ..mixers.gated import GatedMixer
from .meta import explain_model_errors, model_class, silence_transformers, stock_class
from .modeling_regraft import RegraftForCausalLM, find_submodule
from .quantize import quantize_linears
from .stock import load_stock

# Of weights of a model that is run.
DECODING_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
# What models with an encoder in front of a decoder read (`Anatomy.inputs`).
PAIRED = ("token pairs", "audio")


def materialize(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a checkpoint, in eval mode, without writing it to disk.

    For checkpoints that a step made. Stock families come as the class that the config's
    `architectures` names, with the weights that the family's table finds; what a directory on disk
    is to transformers, `load` and `load_stored` say.

    Args:
        checkpoint: as opened, or as a step made it.
        dtype: of the weights.

    Raises RegraftError when the model needs a tensor that the checkpoint does not have, or the
    other way round.
    """
    values = {
        checkpoint.names[key]: cast_finite(lazy.read(), dtype, checkpoint.names[key]).contiguous()
        for key, lazy in checkpoint.tensors.items()
    }
    kind, config = model_class(checkpoint.config)
    with explain_model_errors(checkpoint.origin):
        model, lost = build_with_weights(kind, config, values, dtype)
    if lost:
        raise RegraftError(
            f"'{checkpoint.path}' does not fit its model: parameter '{sorted(lost)[0]}' has no "
            "counterpart"
        )
    return model.to(dtype).eval()


def build_with_weights(
    kind: Any, config: Any, values: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Any, set[str]]:
    """(model, names without a counterpart).

    transformers renames and fuses weights where its classes differ from the files, those of a
    linearized model's host included.

    Args:
        kind: the class, as `model_class` finds it.
        config: of transformers.
        values: weights by their names in files.
        dtype: of the weights.
    """
    # A wrong shape is then listed in `mismatched_keys` instead of raised.
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    with silence_transformers():
        model, info = kind.from_pretrained(
            None,
            state_dict=dict(values),
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    return model, set(info["missing_keys"]) | set(info["unexpected_keys"]) | mismatched


def build_random_model(config: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A new float32 model with transformers' own random initialisation, in eval mode.

    Args:
        config: of a stock family, the mapping in a config.json.
        seed: the same one gives the same weights; PyTorch's global random state does not change.
    """
    kind, stock_config = stock_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind(stock_config)
    model.config.architectures = [kind.__name__]
    return model.float().eval()


def to_checkpoint_names(
    model: PreTrainedModel, values: Mapping[str, Tensor], anatomy: Anatomy | None = None
) -> dict[str, Tensor]:
    """Tensors by parameter name of a model -> the same by their names in its checkpoint.

    Args:
        model: that has the parameters.
        values: the tensors.
        anatomy: of the checkpoint; None: the one of the model's own config.
    """
    config = model.config.to_dict()
    anatomy = anatomy or find_anatomy(config)
    # Mixers have one name everywhere: what a class's files call its own layers is not for them.
    placed = anatomy.place(config) if isinstance(model, RegraftForCausalLM) else {}
    mixers = {part.name for (role, _), part in placed.items() if role.startswith("mixer.")}
    own = {name: value for name, value in values.items() if anatomy.canonical_name(name) in mixers}
    rest = {name: value for name, value in values.items() if name not in own}
    return {
        anatomy.canonical_name(name): value
        for name, value in (own | revert_weight_conversion(model, rest)).items()
    }


def from_checkpoint_names(
    model: PreTrainedModel, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The inverse of `to_checkpoint_names`; parameters that `values` lack are left out."""
    # transformers converts names this way only while it loads: the values go into a twin model.
    twin, lost = build_with_weights(type(model), copy.deepcopy(model.config), values, torch.float32)
    return {name: parameter.data for name, parameter in twin.named_parameters() if name not in lost}


def random_inputs(
    checkpoint: Checkpoint, rows: int = 1, length: int = 96, seed: int = 0
) -> dict[str, Tensor]:
    """Random arguments for a model's forward pass.

    Args:
        checkpoint: of the model.
        rows: batch size.
        length: tokens per row, of an encoder and of a decoder each; images and audio have the size
            in the config.
        seed: of the random numbers.

    Returns:
        `input_ids` (rows, length), with an encoder in front of a decoder `decoder_input_ids` too;
        `pixel_values` (rows, channels, height, width); `input_values` (rows, frames, mel bins);
        or `input_features` (rows, mel bins, frames) and `decoder_input_ids`.
    """
    generator = torch.Generator().manual_seed(seed)
    full = checkpoint.anatomy.fill_defaults(checkpoint.config)
    if checkpoint.anatomy.inputs == "spectrogram":
        shape = (rows, full["max_length"], full["num_mel_bins"])
        return {"input_values": torch.randn(*shape, generator=generator)}
    if checkpoint.anatomy.inputs in ("pixels", "masked pixels"):
        return draw_pixels(checkpoint, rows, generator)

    vocab = checkpoint.sizes["vocab"]
    ids = torch.randint(0, vocab, (rows, length), generator=generator)
    if checkpoint.anatomy.inputs == "texts and images":
        return {"input_ids": ids, **draw_pixels(checkpoint, rows, generator)}
    if checkpoint.anatomy.inputs not in PAIRED:
        return {"input_ids": ids}
    return draw_encoder_inputs(checkpoint, ids, generator) | {"decoder_input_ids": ids}


def draw_pixels(checkpoint: Checkpoint, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random images; of models that see some patches alone also `noise`, which says which.

    Args:
        checkpoint: of the model.
        rows: how many.
        generator: of random numbers.
    """
    anatomy, config = checkpoint.anatomy, checkpoint.config
    if isinstance(anatomy, TwoTowerAnatomy):
        config = anatomy.tower_config(config, "vision")
        anatomy = anatomy.towers["vision"]
    size, channels = anatomy.fill_defaults(config)["image_size"], anatomy.solve(config)["channel"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixels = {"pixel_values": torch.randn(rows, channels, height, width, generator=generator)}
    if anatomy.inputs == "pixels":
        return pixels
    return pixels | {"noise": torch.rand(rows, checkpoint.sizes["pos"] - 1, generator=generator)}


def draw_encoder_inputs(
    checkpoint: Checkpoint, ids: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """What the encoder in front of a decoder reads: other tokens, or random audio.

    Args:
        checkpoint: of the model.
        ids: the decoder's row (rows, length), of which the encoder gets the same tokens in another
            order.
        generator: of random numbers.
    """
    if checkpoint.anatomy.inputs == "audio":
        shape = (len(ids), checkpoint.sizes["mel"], 2 * checkpoint.sizes["place"])
        return {"input_features": torch.randn(*shape, generator=generator)}
    order = torch.randperm(ids.shape[1], generator=generator)
    return {"input_ids": ids[:, order]}


def load(
    path: str | Path, dtype: torch.dtype = torch.float32, allow_nonfinite: bool = False
) -> PreTrainedModel:
    """The model at a path, in eval mode; a stock one as transformers' `from_pretrained` reads it.

    Args:
        path: a directory of a supported family or of a linearized model, or a GGUF file.
        dtype: of the weights; `torch.int8` for decoding on a processor, see `quantize_linears`.
        allow_nonfinite: take NaN and infinity.

    Raises RegraftError when the path is no model, or its files do not fit its config.
    """
    checkpoint = Checkpoint.open(path, allow_nonfinite)
    checkpoint.verify()
    return load_stored(checkpoint, dtype)


def load_stored(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in the files of a checkpoint, as of `load`.

    Args:
        checkpoint: as opened: no step has changed it.
        dtype: as of `load`.
    """
    # First: transformers' own reader of it has no words for what is wrong.
    file = Path(checkpoint.path) / "generation_config.json"
    generation = read_generation_config(file) if file.exists() else None
    # transformers would need the packages and devices of a quantisation.
    in_memory = checkpoint.config["model_type"] == "regraft" or checkpoint.is_computed
    stored = torch.float32 if dtype == torch.int8 else dtype
    model = materialize(checkpoint, stored) if in_memory else load_stock(checkpoint, stored)
    if generation is not None:
        model.generation_config = generation
    if dtype == torch.int8:
        quantize_linears(model)
    return model


def parse_decoding_dtype(name: str) -> torch.dtype:
    """The dtype of a model that is loaded to be run; RegraftError for other names."""
    if name not in DECODING_DTYPES:
        raise RegraftError(f"--dtype {name:.40}: use one of {', '.join(DECODING_DTYPES)}")
    return DECODING_DTYPES[name]


def read_generation_config(file: Path) -> GenerationConfig:
    """A generation_config.json; RegraftError when transformers cannot use it."""
    read_json(file)
    try:
        return GenerationConfig.from_pretrained(file.parent)
    except Exception as error:  # whatever its checks raise
        raise RegraftError(
            f"'{file}' is no generation config ({format_first_line(error)}): fetch it again or "
            "remove it"
        ) from error


def check_decoder(*paths: str | Path | None) -> None:
    """Raise RegraftError when a model does not read text from left to right.

    Args:
        paths: of models; None stands for no model.
    """
    for path in paths:
        checkpoint = Checkpoint.open(path) if path else None
        if checkpoint and not checkpoint.anatomy.continues_text(checkpoint.config):
            anatomy = checkpoint.anatomy
            name = checkpoint.config["architectures"][0] if anatomy.causal else anatomy.family
            raise RegraftError(
                f"'{path}' is a {name}, which does not continue text: give a decoder"
            )


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's directory; see `read_tokenizer`."""
    return read_tokenizer(Checkpoint.open(path).path, trust_remote_code)


def bos_token_id(tokenizer: Any) -> int:
    """The token that texts begin with; RegraftError where the tokenizer has none."""
    if tokenizer.bos_token_id is None:
        raise RegraftError(
            f"texts were to begin with a BOS token, but {type(tokenizer).__name__} has none: set "
            "bos_token in tokenizer_config.json, or leave out --bos"
        )
    return int(tokenizer.bos_token_id)


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a directory.

    Args:
        folder: the directory.
        trust_remote_code: whether Python files that lie there may be run.

    RegraftError when there is none, it is damaged, reads files elsewhere, needs code of its own
    that is not trusted, or names code that lies elsewhere.
    """
    check_model_files(folder)
    check_tokenizer_config(folder)
    code = find_tokenizer_code(folder)
    # transformers writes code of another repository as REPOSITORY--FILE.CLASS and would fetch it.
    if trust_remote_code and "--" in code:
        raise RegraftError(
            f"the tokenizer in '{folder}' names code of another repository ({code:.80}), which is "
            "never fetched: put the file into the directory and its name into auto_map"
        )
    # Without any file, transformers makes a tokenizer that knows no words.
    if not any(file for pattern in TOKENIZER for file in folder.glob(pattern)):
        raise RegraftError(f"no tokenizer in '{folder}': put tokenizer.json there")
    try:
        # Trust is for the tokenizer: of its own, transformers would read config.json by the model's
        # code too.
        config = None
        if trust_remote_code:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        # Without a value, transformers asks on standard input whether it may run code.
        return AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # whatever its readers, or its own code, raise
        if code and "trust_remote_code" in str(error):
            raise RegraftError(
                f"the tokenizer in '{folder}' needs code of its own ({code:.80}), which is not "
                "run: read it and give --trust-remote-code, or save the tokenizer as "
                "tokenizer.json with a stock class first"
            ) from error
        raise RegraftError(
            f"no tokenizer in '{folder}': put tokenizer.json there ({format_first_line(error)})"
        ) from error


def format_first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def slots(model: PreTrainedModel, checkpoint: Checkpoint | None = None) -> list[nn.Module]:
    """The attention module of every layer, in order; an `nn.Identity` for a layer without one.

    Args:
        model: linearized or stock.
        checkpoint: of a stock model, whose anatomy names its modules.

    Raises RegraftError for a stock model without a checkpoint.
    """
    if isinstance(model, RegraftForCausalLM):
        return model.slots()
    if checkpoint is None:
        raise RegraftError(
            f"slots of a {type(model).__name__} are named by its anatomy: pass the checkpoint too"
        )
    slot = checkpoint.anatomy.slot
    return [find_submodule(model, slot.format(i)) for i in range(checkpoint.layers)]


@contextmanager
def force_branch(model: nn.Module, name: str | None) -> Iterator[None]:
    """Inside, every gated mixer gives one branch alone.

    Args:
        model: linearized.
        name: `window` or `linear`; None leaves the gates alone.

    Raises RegraftError for any other name.
    """
    if name not in (None, "window", "linear"):
        raise RegraftError(f"a gated mixer has no branch '{name}': use window, linear or None")
    gated = [module for module in model.modules() if isinstance(module, GatedMixer)]
    for module in gated:
        module.force = name
    try:
        yield
    finally:
        for module in gated:
            module.force = None
