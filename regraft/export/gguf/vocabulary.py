"""A tokenizer in GGUF's words, read from what transformers makes of a model's files.

llama.cpp knows three kinds: byte-level BPE, whose rules for splitting a text have a name each;
SentencePiece's BPE, with a score per token; and SentencePiece's unigram.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from ...errors import RegraftError, explain_errors
from ...io.identity import TOKENIZER
from ...modeling.meta import silence_transformers

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of tokens in a file
SPACE = "\u2581"  # what SentencePiece writes for a space
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}"
    r"|{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is split before merges, as `describe_split` says it -> llama.cpp's name for it. Of two
# names the second is for vocabularies that merge also where a whole word is a token.
SPLITS: dict[tuple[str, ...], tuple[str, str]] = {
    ("words",): ("gpt-2", "gpt-2"),
    ("digits", "words"): ("smollm", "smollm"),
    (rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{REST}",): ("llama-bpe", "dbrx"),
    (rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{REST}",): ("qwen2", "qwen2"),
    (
        rf"{SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): ("qwen35", "qwen35"),
    (CASED.replace("{end}", f"{SHORT}?").replace("{digits}", r"\p{N}{1,3}"),): ("gpt-4o", "gpt-4o"),
    (CASED.replace("{end}", "").replace("{digits}", r"\p{N}"),): ("tekken", "tekken"),
}
# llama.cpp strips spaces behind special tokens where the model's *name* says Phi-3, and fails where
# one of these is missing then.
PHI3 = re.compile(r"phi-?3", re.IGNORECASE)
PHI3_TOKENS = {"<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>"}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def read_vocabulary(folder: Path, size: int) -> dict[str, Any]:
    """The metadata of a tokenizer: key -> value, with everything a GGUF file says of it.

    Args:
        folder: with the tokenizer's files.
        size: rows of the embedding; tokens beyond those of the tokenizer get names of their own.

    RegraftError when there is no tokenizer, or one that llama.cpp does not have.
    """
    tokenizer = load_tokenizer(folder)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    model = whole["model"]
    words = model.get("vocab") or {}
    if model["type"] == "BPE" and is_byte_level(whole):
        kind = read_byte_level(whole, folder)
    elif model["type"] == "BPE":
        kind = read_sentencepiece(whole, folder)
    elif model["type"] == "Unigram":
        kind, words = read_unigram(whole), {word: row for row, (word, _) in enumerate(words)}
    else:
        raise refuse(folder, f"a {model['type']} model, llama.cpp has BPE and unigram")

    tokens, kinds = list_tokens(whole, words, size, folder)
    scores = kind.pop("scores", None)
    keys = kind | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
    }
    if scores is not None:
        lowest = min(scores.values(), default=0.0) - 1
        keys["tokenizer.ggml.scores"] = [float(scores.get(token, lowest)) for token in tokens]
    return keys | read_special(tokenizer)


def choose_name(name: str, keys: dict[str, Any]) -> str:
    """The model's name in the file: one that says Phi-3 just where the tokenizer is Phi-3's.

    Args:
        name: of the model's directory.
        keys: as of `read_vocabulary`.
    """
    if not PHI3_TOKENS <= set(keys["tokenizer.ggml.tokens"]):
        return PHI3.sub("phi", name)
    return name if PHI3.search(name) else f"Phi-3 {name}"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer as transformers reads it; RegraftError when there is none."""
    from transformers import AutoTokenizer

    if not any(file for pattern in TOKENIZER for file in folder.glob(pattern)):
        raise RegraftError(
            f"'{folder}' has no tokenizer, which a GGUF file holds: put tokenizer.json there"
        )
    with (
        explain_errors(f"transformers cannot read the tokenizer of '{folder}'", "fix its files"),
        silence_transformers(),
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise refuse(folder, "code of its own, llama.cpp needs a tokenizer.json")
    return tokenizer


def refuse(folder: Path, what: str) -> RegraftError:
    """The error for a tokenizer that llama.cpp does not have."""
    return RegraftError(
        f"the tokenizer of '{folder}' has {what}: export to another target, without --quantize"
    )


def flatten(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one step."""
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


def is_byte_level(whole: dict[str, Any]) -> bool:
    """Whether a BPE model works on bytes in GPT-2's alphabet."""
    steps = flatten(whole.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "ByteLevel" for step in steps)


def read_byte_level(whole: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Byte-level BPE: merges, and the name of its rules for splitting."""
    model, split = whole["model"], describe_split(whole, folder)
    if split not in SPLITS:
        raise refuse(folder, f"rules for splitting that llama.cpp has no name for, {split}")
    for step in flatten(whole.get("normalizer"), "normalizers"):
        if step["type"] not in ("NFC",):
            raise refuse(folder, f"a {step['type']} normalizer, llama.cpp's byte-level BPE none")
    if not model["merges"]:
        raise refuse(folder, "no merges, llama.cpp needs some")
    pre = SPLITS[split][0 if model.get("ignore_merges") else 1]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.merges": [join_merge(merge) for merge in model["merges"]],
    }


def join_merge(merge: str | list[str]) -> str:
    """A merge as "first second"."""
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge)


def describe_split(whole: dict[str, Any], folder: Path) -> tuple[str, ...]:
    """The rules by which byte-level BPE splits a text: regular expressions, "digits", "words"."""
    rules = []
    for step in flatten(whole["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            if step.get("add_prefix_space"):
                raise refuse(folder, "add_prefix_space, which llama.cpp's byte-level BPE has not")
            rules += ["words"] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            rules.append("digits")
        elif step["type"] == "Split" and "Regex" in step["pattern"] and not step["invert"]:
            rules.append(step["pattern"]["Regex"])
        else:
            rules.append(step["type"])
    return tuple(rules)


def read_sentencepiece(whole: dict[str, Any], folder: Path) -> dict[str, Any]:
    """SentencePiece's BPE: a token's score is its place among the merges.

    The pair whose token has the highest score is merged first, which is the order of the merges.
    """
    model = whole["model"]
    if not model.get("byte_fallback"):
        raise refuse(folder, "BPE that is neither byte-level nor falls back to bytes")
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in model["vocab"]]
    if missing:
        raise refuse(folder, f"no token {missing[0]}, llama.cpp needs one for every byte")
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        scores.setdefault(token, -float(rank))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": has_space_prefix(whole),
        "scores": scores,
    }


def has_space_prefix(whole: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    for step in flatten(whole.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            return True
    for step in flatten(whole.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def read_unigram(whole: dict[str, Any]) -> dict[str, Any]:
    """SentencePiece's unigram: scores, and its table for normalizing."""
    steps = flatten(whole.get("normalizer"), "normalizers")
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": has_space_prefix(whole),
        "tokenizer.ggml.remove_extra_whitespaces": any(step["type"] == "Replace" for step in steps),
        "scores": {word: float(score) for word, score in whole["model"]["vocab"]},
    }
    for step in steps:
        if step["type"] == "Precompiled" and step.get("precompiled_charsmap"):
            table = base64.b64decode(step["precompiled_charsmap"])
            keys["tokenizer.ggml.precompiled_charsmap"] = table
    return keys


def list_tokens(
    whole: dict[str, Any], words: dict[str, int], size: int, folder: Path
) -> tuple[list[str], list[int]]:
    """(tokens, their kinds) by id, as many as the embedding has rows."""
    tokens, kinds = [f"[PAD{row}]" for row in range(size)], [UNUSED] * size
    unknown = whole["model"].get("unk_token")
    added = {token["id"]: token for token in whole["added_tokens"]}
    rows = {row: word for word, row in words.items()}
    rows |= {row: token["content"] for row, token in added.items()}
    if rows and max(rows) >= size:
        raise refuse(folder, f"{max(rows) + 1} tokens, the model's embedding {size}")

    fallback = whole["model"].get("byte_fallback")
    for row, word in rows.items():
        tokens[row] = word
        if row in added:
            kinds[row] = CONTROL if added[row]["special"] else USER
        elif fallback and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            kinds[row] = BYTE
        else:
            kinds[row] = NORMAL
        if word == unknown:
            kinds[row] = UNKNOWN
    return tokens, kinds


def read_special(tokenizer: Any) -> dict[str, Any]:
    """Special tokens, whether a text begins or ends with them, and the chat template."""
    found: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": int(row)
        for ours, name in SPECIAL.items()
        if (row := getattr(tokenizer, f"{ours}_token_id")) is not None
    }
    ids = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    found["tokenizer.ggml.add_bos_token"] = bos is not None and ids[:1] == [bos]
    found["tokenizer.ggml.add_eos_token"] = eos is not None and ids[-1:] == [eos]
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return found | ({"tokenizer.chat_template": template} if template else {})
