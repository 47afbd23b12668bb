"""What a model is trained for: the next token, masked tokens, the class of an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..data.images import Images
from ..data.rows import Packed, Table
from ..errors import RegraftError
from ..modeling.text_part import find_text_part, run_text_part
from .stage import Kind

__all__ = [
    "Data",
    "Images",
    "Kind",
    "Packed",
    "Rows",
    "check_head",
    "last_hidden",
    "compute_loss",
    "compute_loss_on_targets",
    "evaluate_objective",
    "build_targets",
]

Rows = Packed | Images
Data = Table | Images  # where rows come from: in memory, or on disk and read by number
IGNORED = -100  # the label of a token that is not to be guessed
MASK_SHARE = 0.15  # BERT's share of tokens that are to be guessed

# By objective: what model it needs, in words, and the names of the classes that fit.
HEADS: dict[str, tuple[str, set[str]]] = {
    "next": (
        "a decoder",
        {
            *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
            *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(),
        },
    ),
    "mask": ("a ...ForMaskedLM", set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())),
    "image": (
        "a ...ForImageClassification",
        set(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()),
    ),
}


class Scores(TypedDict):
    """How good a model is on some rows."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share of targets that the likeliest guess hits


def compute_loss(
    model: PreTrainedModel,
    kind: Kind,
    rows: Rows,
    fast: bool = False,
    generator: torch.Generator | None = None,
    mask_share: float = MASK_SHARE,
) -> Tensor:
    """Mean cross-entropy of an objective, a float32 scalar that can be backpropagated.

    RegraftError when the rows do not suit the objective and the model.

    Args:
        model: a model with the objective's head.
        kind: `next`: the next token within its document. `mask`: BERT's masked tokens (arXiv
            1810.04805), see `mask_tokens`; documents of a row see each other, as in RoBERTa's
            full sentences. `image`: the class.
        rows: text, or images.
        fast: bfloat16 autocast.
        generator: draws masks.
        mask_share: of the tokens that are to be guessed.
    """
    given, labels = build_targets(model, kind, rows, generator, mask_share)
    return compute_loss_on_targets(model, kind, given, labels, fast)


def compute_loss_on_targets(
    model: PreTrainedModel, kind: Kind, rows: Rows, labels: Tensor, fast: bool = False
) -> Tensor:
    """Mean cross-entropy on the rows and labels of `build_targets`."""
    logits = compute_logits(model, kind, rows, fast)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def evaluate_objective(model: PreTrainedModel, kind: Kind, rows: Rows, batch: int = 16) -> Scores:
    """Score a model on rows, without dropout; masks are always the same."""
    generator = torch.Generator().manual_seed(0)
    rows, labels = build_targets(model, kind, rows, generator, MASK_SHARE)

    total, right, count, training = 0.0, 0, 0, model.training
    model.eval()
    for part in batch_slices(len(rows), batch):
        logits = compute_logits(model, kind, rows[part], False).flatten(0, -2)
        targets = labels[part].flatten()
        # Sums, as batches differ in how many of their tokens have a label.
        total += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
        right += int((logits.argmax(-1) == targets).sum())
        count += int((targets != IGNORED).sum())
    model.train(training)
    return {"loss": total / count, "accuracy": right / count}


def batch_slices(count: int, batch: int) -> Iterator[slice]:
    """Slices of at most `batch` rows."""
    return (slice(start, start + batch) for start in range(0, count, batch))


def build_targets(
    model: PreTrainedModel,
    kind: Kind,
    rows: Rows,
    generator: torch.Generator | None = None,
    mask_share: float = MASK_SHARE,
) -> tuple[Rows, Tensor]:
    """What the model sees and what it is to guess.

    RegraftError when the rows do not suit the objective and the model.

    Returns:
        (rows, labels). Labels are (batch, time - 1) for `next`, (batch, time) for `mask`,
        (batch,) for `image`; -100 where nothing is to be guessed.
    """
    check_rows(model, kind, rows)
    if isinstance(rows, Images):
        return rows, rows.labels

    if kind == "next":
        # The first token of a document does not follow from the one before it.
        starts = rows.position_ids[:, 1:] == 0
        return rows, rows.input_ids[:, 1:].masked_fill(starts, IGNORED)

    ids, labels = mask_tokens(
        rows, model.config.get_text_config().vocab_size, mask_share, generator
    )
    return replace(rows, input_ids=ids), labels


def mask_tokens(
    rows: Packed, vocab: int, share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """BERT's corruption of tokens (arXiv 1810.04805).

    In each row `share` of the tokens, at least one and never a special one, is to be guessed. Of
    these 80 % become the mask token, 10 % a random token that is not special, and 10 % stay.
    RegraftError when the tokenizer has no mask token or all tokens are special.

    Returns:
        (token ids, labels), both (rows, time).
    """
    if rows.mask is None:
        raise RegraftError(
            f"the tokenizer of these {len(rows)} rows has no mask token: "
            "train for the next token instead"
        )
    ids, device = rows.input_ids, generator.device if generator else rows.device
    special_ids = torch.tensor([*rows.special, rows.mask], device=ids.device)
    special = torch.isin(ids, special_ids)
    draw = partial(torch.rand, ids.shape, generator=generator, device=device)

    # Ranks of random numbers choose exactly as many in each row; special tokens rank last.
    order = draw().to(ids.device).masked_fill(special, 2.0).argsort(1).argsort(1)
    free = (~special).sum(1, keepdim=True)
    chosen = order < (share * free).round().long().clamp(min=1).minimum(free)
    if not bool(chosen.any()):
        raise RegraftError(
            f"{len(rows)} rows hold nothing but special tokens {sorted(rows.special)}: "
            "give more text"
        )

    plain = torch.ones(vocab, dtype=torch.bool).index_fill(0, special_ids.cpu(), False)
    words = plain.nonzero().flatten().to(ids.device)
    fate = draw().to(ids.device)
    word = words[(draw().to(ids.device) * len(words)).long()]
    changed = torch.where(fate < 0.8, rows.mask, torch.where(fate < 0.9, word, ids))
    return torch.where(chosen, changed, ids), ids.masked_fill(~chosen, IGNORED)


def compute_logits(model: PreTrainedModel, kind: Kind, rows: Rows, fast: bool) -> Tensor:
    """Logits in float32.

    Returns:
        (batch, time - 1, vocab) for `next`, (batch, time, vocab) for `mask`, (batch, classes).
    """
    if kind == "next" and isinstance(rows, Packed):
        # The head is applied here, outside autocast, and not to the last token of a row.
        logits: Tensor = model.get_output_embeddings()(last_hidden(model, rows, fast)[:, :-1])
        cap = getattr(model.config, "final_logit_softcapping", None)  # Gemma 2's
        return logits if cap is None else cap * torch.tanh(logits / cap)

    inputs: dict[str, Any]
    if isinstance(rows, Images):
        inputs = {"pixel_values": rows.pixel_values}
    else:
        inputs = encoder_inputs(model, rows)
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=fast):
        outputs: Tensor = model(**inputs).logits
    return outputs.float()


def encoder_inputs(model: PreTrainedModel, rows: Packed) -> dict[str, Tensor]:
    """The inputs of an encoder, which reads a row as one text: positions count from its start."""
    positions = torch.arange(rows.input_ids.shape[1], device=rows.device)
    positions = positions + first_position(find_position_embedding(model))
    return {"input_ids": rows.input_ids, "position_ids": positions.expand_as(rows.input_ids)}


def last_hidden(model: PreTrainedModel, rows: Packed, fast: bool) -> Tensor:
    """What the head is applied to, (batch, time, hidden) in float32.

    Granite's class divides the logits by `logits_scaling`; dividing here is the same.
    """
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=fast):
        output = run_text_part(model, rows.position_ids, input_ids=rows.input_ids)
    hidden: Tensor = output.last_hidden_state.float()
    return hidden / getattr(model.config, "logits_scaling", 1.0)


def check_head(model: PreTrainedModel, kind: str) -> None:
    """RegraftError when the model has no head for an objective."""
    needed, classes = HEADS[kind]
    # A linearized model's class is made of its host's.
    if not classes & {kind.__name__ for kind in type(model).__mro__}:
        raise RegraftError(
            f"a {type(model).__name__} has no head for '{kind}': give {needed} "
            "(config.json's architectures say which)"
        )


def check_rows(model: PreTrainedModel, kind: Kind, rows: Data) -> None:
    """RegraftError when the model has no head for the objective, or the rows do not fit it."""
    check_head(model, kind)
    if isinstance(rows, Images) != (kind == "image"):
        given, needed = "text", "images in a .npz file"
        if isinstance(rows, Images):
            given, needed = "images", "text"
        raise RegraftError(f"'{kind}' was given {len(rows)} rows of {given}: give {needed}")

    if isinstance(rows, Images):
        check_images(model, rows)
        return
    vocab = model.config.get_text_config().vocab_size
    if rows.largest >= vocab:
        raise RegraftError(
            f"token {rows.largest} is beyond the model's {vocab}: use its own tokenizer"
        )
    # Rotary models have no table, and take rows of any length.
    table, length = find_position_embedding(model), rows.length
    room = length if table is None else table.num_embeddings - first_position(table)
    if length > room:
        raise RegraftError(
            f"rows of {length} tokens are longer than the model's {room} positions: "
            f"choose {room} or less"
        )


def check_images(model: PreTrainedModel, rows: Images) -> None:
    """RegraftError when images have another size than the model's, or labels beyond its classes."""
    config: Any = model.config
    size = config.image_size
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    expected, shape = [config.num_channels, *sides], list(rows.pixel_values.shape[1:])
    if shape != expected:
        raise RegraftError(
            f"images are {shape} (channels, height, width), the model takes {expected}: resize them"
        )

    low, high = int(rows.labels.min()), int(rows.labels.max())
    if low < 0 or high >= config.num_labels:
        raise RegraftError(
            f"label {low if low < 0 else high} is none of the model's {config.num_labels} "
            "classes: they count from 0"
        )


def find_position_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The table of learned absolute positions, None for a model without one."""
    for name, module in find_text_part(model).named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "wpe")):
            return module
    return None


def first_position(table: nn.Embedding | None) -> int:
    """The number of the first position: in RoBERTa's table it follows the padding token's."""
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1
