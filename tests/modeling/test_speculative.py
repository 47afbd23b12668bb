"""A draft changes the pace of a text, never the text: greedy and sampled, whatever is converted."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused, run_main
from helpers.remixes import BESIDE, REMIXES
from helpers.tiny import byte_tokenizer, save_model, tiny, tokens
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.modeling.generate import generate
from regraft.modeling.growing_cache import GrowingLayer, build_growing_cache
from regraft.modeling.packed_attention import NAME, packed_attention_in
from regraft.modeling.speculative import (
    MOST,
    Block,
    DraftModel,
    Pace,
    decoding_bytes,
    share_weights,
)

FAMILIES = ("llama", "gemma2", "gemma3_text", "granite_swa", "mistral", "gpt2", "mixtral")
FREE = 10**12  # bytes of a source beside which drafting costs nothing: blocks are long


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speculative")


@pytest.fixture(scope="module")
def source(place: Path) -> tuple[Checkpoint, PreTrainedModel]:
    folder = save_model(place / "llama", layers=2)
    return Checkpoint.open(folder), modeling.load(folder)


def verified(
    source: PreTrainedModel, model: PreTrainedModel, prompt: Tensor, **options: Any
) -> tuple[Tensor, DraftModel]:
    """The text, and the draft with its blocks."""
    cache = build_growing_cache(source.config)
    draft = DraftModel(model, options.pop("source_bytes", FREE), cache, options.pop("bos", None))
    with packed_attention_in(source):
        text = source.generate(
            prompt, assistant_model=draft, **{modeling.CACHE: cache}, **arguments(prompt, options)
        )
    draft.learn(text)
    return text, draft


def arguments(prompt: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    usual = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    return usual | {"attention_mask": torch.ones_like(prompt)} | options


def own_text(source: PreTrainedModel, prompt: Tensor, **options: Any) -> Tensor:
    text: Tensor = source.generate(prompt, **arguments(prompt, options))
    return text


@pytest.mark.parametrize("name", REMIXES | BESIDE)
def test_greedy_text_with_every_mixer(source, name):
    checkpoint, teacher = source
    student = modeling.materialize((REMIXES | BESIDE)[name](checkpoint))
    prompt = tokens(1, 21, 259)
    text, draft = verified(teacher, student, prompt, max_new_tokens=14)
    assert torch.equal(text, own_text(teacher, prompt, max_new_tokens=14))
    # The source gives the last token alone, where no other could follow a drafted one.
    given = sum(block.accepted + 1 for block in draft.blocks)
    assert given >= text.shape[1] - 21 - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_of_every_kind_of_source(place, family):
    """Layers that slide, caps, learned sinks, experts, positions from a table."""
    folder = save_model(place / f"source-{family}", family, layers=3)
    teacher, attention = modeling.load(folder), {}
    attention["before"] = teacher.config._attn_implementation
    student = modeling.materialize(Remix("window", "1", window=8, sinks=2)(Checkpoint.open(folder)))
    drafted = []
    for seed in range(2):
        prompt = tokens(1, 25, 259, seed)
        text, draft = verified(teacher, student, prompt, max_new_tokens=24)
        assert torch.equal(text, own_text(teacher, prompt, max_new_tokens=24))
        drafted += draft.blocks
    assert any(0 < block.accepted < block.drafted for block in drafted)
    assert teacher.config._attn_implementation == attention["before"]


def test_greedy_text_of_many_prompts(source):
    checkpoint, teacher = source
    student = modeling.materialize(Remix("gated_deltanet", "0", window=16, sinks=2)(checkpoint))
    blocks = []
    for seed in range(12):
        prompt = tokens(1, 3 + 4 * seed, 259, seed)
        text, draft = verified(teacher, student, prompt, max_new_tokens=12)
        assert torch.equal(text, own_text(teacher, prompt, max_new_tokens=12))
        blocks += draft.blocks
    assert max(block.accepted for block in blocks) > 1
    assert min(block.accepted for block in blocks) == 0


def test_a_model_that_drafts_for_itself_is_always_right(source):
    """Also past the end of a block, of the text, and behind a token that only the draft reads."""
    teacher = source[1]
    prompt = tokens(1, 9, 259)
    text, draft = verified(teacher, copy.deepcopy(teacher), prompt, max_new_tokens=40)
    assert all(block.accepted == block.drafted for block in draft.blocks)
    assert max(block.drafted for block in draft.blocks) > 4
    assert torch.equal(text, own_text(teacher, prompt, max_new_tokens=40))
    other, draft = verified(teacher, copy.deepcopy(teacher), prompt, bos=1, max_new_tokens=40)
    assert torch.equal(text, other) and draft.cache.get_seq_length() <= text.shape[1]


def test_the_end_of_a_text_inside_a_block(source):
    teacher, student = source[1], copy.deepcopy(source[1])
    prompt = tokens(1, 9, 259)
    wanted = own_text(teacher, prompt, max_new_tokens=30)
    for length in (1, 2, 3, 8):
        text, draft = verified(teacher, student, prompt, max_new_tokens=length)
        assert torch.equal(text, wanted[:, : 9 + length])
    for place in (11, 16, 19):
        options = {"eos_token_id": int(wanted[0, place]), "max_new_tokens": 30}
        text, draft = verified(teacher, student, prompt, **options)
        assert torch.equal(text, own_text(teacher, prompt, **options))
        assert all(block.accepted == block.drafted for block in draft.blocks)


def test_taking_tokens_back_computes_nothing(source, monkeypatch):
    """A step of the draft for every token that it drafts, and one more behind a whole block."""
    checkpoint, teacher = source
    student = modeling.materialize(Remix("gated_deltanet", "none", window=8, sinks=2)(checkpoint))
    calls = []
    step = DraftModel.step
    monkeypatch.setattr(
        DraftModel, "step", lambda self, ids: calls.append(ids.shape) or step(self, ids)
    )
    student.model.layers[0].self_attn.mixer.register_forward_hook(lambda *_: calls.append("mixed"))
    _, draft = verified(teacher, student, tokens(1, 21, 259), max_new_tokens=30)
    steps = [one for one in calls if one != "mixed"]
    whole = sum(block.accepted == block.drafted for block in draft.blocks[:-1])
    assert steps[0] == (1, 21) and set(steps[1:]) == {(1, 1)}
    assert len(steps) == sum(block.drafted for block in draft.blocks) + whole
    assert calls.count("mixed") == len(steps)


def draw_pairs(place: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Source and draft of five words, which see the last two."""
    models = []
    for seed in range(2):
        keys = {"sliding_window": 2, "eos_token_id": None, "bos_token_id": None}
        _, model = tiny("mistral", layers=1, vocab=5, seed=seed, **keys)
        model.lm_head.weight.data *= 0.3
        models.append(model)
    return models[0], models[1]


def test_sampled_text_has_the_distribution_of_the_source(place):
    """Chi-square of every word given the two before it; the draft's own words would not do."""
    teacher, student = draw_pairs(place)
    torch.manual_seed(0)
    prompt = torch.tensor([[0, 1]])
    options = {"do_sample": True, "max_new_tokens": 900, "eos_token_id": None}
    text, draft = verified(teacher, student, prompt, **options)
    counts = torch.zeros(5, 5, 5)
    for a, b, c in text[0].unfold(0, 3, 1).tolist():
        counts[a, b, c] += 1

    contexts = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    # Position and a third word do not matter: there are two before, and attention is relative.
    found = {}
    for name, model in {"source": teacher, "draft": student}.items():
        with torch.no_grad():
            chance = model(contexts).logits[:, -1].softmax(-1).view(5, 5, 5)
        expected = chance * counts.sum(-1, keepdim=True)
        large = expected > 2
        found[name] = float(((counts - expected) ** 2 / expected.clamp(min=1e-9))[large].sum())
        freedom = int(large.sum() - large.any(-1).sum())
        limit = freedom + 3.3 * (2 * freedom) ** 0.5  # about one in two thousand
        assert (found[name] < limit) == (name == "source"), (found, limit)
    assert any(block.accepted < block.drafted for block in draft.blocks)
    assert any(block.accepted for block in draft.blocks)


def test_sampled_text_depends_on_the_seed_alone(source):
    checkpoint, teacher = source
    student = modeling.materialize(Remix("window", "none", window=8, sinks=2)(checkpoint))
    texts = []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(verified(teacher, student, tokens(1, 9, 259), do_sample=True)[0])
    assert torch.equal(*texts)


def pace_of(chance: float, cost: float, blocks: int = 400) -> tuple[float, float]:
    """(tokens a step of the source, mean length of a block) where every token has one chance."""
    generator = torch.Generator().manual_seed(0)
    pace, tokens, spent, drafted = Pace(), 0, 0.0, 0
    for _ in range(blocks):
        length, survives = 1, pace.chance(chance)
        while length < MOST and pace.goes_on(survives, cost):
            length, survives = length + 1, survives * pace.chance(chance)
        right = (torch.rand(length, generator=generator) < chance).tolist()
        accepted = right.index(False) if False in right else length
        pace.record([chance] * length, accepted, cost)
        tokens, spent, drafted = tokens + accepted + 1, spent + 1 + cost * length, drafted + length
    return tokens / spent, drafted / blocks


@pytest.mark.parametrize("chance", [0.2, 0.6, 0.9])
@pytest.mark.parametrize("cost", [0.03, 0.2, 0.6])
def test_blocks_are_about_as_long_as_is_best(chance, cost):
    """Nine tenths of what the best fixed length would give, which is known in closed form."""
    best = max(
        (1 - chance ** (length + 1)) / (1 - chance) / (1 + cost * length)
        for length in range(1, MOST + 1)
    )
    assert pace_of(chance, cost)[0] > 0.9 * best


def test_blocks_are_longer_where_more_is_accepted_and_where_drafting_is_cheap():
    lengths = [[pace_of(chance, cost)[1] for cost in (0.6, 0.1, 0.02)] for chance in (0.3, 0.9)]
    assert lengths[0] == sorted(lengths[0]) and lengths[1] == sorted(lengths[1])
    assert all(few < many for few, many in zip(*lengths, strict=True))
    assert pace_of(0.1, 1.5)[1] == pytest.approx(1, abs=0.05)


def test_equal_weights_are_held_once(source):
    checkpoint, teacher = source
    student = modeling.materialize(Remix("gated_deltanet", "0", window=8, sinks=2)(checkpoint))
    before = student(tokens(1, 30, 259)).logits
    with torch.no_grad():
        student.model.norm.weight[0] += 1e-3
    changed = student(tokens(1, 30, 259)).logits
    shared, total = share_weights(student, teacher)
    names = dict(student.named_parameters())
    places = {parameter.data_ptr() for parameter in teacher.parameters()}
    held = {name for name, parameter in names.items() if parameter.data_ptr() in places}
    assert shared == sum(names[name].nbytes for name in held) and 0.8 * total < shared < total
    assert "model.norm.weight" not in held and "model.embed_tokens.weight" in held
    assert "model.layers.1.self_attn.mixer.window.q_proj.weight" in held
    assert not torch.equal(before, changed)
    assert torch.equal(student(tokens(1, 30, 259)).logits, changed)


def test_bytes_that_a_step_reads():
    for tied in (False, True):
        _, model = tiny("llama", tie_word_embeddings=tied)
        whole = sum(parameter.nbytes for parameter in model.parameters())
        embedding = 0 if tied else model.get_input_embeddings().weight.nbytes
        assert decoding_bytes(model) == whole - embedding


@pytest.mark.parametrize("family", FAMILIES)
def test_a_growing_cache_and_packed_attention_change_no_number(family):
    config, model = tiny(family)
    rows, sizes = tokens(2, 70), (20, 1, 7, 5, 1, 30)
    kept: DynamicCache = DynamicCache(config=config)
    grown = build_growing_cache(config)
    assert any(type(layer) is GrowingLayer for layer in grown.layers) or family == "mistral"
    caches = (kept, grown)
    for cache in caches:
        cache.activate_past_recording()
    begin = 0
    for size in sizes:
        logits = []
        for number, cache in enumerate(caches):
            part = {modeling.CACHE: cache, "use_cache": True}
            with torch.no_grad():
                if number:
                    with packed_attention_in(model):
                        assert model.config._attn_implementation in (NAME, "eager")
                        logits.append(model(rows[:, begin : begin + size], **part).logits)
                else:
                    logits.append(model(rows[:, begin : begin + size], **part).logits)
            cache.crop(-(size // 3))
        begin += size - size // 3
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
        assert grown.get_seq_length() == kept.get_seq_length() == begin


def test_a_growing_layer_whose_rows_change():
    stock, ours = DynamicCache(), DynamicCache()
    stock.layers, ours.layers = [type(stock.layer_class_to_replicate())()], [GrowingLayer()]
    for step in range(6):
        rows = 4 if step > 2 else 2
        new = torch.randn(rows, 3, 1 + 100 * step, 8)
        for cache in (stock, ours):
            found = cache.update(new, 2 * new, 0)
            if step == 2:
                cache.batch_repeat_interleave(2)
            if step == 4:
                cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
            cache.crop(-step)
        for name in ("keys", "values"):
            a, b = (getattr(cache.layers[0], name) for cache in (stock, ours))
            assert torch.equal(a, b)
        assert found[0].shape[2] == ours.get_seq_length() + step


def test_generate_verify_says_what_it_did(place, capsys):
    folder = save_model(place / "cli", layers=2)
    words = ["linearize", folder, place / "linear", "--keep", "0", "--window", "16"]
    assert run_main(capsys, *words)[0] == 0
    words = [place / "linear", "the quick brown fox", "--tokens", 12]
    own = run_main(capsys, "generate", folder, *words[1:])[1]
    code, text, err = run_main(capsys, "generate", *words, "--verify", folder)
    assert code == 0 and text == own
    assert "held once" in err and "drafted tokens accepted" in err
    numbers = as_json(capsys, "generate", *words, "--verify", folder)
    assert numbers["text"] + "\n" == own and numbers["tokens"] == 12
    assert sum(Block(**block).accepted for block in numbers["blocks"]) > 0
    sampled = [
        as_json(capsys, "generate", *words, "--verify", folder, "--temperature", 0.8)["text"]
        for _ in range(2)
    ]
    assert sampled[0] == sampled[1]


def test_models_of_other_tokens_are_refused(place, capsys):
    folder = save_model(place / "mine", layers=2)
    other = place / "other"
    tiny("llama", layers=2, vocab=300)[1].save_pretrained(other)
    for file in folder.glob("token*"):
        (other / file.name).write_bytes(file.read_bytes())
    line = refused(capsys, "generate", folder, "abc", "--verify", other)
    assert "cannot draft for" in line and "259 and 300 tokens" in line

    renamed = save_model(place / "renamed", layers=2)
    file = renamed / "tokenizer.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    words = settings["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    line = refused(capsys, "generate", folder, "abc", "--verify", renamed)
    assert "other vocabularies" in line and "'A'" in line
    encoder = place / "bert"
    tiny("bert", layers=2)[1].save_pretrained(encoder)
    assert "give a decoder" in refused(capsys, "generate", folder, "abc", "--verify", encoder)


def test_a_source_with_a_recurrent_state_of_its_own_is_refused(source, monkeypatch):
    checkpoint, teacher = source
    recurrent = modeling.materialize(Remix("gated_deltanet", "0", window=0)(checkpoint))
    monkeypatch.setattr(modeling.MixerState, "is_croppable", False)
    with pytest.raises(RegraftError, match=r"cannot verify.*can be cropped.*keep keys and values"):
        generate(teacher, byte_tokenizer(), "abc", 4, source=recurrent)


def test_a_draft_is_an_assistant_without_a_cache(source):
    """transformers takes back tokens of the caches that it knows; this one is the draft's own."""
    teacher = source[1]
    draft = DraftModel(teacher, FREE, build_growing_cache(teacher.config))
    config = GenerationConfig(do_sample=False, eos_token_id=2)
    out = draft.generate(tokens(1, 5, 259), [], 3, config)
    assert out.cache is None and out.sequences.shape[1] == 5 + len(out.scores)
    assert draft.relative_cost() < 1e-3
