"""What all arms of a comparison share: data, tokenizer, sources before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .. import modeling
from ..core.anatomy import find_anatomy
from ..core.checkpoint import Checkpoint
from ..data import default_text
from ..data.files import find_files
from ..data.images import Images, read_images
from ..data.packing import pack, read_documents
from ..data.text import Text
from ..errors import RegraftError
from ..growth.sizes import solve_sizes
from ..io.identity import identify_files, identify_model
from ..io.request import Identity
from ..train.objectives import HEADS, Data, Rows
from ..train.output import WORK
from ..train.session import training_rows
from .recipe import Comparison, TargetSizes

END, MASK = "<|end|>", "[MASK]"
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", MASK)
# Where no held-out data is given, one document in so many is held out, and one image in so many.
HELD_OUT_EVERY = 20
IMAGE_HELD_OUT_EVERY = 5
AUTO = {
    "next": transformers.AutoModelForCausalLM,
    "mask": transformers.AutoModelForMaskedLM,
    "image": transformers.AutoModelForImageClassification,
}


def prepare_data(recipe: Comparison, out: Path) -> None:
    """Make what is missing of OUT/data and OUT/tokenizer, and OUT/blank: sources before training.

    RegraftError for data of the wrong kind.
    """
    if recipe.task == "image":
        write_images(recipe, out / "data")
    else:
        write_text(recipe, out / "data")

    # A source that was given as a directory brings its own tokenizer.
    needs_tokenizer = recipe.task != "image" and isinstance(recipe.source, dict)
    if needs_tokenizer and not (out / "tokenizer").is_dir():
        documents = read_documents(out / "data" / "train.jsonl")
        tokenizer = train_tokenizer(documents, recipe.vocabulary, recipe.task == "mask")
        part = out / WORK / "tokenizer"
        tokenizer.save_pretrained(part)
        part.rename(out / "tokenizer")
        part.parent.rmdir()

    for name, source in recipe.sources().items():
        if isinstance(source, dict):
            make_source(recipe, source, out, 0).save_pretrained(out / "blank" / name)


def identify_inputs(recipe: Comparison) -> dict[str, Identity]:
    """The identities of sources that are directories, and of the data."""
    inputs = {
        f"source '{name}'": identify_model(source)
        for name, source in recipe.sources().items()
        if isinstance(source, str)
    }
    for name, path in (("data", recipe.data), ("heldout", recipe.heldout)):
        if path:
            files = [Path(path)] if recipe.task == "image" else find_files(path)
            inputs[name] = identify_files(files)
    return inputs


def write_text(recipe: Comparison, folder: Path) -> None:
    """Write train.jsonl and heldout.jsonl, unless they are there."""
    # heldout.jsonl is written last: where it is, both are.
    if (folder / "heldout.jsonl").exists():
        return

    if recipe.data:
        train = read_documents(recipe.data)
    else:
        train = [*default_text.documentation(), *default_text.docstrings()]

    if recipe.heldout:
        heldout = read_documents(recipe.heldout)
    elif recipe.data:
        train, heldout = split_held_out(train)
    else:
        heldout = default_text.heldout_topics()

    default_text.write_jsonl(train, folder / "train.jsonl")
    default_text.write_jsonl(heldout, folder / "heldout.jsonl")


def split_held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out) documents; of a single one the end is held out.

    A text that stands among the held-out ones is not trained on, however often it occurs.
    """
    if len(documents) == 1:
        cut = len(documents[0]) * (HELD_OUT_EVERY - 1) // HELD_OUT_EVERY
        return [documents[0][:cut]], [documents[0][cut:]]
    heldout = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or documents[-1:]
    return [document for document in documents if document not in set(heldout)], heldout


def write_images(recipe: Comparison, folder: Path) -> None:
    """Write train.npz and heldout.npz, unless they are there."""
    # heldout.npz is written last: where it is, both are.
    if (folder / "heldout.npz").exists():
        return

    if recipe.data:
        images = read_images(recipe.data)
    else:
        images = Images(*map(torch.from_numpy, load_digit_images()))

    if recipe.heldout:
        parts = {"train": images, "heldout": read_images(recipe.heldout)}
    else:
        order = np.random.default_rng(0).permutation(len(images))
        count = max(1, len(images) // IMAGE_HELD_OUT_EVERY)
        train, heldout = images[order[count:]], images[order[:count]]
        # Shifted only after the split: no shifted copy of a held-out image is trained on.
        parts = {
            "train": train if recipe.data else augment_by_shifts(train),
            "heldout": heldout,
        }

    folder.mkdir(parents=True, exist_ok=True)
    for name, images in parts.items():
        part = folder / f"{name}.part.npz"
        np.savez(part, pixel_values=images.pixel_values.numpy(), labels=images.labels.numpy())
        part.replace(folder / f"{name}.npz")


def augment_by_shifts(images: Images) -> Images:
    """Images, and the same moved by a pixel in each of eight directions.

    The row or column that comes in repeats the old edge. A model learns a few thousand digits by
    heart, and then a larger one is worse; nine times as many keep the comparison meaningful.
    """
    # One pixel more on every side; the nine windows of the old size are the shifts.
    padded = torch.nn.functional.pad(images.pixel_values, (1, 1, 1, 1), mode="replicate")
    height, width = images.pixel_values.shape[-2:]
    moved = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return Images(torch.cat(moved), images.labels.repeat(len(moved)))


def load_digit_images() -> tuple[Any, Any]:
    """scikit-learn's handwritten digits, (1797, 1, 8, 8), and their classes.

    Pixels have mean 0 and deviation 1. RegraftError when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise RegraftError(
            f"the digits need {error.name}, which is not installed: "
            "pip install 'regraft[compare]', or give data"
        ) from error
    digits = load_digits()
    pixels = digits.images.astype(np.float32)[:, None]
    return (pixels - pixels.mean()) / pixels.std(), digits.target.astype(np.int64)


def train_tokenizer(documents: list[str], size: int, masks: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned on documents.

    RegraftError when `size` does not even hold all bytes.

    Args:
        documents: the text.
        size: tokens, special ones included.
        masks: whether it has BERT's special tokens beside the end of a document.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [*BERT, END] if masks else [END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(special):
        raise RegraftError(
            f"vocabulary {size} does not hold all bytes: "
            f"give {len(alphabet) + len(special)} or more"
        )

    # With all bytes in the alphabet no text has an unknown token, held-out text included.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)

    names = {"eos_token": END}
    if masks:
        names |= {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "mask_token": MASK,
        }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_source(
    recipe: Comparison, config: dict[str, Any], out: Path, seed: int
) -> PreTrainedModel:
    """An untrained source of a config, with the vocabulary and class of the task.

    RegraftError when the config names no model type, or one that does not do the task.

    Args:
        recipe: the comparison.
        config: a transformers config as the recipe has it.
        out: the comparison's folder, which holds the tokenizer.
        seed: of the weights.
    """
    config = dict(config)
    if "model_type" not in config:
        raise RegraftError(
            f"source {config} names no model_type: "
            "give a transformers config with its model_type, or a directory"
        )

    if recipe.task != "image":
        tokenizer = modeling.read_tokenizer(out / "tokenizer")
        config |= {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }

    # transformers' own table says whether the model type has a class with the task's head.
    config_class = type(modeling.build_stock_config(config))
    model_classes = AUTO[recipe.task]._model_mapping
    if config_class not in model_classes:
        raise RegraftError(
            f"a {config['model_type']} does not do task '{recipe.task}': "
            "give another source or task"
        )
    config.setdefault("architectures", [model_classes[config_class].__name__])
    return modeling.build_random_model(config, seed)


def target_config(source: Checkpoint, target: TargetSizes) -> dict[str, Any]:
    """The config of the target as one who starts from scratch writes it.

    Args:
        source: whose config is resized.
        target: its sizes; the source's where they are open.
    """
    layers = target.layers or source.layers
    axes, _ = solve_sizes(source, target)
    # Settings by layer (`layer_types`) go on as the source's last layer has them.
    order = [min(i, source.layers - 1) for i in range(layers)]
    return source.anatomy.resize_config(source.config, {**axes, "depth": layers}, order)


def open_untrained_source(recipe: Comparison, out: Path, name: str) -> Checkpoint:
    """A source's checkpoint before any training, to see what grows."""
    source = recipe.sources()[name]
    return Checkpoint.open(source if isinstance(source, str) else out / "blank" / name)


def check_task(recipe: Comparison, source: Checkpoint) -> None:
    """RegraftError when a model does not do the comparison's task."""
    name = (source.config.get("architectures") or ["a model"])[0]
    if name not in HEADS[recipe.task][1]:
        raise RegraftError(
            f"'{source.origin}' is {name}, which does not do task '{recipe.task}': "
            "give another source"
        )
    if recipe.task != "image" and find_anatomy(source.config).inputs != "tokens":
        raise RegraftError(f"'{source.origin}' is {name}, which reads no text: give task image")


def load_training_rows(recipe: Comparison, out: Path) -> Callable[[int], Data]:
    """A function from row length in tokens to the training rows; images have no length."""
    if recipe.task == "image":
        return lambda length: read_images(out / "data" / "train.npz")
    text = Text(str(out / "data" / "train.jsonl"), max_tokens=0)
    return training_rows([text], load_tokenizer(recipe, out), cache=out / "data" / "tokens")


def load_heldout_rows(recipe: Comparison, out: Path) -> Rows:
    """At most `recipe.rows` held-out rows, spread evenly over the held-out data."""
    if recipe.task == "image":
        rows: Rows = read_images(out / "data" / "heldout.npz")
    else:
        documents = read_documents(out / "data" / "heldout.jsonl")
        rows = pack(documents, load_tokenizer(recipe, out), recipe.train.length)
    count = min(recipe.rows, len(rows))
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def load_tokenizer(recipe: Comparison, out: Path) -> PreTrainedTokenizerBase:
    """The source's tokenizer, or the one learned on the training text."""
    if isinstance(recipe.source, str):
        return modeling.load_tokenizer(recipe.source)
    tokenizer: PreTrainedTokenizerBase = modeling.read_tokenizer(out / "tokenizer")
    return tokenizer
