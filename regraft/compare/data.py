"""What every arm of a comparison shares, made once: data, tokenizer, sources before training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig

from .. import modeling
from ..core.anatomy import find_anatomy
from ..core.checkpoint import Checkpoint
from ..data import default_text
from ..data.corpus import Text
from ..data.packing import Images, pack, read_documents, read_images
from ..errors import RegraftError
from ..growth.sizes import solve_sizes
from ..train.objectives import HEADS, Data, Rows
from ..train.session import training_rows
from .recipe import Comparison, TargetSizes

END, MASK = "<|end|>", "[MASK]"
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", MASK)
HELD_OUT_EVERY = 20  # one document, image or part of a text in so many is held out where no held-out data is given
IMAGE_HELD_OUT_EVERY = 5
AUTO = {
    "next": transformers.AutoModelForCausalLM,
    "mask": transformers.AutoModelForMaskedLM,
    "image": transformers.AutoModelForImageClassification,
}


def prepare_data(recipe: Comparison, out: Path) -> None:
    """Make what is missing of OUT/data and OUT/tokenizer, and OUT/blank: sources before any training.

    RegraftError for data of the wrong kind.
    """
    (write_images if recipe.task == "image" else write_text)(recipe, out / "data")
    if (
        recipe.task != "image"
        and isinstance(recipe.source, dict)
        and not (out / "tokenizer").is_dir()
    ):
        documents = read_documents(out / "data" / "train.jsonl")
        into = out / "tokenizer.part"
        shutil.rmtree(into, ignore_errors=True)
        train_tokenizer(documents, recipe.vocabulary, recipe.task == "mask").save_pretrained(into)
        into.rename(out / "tokenizer")
    for name, source in recipe.sources().items():
        folder = out / "blank" / name
        if isinstance(source, dict):
            make_source(recipe, source, out, 0).save_pretrained(folder)


def write_text(recipe: Comparison, folder: Path) -> None:
    """train.jsonl and heldout.jsonl."""
    if (folder / "heldout.jsonl").exists():
        return
    train = (
        read_documents(recipe.data)
        if recipe.data
        else [*default_text.documentation(), *default_text.docstrings()]
    )
    if recipe.heldout:
        held = read_documents(recipe.heldout)
    elif recipe.data:
        train, held = split_held_out(train)
    else:
        held = default_text.heldout_topics()
    default_text.write_jsonl(train, folder / "train.jsonl")
    default_text.write_jsonl(held, folder / "heldout.jsonl")


def split_held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """(training, held-out) documents; of a single one the end is held out."""
    if len(documents) == 1:
        cut = len(documents[0]) * (HELD_OUT_EVERY - 1) // HELD_OUT_EVERY
        return [documents[0][:cut]], [documents[0][cut:]]
    held = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or documents[-1:]
    return [one for one in documents if one not in set(held)], held


def write_images(recipe: Comparison, folder: Path) -> None:
    """train.npz and heldout.npz."""
    if (folder / "heldout.npz").exists():
        return
    whole = (
        read_images(recipe.data)
        if recipe.data
        else Images(*map(torch.from_numpy, load_digit_images()))
    )
    if recipe.heldout:
        parts = {"train": whole, "heldout": read_images(recipe.heldout)}
    else:
        order = np.random.default_rng(0).permutation(len(whole))
        held = max(1, len(whole) // IMAGE_HELD_OUT_EVERY)
        train = whole[order[held:]]
        parts = {
            "train": train if recipe.data else augment_by_shifts(train),
            "heldout": whole[order[:held]],
        }
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in parts.items():
        part = folder / f"{name}.part.npz"
        np.savez(part, pixel_values=images.pixel_values.numpy(), labels=images.labels.numpy())
        part.replace(folder / f"{name}.npz")


def augment_by_shifts(images: Images) -> Images:
    """Images and the same moved by a pixel in each of eight directions, what comes in at the edge being its old value:
    some thousand of them alone are learned by heart, and then a larger model is worse."""
    padded = torch.nn.functional.pad(images.pixel_values, (1, 1, 1, 1), mode="replicate")
    height, width = images.pixel_values.shape[-2:]
    moved = [padded[..., y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return Images(torch.cat(moved), images.labels.repeat(len(moved)))


def load_digit_images() -> tuple[Any, Any]:
    """scikit-learn's handwritten digits, (1797, 1, 8, 8) with mean zero and spread one, and their classes."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise RegraftError(
            f"the digits need {error.name}, which is not installed: pip install 'regraft[compare]', or give data"
        ) from error
    table = load_digits()
    pixels = table.images.astype(np.float32)[:, None]
    return (pixels - pixels.mean()) / pixels.std(), table.target.astype(np.int64)


def train_tokenizer(documents: list[str], size: int, masks: bool) -> Any:
    """A byte-level BPE of `size` tokens, special ones included, learned on documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [*BERT, END] if masks else [END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if size < len(alphabet) + len(special):
        raise RegraftError(
            f"vocabulary {size} does not hold all bytes: give {len(alphabet) + len(special)} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": MASK,
    }
    words = {"eos_token": END} | (names if masks else {})
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)


def make_source(recipe: Comparison, config: dict[str, Any], out: Path, seed: int) -> Any:
    """An untrained source of a config, with the vocabulary and class of the task; RegraftError for another kind."""
    config = dict(config)
    if "model_type" not in config:
        raise RegraftError(
            f"source {config} names no model_type: give a config in transformers' words, or a directory"
        )
    if recipe.task != "image":
        tokenizer = transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
        config |= {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        config |= {"bos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    kind = type(AutoConfig.for_model(config["model_type"], **fields))
    if kind not in AUTO[recipe.task]._model_mapping:
        raise RegraftError(
            f"a {config['model_type']} does not do task '{recipe.task}': give another source or task"
        )
    config.setdefault("architectures", [AUTO[recipe.task]._model_mapping[kind].__name__])
    return modeling.build_random_model(config, seed)


def target_config(source: Checkpoint, target: TargetSizes) -> dict[str, Any]:
    """The config of the target as one who starts from scratch writes it: the source's with the target's sizes."""
    layers = target.layers or source.layers
    axes, _ = solve_sizes(source, target)
    order = [min(i, source.layers - 1) for i in range(layers)]
    return source.anatomy.resize_config(source.config, {**axes, "depth": layers}, order)


def open_untrained_source(recipe: Comparison, out: Path, name: str) -> Checkpoint:
    """A source's checkpoint before any training, to see what grows."""
    source = recipe.sources()[name]
    return Checkpoint.open(source if isinstance(source, str) else out / "blank" / name)


def check_task(recipe: Comparison, source: Checkpoint) -> None:
    """RegraftError when a model does not do the task."""
    name = (source.config.get("architectures") or ["a model"])[0]
    if name not in HEADS[recipe.task][1]:
        raise RegraftError(
            f"'{source.origin}' is {name}, which does not do task '{recipe.task}': give another source"
        )
    if recipe.task != "image" and find_anatomy(source.config).inputs != "tokens":
        raise RegraftError(f"'{source.origin}' is {name}, which reads no text: give task image")


def load_training_rows(recipe: Comparison, out: Path) -> Callable[[int], Data]:
    """Training rows by length."""
    if recipe.task == "image":
        return lambda length: read_images(out / "data" / "train.npz")
    text = Text(str(out / "data" / "train.jsonl"), max_tokens=0)
    return training_rows([text], load_tokenizer(recipe, out), cache=out / "data" / "tokens")


def load_heldout_rows(recipe: Comparison, out: Path) -> Rows:
    """At most `rows` held-out rows, spread evenly over the held-out data."""
    if recipe.task == "image":
        whole: Rows = read_images(out / "data" / "heldout.npz")
    else:
        documents = read_documents(out / "data" / "heldout.jsonl")
        whole = pack(documents, load_tokenizer(recipe, out), recipe.train.length)
    count = min(recipe.rows, len(whole))
    return whole[torch.linspace(0, len(whole) - 1, count).round().long()]


def load_tokenizer(recipe: Comparison, out: Path) -> Any:
    """The source's tokenizer, or the one learned on the training text."""
    if isinstance(recipe.source, str):
        return modeling.load_tokenizer(recipe.source)
    return transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
