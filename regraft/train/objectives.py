"""What a model is trained for: the next token, masked tokens, the class of an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from ..data.packing import Images, Packed
from ..data.rows import Table
from ..errors import RegraftError
from ..modeling.modeling_regraft import RegraftForCausalLM

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

Kind = Literal["next", "mask", "image"]
Rows = Packed | Images
Data = Table | Images  # where rows come from: in memory, or on disk and read by number
IGNORED = -100
HEADS: dict[str, tuple[str, set[str]]] = {
    "next": (
        "a decoder",
        {*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), "RegraftForCausalLM"},
    ),
    "mask": ("a ...ForMaskedLM", set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values())),
    "image": (
        "a ...ForImageClassification",
        set(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()),
    ),
}


def compute_loss(
    model: PreTrainedModel,
    kind: Kind,
    rows: Rows,
    fast: bool = False,
    generator: torch.Generator | None = None,
    mask_share: float = 0.15,
) -> Tensor:
    """Mean cross-entropy of an objective, a float32 scalar, not backpropagated; `fast`: bfloat16 autocast.

    `next`: the next token within its document. `mask`: BERT's (arXiv 1810.04805), see `masked`; documents of a row see
    each other, as in RoBERTa's full sentences. `image`: the class. RegraftError when the rows do not suit the kind and
    the model.
    """
    return compute_loss_on_targets(
        model, kind, *build_targets(model, kind, rows, generator, mask_share), fast
    )


def compute_loss_on_targets(
    model: PreTrainedModel, kind: Kind, rows: Rows, labels: Tensor, fast: bool = False
) -> Tensor:
    """The loss of what `targets` gave."""
    logits = compute_logits(model, kind, rows, fast)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def evaluate_objective(
    model: PreTrainedModel, kind: Kind, rows: Rows, batch: int = 16
) -> dict[str, float]:
    """Mean loss and accuracy (share of right first guesses) over rows, without dropout; masks are always the same."""
    rows, labels = build_targets(model, kind, rows, torch.Generator().manual_seed(0), 0.15)
    total, right, count, training = 0.0, 0, 0, model.training
    model.eval()
    for part in batch_slices(len(rows), batch):
        logits, wanted = (
            compute_logits(model, kind, rows[part], False).flatten(0, -2),
            labels[part].flatten(),
        )
        total += float(F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
        right += int((logits.argmax(-1) == wanted).sum())
        count += int((wanted != IGNORED).sum())
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
    mask_share: float = 0.15,
) -> tuple[Rows, Tensor]:
    """(what the model sees, labels: of all but each row's last token, of every token, or of every image).

    Tokens without a target have the label -100. RegraftError when the rows do not suit the kind and the model.
    """
    check_rows(model, kind, rows)
    if isinstance(rows, Images):
        return rows, rows.labels
    if kind == "next":
        return rows, rows.input_ids[:, 1:].masked_fill(rows.position_ids[:, 1:] == 0, IGNORED)
    ids, labels = mask_tokens(rows, model.config.vocab_size, mask_share, generator)
    return replace(rows, input_ids=ids), labels


def mask_tokens(
    rows: Packed, vocab: int, share: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """BERT's corruption: (token ids, labels), both (rows, length).

    In each row `share` of the tokens, at least one and never a special one, is to be guessed: of these 80 % become the
    mask token, 10 % a random token that is not special, 10 % stay.
    """
    if rows.mask is None:
        raise RegraftError(
            f"the tokenizer of these {len(rows)} rows has no mask token: train for the next token instead"
        )
    ids, device = rows.input_ids, generator.device if generator else rows.device
    special = torch.isin(ids, torch.tensor([*rows.special, rows.mask], device=ids.device))
    draw = partial(torch.rand, ids.shape, generator=generator, device=device)
    order = draw().to(ids.device).masked_fill(special, 2.0).argsort(1).argsort(1)
    free = (~special).sum(1, keepdim=True)
    chosen = order < (share * free).round().long().clamp(min=1).minimum(free)
    if not bool(chosen.any()):
        raise RegraftError(
            f"{len(rows)} rows hold nothing but special tokens {sorted(rows.special)}: give more text"
        )
    plain = torch.ones(vocab, dtype=torch.bool).index_fill(
        0, torch.tensor([*rows.special, rows.mask]), False
    )
    words = plain.nonzero().flatten().to(ids.device)
    fate, word = draw().to(ids.device), words[(draw().to(ids.device) * len(words)).long()]
    changed = torch.where(fate < 0.8, rows.mask, torch.where(fate < 0.9, word, ids))
    return torch.where(chosen, changed, ids), ids.masked_fill(~chosen, IGNORED)


def compute_logits(model: PreTrainedModel, kind: Kind, rows: Rows, fast: bool) -> Tensor:
    """Logits in float32: (batch, time - 1, vocab) for the next token, (batch, time, vocab) or (batch, classes)."""
    if kind == "next" and isinstance(rows, Packed):
        logits: Tensor = model.get_output_embeddings()(last_hidden(model, rows, fast)[:, :-1])
        cap = getattr(model.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)
    given: dict[str, Any] = (
        {"pixel_values": rows.pixel_values}
        if isinstance(rows, Images)
        else encoder_inputs(model, rows)
    )
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=fast):
        found: Tensor = model(**given).logits
    return found.float()


def encoder_inputs(model: PreTrainedModel, rows: Packed) -> dict[str, Tensor]:
    """What an encoder of whole rows is given: positions count from the row's start."""
    counted = torch.arange(rows.input_ids.shape[1], device=rows.device) + first_position(
        find_position_embedding(model)
    )
    return {"input_ids": rows.input_ids, "position_ids": counted.expand_as(rows.input_ids)}


def last_hidden(model: PreTrainedModel, rows: Packed, fast: bool) -> Tensor:
    """The decoder's output before the head, (batch, time, hidden) in float32."""
    run = (
        model.forward_decoder
        if isinstance(model, RegraftForCausalLM)
        else partial(model.get_decoder(), use_cache=False)
    )
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=fast):
        return run(
            input_ids=rows.input_ids, position_ids=rows.position_ids
        ).last_hidden_state.float()


def check_head(model: PreTrainedModel, kind: str) -> None:
    """RegraftError when the model has no head for an objective."""
    wanted, classes = HEADS[kind]
    if type(model).__name__ not in classes:
        raise RegraftError(
            f"a {type(model).__name__} has no head for '{kind}': give {wanted} (config.json's architectures say which)"
        )


def check_rows(model: PreTrainedModel, kind: Kind, rows: Data) -> None:
    """RegraftError when the model has no head for the kind, or the rows are not what it takes."""
    check_head(model, kind)
    if isinstance(rows, Images) != (kind == "image"):
        held, wanted = (
            ("images", "text") if isinstance(rows, Images) else ("text", "images in a .npz file")
        )
        raise RegraftError(f"'{kind}' was given {len(rows)} rows of {held}: give {wanted}")
    if isinstance(rows, Images):
        check_images(model, rows)
        return
    if rows.largest >= model.config.vocab_size:
        raise RegraftError(
            f"token {rows.largest} is beyond the model's {model.config.vocab_size}: use its own tokenizer"
        )
    table, length = find_position_embedding(model), rows.length
    room = length if table is None else table.num_embeddings - first_position(table)
    if length > room:
        raise RegraftError(
            f"rows of {length} tokens are longer than the model's {room} positions: choose {room} or less"
        )


def check_images(model: PreTrainedModel, rows: Images) -> None:
    """RegraftError when images have another size than the model's, or labels beyond its classes."""
    config: Any = model.config
    size = config.image_size
    wanted = [config.num_channels, *(size if isinstance(size, (list, tuple)) else (size, size))]
    if list(rows.pixel_values.shape[1:]) != wanted:
        raise RegraftError(
            f"images are {list(rows.pixel_values.shape[1:])} (channels, height, width), the model takes {wanted}: "
            "resize them"
        )
    low, high = int(rows.labels.min()), int(rows.labels.max())
    if low < 0 or high >= config.num_labels:
        raise RegraftError(
            f"label {low if low < 0 else high} is none of the model's {config.num_labels} classes: they count from 0"
        )


def find_position_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The table of learned positions, None for a model without one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "wpe")):
            return module
    return None


def first_position(table: nn.Embedding | None) -> int:
    """Where positions begin: behind the padding token's in RoBERTa's table."""
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1
