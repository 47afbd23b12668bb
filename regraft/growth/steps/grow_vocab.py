"""GrowVocab: more rows for tokens, as padding or with tokens that the tokenizer gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...core.checkpoint import Checkpoint
from ...core.step import step_entry
from ...errors import RegraftError
from ..new_tokens import NewToken, TokenizerChange, check_new_tokens, find_pieces, open_tokenizer
from ..vocabulary import VOCAB_INITS, VocabInit, VocabRows, describe_rows, grow_rows

FIRST = 3  # tokens that a note names


@dataclass(frozen=True)
class GrowVocab:
    """Give a model more rows of embeddings, output embeddings and their biases.

    `vocab` is the number of rows; rows without a token are padding, such as kernels want it.
    `tokens` are added to the tokenizer, strings or mappings with the fields of
    `tokenizers.AddedToken`; they take the next ids, and rows from `vocab` on where it is not given.
    `init` says what new rows hold: `pieces`, the mean of the rows of the pieces that a token
    replaces (padding: the mean of all rows); `mean`, the mean of all rows (Hewitt, "Initializing
    New Word Embeddings for Pretrained Language Models", 2021); `zero`, zeros.

    Preserves: the logits of the old tokens, bit for bit. A new logit is the mean of its pieces'
    logits or of all old logits, or 0.
    Refuses: fewer rows, models without a vocabulary, tokens without a tokenizer or all of which it
    has already, and more tokens than rows.
    """

    vocab: int | None = None
    tokens: Sequence[str | Mapping[str, Any]] = ()
    init: VocabInit = "pieces"

    def __call__(self, source: Checkpoint) -> Checkpoint:
        """The checkpoint with more rows; reads the tokenizer, no weights."""
        tokens = check_new_tokens(self.tokens)
        old = source.sizes.get("vocab")
        if old is None:
            raise RegraftError(
                f"{source.anatomy.family} reads {source.anatomy.inputs} and has no vocabulary to"
                " grow: leave out --vocab and --add-tokens"
            )
        if self.init not in VOCAB_INITS:
            raise RegraftError(
                f"unknown --vocab-init '{self.init}': use one of {', '.join(VOCAB_INITS)}"
            )
        if self.vocab is not None and self.vocab < old:
            raise RegraftError(
                f"--vocab {self.vocab} is smaller than the source's {old}: growth never shrinks,"
                f" give {old} or more"
            )

        added, pieces, notes = add_tokens(source, tokens, old)
        rows = VocabRows(old, self._count_rows(old, pieces), self.init, pieces)
        sizes = {**source.sizes, "vocab": rows.new}
        config = source.anatomy.resize_config(source.config, sizes)
        placed = source.anatomy.place(config)
        has_head = any("vocab" in one.part.axes.outputs[0] for one in placed.values())
        step = step_entry(replace(self, vocab=rows.new, tokens=tokens))
        step |= {"notes": [*describe_rows(rows, has_head), *notes], "overwritten": rows.overwritten}
        changes = (TokenizerChange(added),) if added else ()
        return replace(
            source,
            config=config,
            sizes=sizes,
            tensors={
                key: grow_rows(source.tensors[key], part, rows, source.holds)
                for key, part in placed.items()
            },
            history=(*source.history, step),
            file_changes=(*source.file_changes, *changes),
        )

    def _count_rows(self, old: int, pieces: Mapping[int, Sequence[int]]) -> int:
        """Rows of the target; RegraftError when tokens have none."""
        needed = max([old, *(row + 1 for row in pieces)])
        if self.vocab is not None and self.vocab < needed:
            raise RegraftError(
                f"--vocab {self.vocab} has no row for the last of {len(pieces)} added tokens, whose"
                f" id is {needed - 1}: give {needed} or more"
            )
        return self.vocab or needed


def add_tokens(
    source: Checkpoint, tokens: Sequence[NewToken], old: int
) -> tuple[tuple[NewToken, ...], dict[int, tuple[int, ...]], list[str]]:
    """(tokens that the tokenizer gets, their ids with the old rows that they replace, notes).

    Args:
        source: whose tokenizer it is.
        tokens: that were asked for.
        old: rows of the source.

    RegraftError when the tokenizer is missing, or has all of them already.
    """
    if not tokens:
        return (), {}, []
    pieces, known = find_pieces(open_tokenizer(source), tokens)
    names = ", ".join(map(repr, known[:FIRST])) + (" .." if known[FIRST:] else "")
    if not pieces:
        raise RegraftError(
            f"the tokenizer of '{source.origin}' has all {len(tokens)} tokens already ({names}):"
            " leave out --add-tokens"
        )
    notes = []
    if known:
        notes.append(f"{len(known)} tokens are in the tokenizer already, unchanged: {names}")
    added = tuple(token for token in tokens if token["content"] not in known)
    # A tokenizer may have tokens beyond the rows of its model.
    rows = {row: tuple(one for one in ids if one < old) for row, ids in pieces.items()}
    return added, rows, notes
