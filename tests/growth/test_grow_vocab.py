"""A larger vocabulary keeps the old tokens' logits, says what the new ones are, and the tokenizer
follows; what cannot be is refused in a line.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import refused, run_main
from helpers.tiny import (
    GROWABLE,
    byte_tokenizer,
    inputs,
    max_relative_difference,
    outputs,
    save_model,
    tiny,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import regraft
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.evaluation.evaluate import evaluate
from regraft.growth.sizes_to_steps import Growth
from regraft.growth.steps.grow_vocab import GrowVocab
from regraft.growth.vocabulary import VocabRows, extend_rows

BOUND = 2e-5
READERS = [family for family in GROWABLE if family not in ("vit", "dinov2")]
WORDS = ["hello", " wor", "lazy dog"]
CASES: list[tuple[str, dict[str, Any], Any]] = [
    *((family, {}, "mean") for family in READERS),
    *((family, {}, "zero") for family in ("llama", "gemma2", "phi", "bert")),
    *((family, {"tie_word_embeddings": True}, "pieces") for family in ("llama", "mixtral")),
    *((family, {"tie_word_embeddings": False}, "mean") for family in ("gpt2", "bert")),
    ("bert", {"architecture": "BertModel"}, "mean"),
    ("bert", {"architecture": "BertForPreTraining"}, "mean"),
]


def logits_name(found: dict[str, torch.Tensor]) -> str | None:
    """The output over the vocabulary, if there is one."""
    return next((name for name in ("logits", "prediction_logits") if name in found), None)


@pytest.mark.parametrize(("family", "keys", "init"), CASES, ids=str)
def test_old_logits_stay_and_new_ones_are_what_the_note_says(
    family: str, keys: dict[str, Any], init: Any, tmp_path: Path
) -> None:
    config, model = tiny(family, **keys)
    model.save_pretrained(tmp_path / "source")
    grown = GrowVocab(vocab=105, init=init)(Checkpoint.open(tmp_path / "source"))
    assert grown.sizes["vocab"] == grown.config["vocab_size"] == 105
    grown.save(tmp_path / "out")
    stock = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    head = stock.get_output_embeddings()
    assert not tied or head.weight is stock.get_input_embeddings().weight

    given = inputs(config)
    before, after = outputs(model, given), outputs(stock, given)
    name = logits_name(before)
    for key, value in before.items():
        found = after[key][..., :97] if key == name else after[key]
        assert max_relative_difference(value, found) < 1e-6, key
    if name is None:
        return
    old, new = before[name], after[name][..., 97:]
    assert new.shape[-1] == 8
    if init == "zero":
        assert not new.any()
        return
    # A cap over the last logits is a rising function: the mean goes through it as all do.
    cap = getattr(config, "final_logit_softcapping", None)
    uncapped = cap * torch.atanh(old / cap) if cap else old
    mean = uncapped.mean(-1, keepdim=True).expand_as(new)
    mean = cap * torch.tanh(mean / cap) if cap else mean
    torch.testing.assert_close(new, mean, rtol=1e-4, atol=1e-4 * float(old.abs().max()))
    assert (new.amax(-1) < old.amax(-1)).all()
    # Jensen: eight tokens beside 97 take no more than 8 of 105 parts of the probability.
    share = after[name].softmax(-1)[..., 97:].sum(-1)
    assert cap or float(share.max()) <= 8 / 105 + 1e-5


@pytest.mark.parametrize(
    ("family", "how"),
    [("llama", "hidden=tile,ffn=pad"), ("gpt2", "pad"), ("gemma", "pad"), ("bert", "tile")],
)
def test_it_goes_with_the_other_axes(family: str, how: str, tmp_path: Path) -> None:
    config, model = tiny(family)
    model.save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    growth = Growth(hidden=2 * source.sizes["hidden"], layers=4, width_init=how, vocab=100)
    growth(source).save(tmp_path / "out")
    stock = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    given = inputs(config)
    before, after = outputs(model, given)["logits"], outputs(stock, given)["logits"]
    assert after.shape[-1] == 100
    bound = 1e-3 if family == "bert" else BOUND  # new layers behind post-norms
    assert max_relative_difference(before, after[..., :97]) < bound


def test_a_linearized_model_grows_its_vocabulary(tmp_path: Path) -> None:
    tiny("llama")[1].save_pretrained(tmp_path / "source")
    regraft.Remix(mixer="window", window=8)(regraft.open(str(tmp_path / "source"))).save(
        tmp_path / "linear"
    )
    GrowVocab(vocab=100)(Checkpoint.open(tmp_path / "linear")).save(tmp_path / "out")
    models = [regraft.load(str(tmp_path / name)) for name in ("linear", "out")]
    given = inputs(tiny("llama")[0])
    before, after = (outputs(model, given)["logits"] for model in models)
    assert torch.equal(before, after[..., :97])


@pytest.mark.parametrize("tie", [True, False])
def test_added_tokens_are_tokens_and_old_texts_stay(tie: bool, tmp_path: Path, capsys: Any) -> None:
    _, model = tiny("llama", vocab=259, tie_word_embeddings=tie)
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    code, _, err = run_main(
        capsys,
        "grow",
        tmp_path / "source",
        tmp_path / "out",
        "--add-tokens",
        tmp_path / "words.txt",
    )
    assert code == 0, err
    old, new = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()

    # The tokenizer: one id a token, next to the old ones, and nothing else changes.
    ids = new.convert_tokens_to_ids(WORDS)
    assert ids == [259, 260, 261] and stock.config.vocab_size == len(new) == 262
    assert new("hello world")["input_ids"][:2] == [259, 260]
    assert new.decode(new("a lazy dog, hello")["input_ids"]) == "a lazy dog, hello"
    texts = ["none of these", "naïve é ü", "a<eos>b"]
    assert old(texts)["input_ids"] == new(texts)["input_ids"]
    assert old.special_tokens_map == new.special_tokens_map
    assert old.chat_template == new.chat_template
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "source" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    settings = [
        json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        for name in ("source", "out")
    ]
    assert settings[0] == settings[1]

    # The model: old logits stay, a new one is the mean of those of the bytes that it replaces.
    given = {"input_ids": torch.tensor(old(["none of these"])["input_ids"])}
    before, after = outputs(model, given)["logits"], outputs(stock, given)["logits"]
    assert torch.equal(before, after[..., :259])
    for number, word in zip(ids, WORDS, strict=True):
        pieces = old(word)["input_ids"]
        torch.testing.assert_close(after[..., number], before[..., pieces].mean(-1))
        embedded = model.get_input_embeddings().weight[pieces].mean(0)
        torch.testing.assert_close(stock.get_input_embeddings().weight[number], embedded)
    receipts = regraft.check(tmp_path / "source", tmp_path / "out")
    assert receipts["holds"] and receipts["greedy"] == receipts["greedy_tokens"]


def test_rows_that_no_token_has_are_taken_first(tmp_path: Path) -> None:
    """A model has 264 rows for 259 tokens: three of the five spare ones are taken, none is added."""
    _, model = tiny("llama", vocab=264)
    model.save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    grown = GrowVocab(tokens=WORDS)(Checkpoint.open(tmp_path / "source"))
    assert grown.sizes["vocab"] == 264 and grown.history[-1]["overwritten"] == [259, 260, 261]
    grown.save(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    kept = [row for row in range(264) if row not in (259, 260, 261)]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = model.get_parameter(name), stock.get_parameter(name)
        assert torch.equal(old[kept], new[kept]) and not torch.equal(old, new)
    receipts = regraft.check(tmp_path / "source", tmp_path / "out")
    assert receipts["holds"] and receipts["rel_logit_diff"] == 0


def test_steps_add_tokens_one_after_the_other(tmp_path: Path) -> None:
    source = Checkpoint.open(save_model(tmp_path / "source"))
    grown = GrowVocab(tokens=WORDS[1:])(
        GrowVocab(tokens=[{"content": "<x>", "special": True}])(source)
    )
    grown.save(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<x>", *WORDS[1:]]) == [259, 260, 261]
    assert tokenizer.decode(tokenizer("a<x>b")["input_ids"], skip_special_tokens=True) == "ab"
    again = GrowVocab(tokens=["hello"])(Checkpoint.open(tmp_path / "out"))
    assert again.sizes["vocab"] == 263
    assert regraft.check(tmp_path / "source", tmp_path / "out")["holds"]


def test_known_tokens_keep_their_rows_and_are_named(tmp_path: Path) -> None:
    source = Checkpoint.open(save_model(tmp_path))
    grown = GrowVocab(tokens=["<eos>", "a", "hello"])(source)
    assert grown.sizes["vocab"] == 260
    assert "2 tokens are in the tokenizer already" in str(grown.history[-1]["notes"])
    with pytest.raises(RegraftError, match="has all 2 tokens already"):
        GrowVocab(tokens=["<eos>", "a"])(source)


@pytest.mark.parametrize("holds", ["exp_avg", "exp_avg_sq"])
def test_moments_of_new_rows_begin_as_those_of_new_entries_do(holds: Any) -> None:
    value = torch.rand(5, 3)
    new = extend_rows(value, VocabRows(5, 8, "mean", {6: (0, 1)}), holds)[5:]
    assert torch.allclose(new, value.mean() if holds == "exp_avg_sq" else torch.zeros(()))


def test_a_target_config_may_have_more_rows(tmp_path: Path) -> None:
    tiny("llama")[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    for vocab in (128, 90):
        (tmp_path / "config.json").write_text(json.dumps(source.config | {"vocab_size": vocab}))
        if vocab == 128:
            assert Growth(to=str(tmp_path))(source).sizes == source.sizes | {"vocab": 128}
    with pytest.raises(RegraftError, match="has vocab 90, the source 97: growth never shrinks"):
        Growth(to=str(tmp_path))(source)


REFUSED: list[tuple[list[str], str | None, str]] = [
    (["--vocab", "50"], None, "--vocab 50 is smaller than the source's 259.*give 259 or more"),
    (["--vocab", "260"], "a b\nc d\n", "no row for the last of 2 .* id is 260: give 261"),
    (["--vocab-init", "zero", "--layers", "5"], None, "would change nothing: give --vocab"),
    ([], "", "names no token"),
    ([], "one\n\ntwo\n", "token 2 of .* is empty"),
    ([], "one\none\n", "token 2 of .* is 'one' again"),
    ([], '["one", {"contents": "x"}]', "token 2 of .*content"),
    ([], '[{"content": "x", "size": 3}]', "has 'size': use content"),
    ([], '{"one": 1}', "list"),
]


@pytest.mark.parametrize(("flags", "text", "says"), REFUSED, ids=str)
def test_what_cannot_be_is_one_line(
    flags: list[str], text: str | None, says: str, tmp_path: Path, capsys: Any
) -> None:
    source = save_model(tmp_path / "source")
    if text is not None:
        file = tmp_path / ("words.json" if text[:1] in ("[", "{") else "words.txt")
        file.write_text(text, encoding="utf-8")
        flags = [*flags, "--add-tokens", str(file)]
    line = refused(capsys, "grow", source, tmp_path / "out", *flags)
    assert re.search(says, line), line
    assert not (tmp_path / "out").exists()


def test_perplexity_and_kl_are_those_over_the_old_tokens_at_most(tmp_path: Path) -> None:
    """Of one added row: the teacher's KL to the grown model is what the row takes, ln(1 + 1/259)."""
    source = save_model(tmp_path / "source", layers=1)
    GrowVocab(vocab=260)(Checkpoint.open(source)).save(tmp_path / "out")
    found = evaluate(str(tmp_path / "out"), str(source), None, 1, 64)
    assert 0 < found["kl"] <= math.log(1 + 1 / 259) + 1e-6


def test_models_without_vocabulary_or_tokenizer_are_refused(tmp_path: Path) -> None:
    tiny("vit")[1].save_pretrained(tmp_path / "vit")
    with pytest.raises(RegraftError, match="vit reads pixels and has no vocabulary"):
        GrowVocab(vocab=10)(Checkpoint.open(tmp_path / "vit"))
    tiny("llama")[1].save_pretrained(tmp_path / "llama")
    with pytest.raises(RegraftError, match="no tokenizer in"):
        GrowVocab(tokens=WORDS)(Checkpoint.open(tmp_path / "llama"))
