"""Tokens that a tokenizer gets: the file that names them, their ids and pieces, the tokenizer's
files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from tokenizers import AddedToken

from ..core.checkpoint import Checkpoint
from ..errors import RegraftError, explain_errors
from ..io.files import check_regular_file, read_json, replace_file, write_json
from ..io.schema import check_json
from ..modeling.loading import read_tokenizer

MAX_BYTES = 16_000_000  # of a file of tokens; the largest vocabularies have some 10 MB
# What transformers notes about where a tokenizer was read from.
MACHINE_KEYS = ("is_local", "local_files_only", "name_or_path")


class NewToken(TypedDict):
    """A token as `tokenizers.AddedToken` takes it."""

    content: str
    special: NotRequired[bool]  # whether decoding may leave it out
    single_word: NotRequired[bool]  # whether it must stand alone
    lstrip: NotRequired[bool]  # whether it takes the spaces before it
    rstrip: NotRequired[bool]  # whether it takes the spaces behind it
    normalized: NotRequired[bool]  # whether it is looked for in normalized text


@dataclass(frozen=True)
class TokenizerChange:
    """Tokens to add to the tokenizer beside a model's weights."""

    tokens: tuple[NewToken, ...]

    def __call__(self, folder: Path) -> None:
        """Add them to the tokenizer in a directory that is being written.

        Files that its class writes are replaced, all others stay. RegraftError when there is no
        tokenizer.
        """
        tokenizer = read_tokenizer(folder)
        self.add_to(tokenizer)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as written:
            with explain_errors(f"cannot write the tokenizer of '{folder}'", "report this"):
                tokenizer.save_pretrained(written)
            for file in filter(Path.is_file, Path(written).rglob("*")):
                target = folder / file.relative_to(written)
                target.parent.mkdir(exist_ok=True)
                with replace_file(target) as part:
                    part.write_bytes(file.read_bytes())

        if (settings := folder / "tokenizer_config.json").is_file():
            known = read_json(settings, dict[str, Any])
            write_json(settings, {k: v for k, v in known.items() if k not in MACHINE_KEYS})

    def add_to(self, tokenizer: Any) -> None:
        """Add them to a tokenizer of transformers; those that it has already stay as they are."""
        tokenizer.add_tokens([AddedToken(**token) for token in self.tokens])


def read_new_tokens(path: str) -> tuple[NewToken, ...]:
    """The tokens that a file names.

    Args:
        path: text with a token a line, spaces included; or .json with a list of tokens, each a
            string or an object with the fields of NewToken.

    RegraftError when it is no such file, is empty, or names a token twice.
    """
    file = Path(path)
    check_regular_file(file)
    if file.stat().st_size > MAX_BYTES:
        raise RegraftError(
            f"--add-tokens '{path}' has {file.stat().st_size:,} bytes, the limit is"
            f" {MAX_BYTES:,}: give a file of tokens"
        )
    named = read_json(file, list[Any]) if file.suffix == ".json" else _read_lines(file)
    tokens = check_new_tokens(named, f"--add-tokens '{path}'")
    if not tokens:
        raise RegraftError(f"--add-tokens '{path}' names no token: write one a line")
    return tokens


def _read_lines(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RegraftError(f"--add-tokens '{file}' is no UTF-8 text ({error.reason})") from error
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def check_new_tokens(
    named: Sequence[str | Mapping[str, Any]], where: str = "tokens"
) -> tuple[NewToken, ...]:
    """Tokens as objects; RegraftError for one that is empty, of another form, or there twice.

    Args:
        named: strings, or mappings with the fields of NewToken.
        where: what names them, for messages.
    """
    known = {*NewToken.__annotations__}
    tokens: dict[str, NewToken] = {}
    for number, one in enumerate(named, 1):
        token: Any = {"content": one} if isinstance(one, str) else one
        check_json(token, NewToken, f"token {number} of {where}", "fix it")
        if unknown := sorted(set(token) - known):
            raise RegraftError(
                f"token {number} of {where} has '{unknown[0]}': use {', '.join(sorted(known))}"
            )
        content = token["content"]
        if not content or content in tokens:
            problem = f"'{content}' again" if content else "empty"
            raise RegraftError(f"token {number} of {where} is {problem}: remove it")
        tokens[content] = token
    return tuple(tokens.values())


def open_tokenizer(source: Checkpoint) -> Any:
    """The tokenizer that a checkpoint will be saved with; RegraftError when it has none."""
    tokenizer = read_tokenizer(source.path)
    for change in source.file_changes:
        if isinstance(change, TokenizerChange):
            change.add_to(tokenizer)
    return tokenizer


def find_pieces(
    tokenizer: Any, tokens: Sequence[NewToken]
) -> tuple[dict[int, list[int]], list[str]]:
    """(id of each new token -> ids of the pieces that it replaces, tokens that are there already).

    Args:
        tokenizer: of transformers; it gets the tokens.
        tokens: to add.
    """
    pieces: dict[str, list[int]] = {}
    words = tokenizer.get_vocab()
    for token in tokens:
        content = token["content"]
        ids = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        # A word of the vocabulary may be stored in other characters than its text has.
        is_piece = len(ids) == 1 and ids[0] != tokenizer.unk_token_id
        if content not in words and (token.get("special") or not is_piece):
            pieces[content] = ids

    TokenizerChange(tuple(one for one in tokens if one["content"] in pieces)).add_to(tokenizer)
    find_id: Callable[[str], int] = tokenizer.convert_tokens_to_ids
    known = [token["content"] for token in tokens if token["content"] not in pieces]
    return {find_id(content): ids for content, ids in pieces.items()}, known
