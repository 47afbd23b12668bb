"""What people do with a Llama, done with a stock one and with linearized ones: a row each.

Stock Llama is the control: a row that it does not pass is no row.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.remixes import BESIDE, REMIXES
from helpers.tiny import save_model
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError

STOCK = "stock"
TOLERANCE = 1e-4  # of the largest logit


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models by name, the stock one first."""
    place = tmp_path_factory.mktemp("behaviours")
    found = {STOCK: save_model(place / STOCK, layers=2)}
    for name, remix in (REMIXES | BESIDE).items():
        remix(Checkpoint.open(found[STOCK])).save(place / name)
        found[name] = place / name
    return found


@pytest.fixture(scope="module")
def loaded() -> dict[str, PreTrainedModel]:
    """Models by name, for `model` to copy."""
    return {}


@pytest.fixture
def model(
    request: pytest.FixtureRequest,
    folders: dict[str, Path],
    loaded: dict[str, PreTrainedModel],
) -> PreTrainedModel:
    """One of a test's own."""
    name = request.param
    if name not in loaded:
        loaded[name] = load(folders[name])
    return copy.deepcopy(loaded[name])


def load(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    assert modeling  # imported: its classes are registered
    options = {"dtype": torch.float32, "trust_remote_code": False} | options
    return auto.from_pretrained(folder, **options).eval()


def ids(model: PreTrainedModel, rows: int = 2, length: int = 21, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> None:
    a, b = a.detach().float(), b.detach().float()
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def logits(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, **options).logits


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of several lengths as one batch, and its mask."""
    width = max(len(row) for row in rows)
    tokens, mask = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long()
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[number, place], mask[number, place] = row, 1
    return tokens, mask


def greedy(model: PreTrainedModel, tokens: Tensor, **options: Any) -> Tensor:
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False} | options
    options.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, pad_token_id=0, **options)


# The rows: each takes a model and its folder.


def padding_left(model: PreTrainedModel, folder: Path) -> None:
    rows = [ids(model, 1, 21)[0], ids(model, 1, 13, seed=1)[0]]
    tokens, mask = pad(rows, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, tokens, attention_mask=mask, position_ids=positions)
    for number, row in enumerate(rows):
        close(found[number, -len(row) :], logits(model, row[None])[0])


def padding_left_without_positions(model: PreTrainedModel, folder: Path) -> None:
    """Only relative positions matter to a Llama."""
    rows = [ids(model, 1, 21)[0], ids(model, 1, 13, seed=1)[0]]
    tokens, mask = pad(rows, "left")
    found = logits(model, tokens, attention_mask=mask)
    for number, row in enumerate(rows):
        close(found[number, -len(row) :], logits(model, row[None])[0])


def padding_right(model: PreTrainedModel, folder: Path) -> None:
    rows = [ids(model, 1, 21)[0], ids(model, 1, 13, seed=1)[0]]
    tokens, mask = pad(rows, "right")
    found = logits(model, tokens, attention_mask=mask)
    for number, row in enumerate(rows):
        close(found[number, : len(row)], logits(model, row[None])[0])


def padding_between(model: PreTrainedModel, folder: Path) -> None:
    row = ids(model, 1, 21)[0]
    mask = torch.ones(1, 29).long()
    mask[0, 9:14] = mask[0, 20:23] = 0
    tokens = torch.zeros(1, 29).long()
    tokens[0, mask[0] == 1] = row
    positions = mask.cumsum(1) - 1
    found = logits(model, tokens, attention_mask=mask, position_ids=positions)
    close(found[0, mask[0] == 1], logits(model, row[None])[0])


def second_turn_padded_left(model: PreTrainedModel, folder: Path) -> None:
    """Two turns of a batch on one cache, each padded on the left."""
    turns = [
        [ids(model, 1, n, seed=s)[0] for n, s in turn]
        for turn in ([(9, 0), (5, 1)], [(4, 2), (11, 3)])
    ]
    cache, masks = DynamicCache(config=model.config), []
    for turn in turns:
        tokens, mask = pad(turn, "left")
        masks.append(mask)
        whole = torch.cat(masks, 1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        found = logits(
            model, tokens, attention_mask=whole, position_ids=positions, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
    for number in range(2):
        row = torch.cat([turn[number] for turn in turns])
        last = len(turns[1][number])
        close(found[number, -last:], logits(model, row[None])[0, -last:])


def packed(model: PreTrainedModel) -> tuple[list[Tensor], Tensor, Tensor]:
    rows = [ids(model, 1, n, seed=n)[0] for n in (11, 6, 9)]
    return rows, torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]


def packing(model: PreTrainedModel, folder: Path) -> None:
    rows, tokens, positions = packed(model)
    found = logits(model, tokens, position_ids=positions, use_cache=False)[0]
    close(found, torch.cat([logits(model, row[None])[0] for row in rows]))


def packing_with_the_default_cache(model: PreTrainedModel, folder: Path) -> None:
    rows, tokens, positions = packed(model)
    model.config.use_cache = False  # as stock Llama needs it
    found = logits(model, tokens, position_ids=positions)[0]
    close(found, torch.cat([logits(model, row[None])[0] for row in rows]))


def backbone_packed_and_padded(model: PreTrainedModel, folder: Path) -> None:
    rows, tokens, positions = packed(model)
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = model.get_decoder()(input_ids=tokens, position_ids=positions, use_cache=False)
        close(
            head(hidden.last_hidden_state),
            logits(model, tokens, position_ids=positions, use_cache=False),
        )
        tokens, mask = pad(rows, "left")
        hidden = model.get_decoder()(input_ids=tokens, attention_mask=mask).last_hidden_state
        close(head(hidden)[mask == 1], logits(model, tokens, attention_mask=mask)[mask == 1])
    assert model.base_model is model.get_decoder()


def prefill_in_chunks(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    whole = logits(model, tokens)
    for split in ([1] * 11 + [10], [5, 1, 9, 6], [20, 1], [2, 19]):
        cache = DynamicCache(config=model.config)
        pieces = [
            logits(model, piece, past_key_values=cache, use_cache=True)
            for piece in tokens.split(split, 1)
        ]
        close(torch.cat(pieces, 1), whole)


def prefix_reuse(model: PreTrainedModel, folder: Path) -> None:
    tokens, other = ids(model, 1), ids(model, 1, 7, seed=5)
    cache = DynamicCache(config=model.config)
    logits(model, tokens, past_key_values=cache, use_cache=True)
    again = logits(model, other, past_key_values=copy.deepcopy(cache), use_cache=True)
    close(again, logits(model, torch.cat([tokens, other], 1))[:, 21:])
    close(logits(model, other, past_key_values=cache, use_cache=True), again)


def greedy_with_and_without_cache(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    assert torch.equal(greedy(model, tokens), greedy(model, tokens, use_cache=False))


def greedy_padded_left(model: PreTrainedModel, folder: Path) -> None:
    rows = [ids(model, 1, 21)[0], ids(model, 1, 13, seed=1)[0]]
    tokens, mask = pad(rows, "left")
    found = greedy(model, tokens, attention_mask=mask)
    for number, row in enumerate(rows):
        assert torch.equal(found[number, 21:], greedy(model, row[None])[0, len(row) :])


def beams(model: PreTrainedModel, folder: Path) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    tokens = ids(model)
    found = greedy(model, tokens, **options)
    assert found.shape[0] == 4
    assert torch.equal(found, greedy(model, tokens, use_cache=False, **options))


def sampling(model: PreTrainedModel, folder: Path) -> None:
    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        found.append(
            greedy(model, ids(model), do_sample=True, num_return_sequences=3, use_cache=cached)
        )
    assert torch.equal(*found) and found[0].shape[0] == 6


class Listener(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def streaming(model: PreTrainedModel, folder: Path) -> None:
    listener = Listener()
    found = greedy(model, ids(model, 1), streamer=listener)
    assert listener.tokens == found[0].tolist() and listener.ended


def guidance(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model, 1)
    found = greedy(model, tokens, guidance_scale=1.5)
    assert torch.equal(found, greedy(model, tokens, guidance_scale=1.5, use_cache=False))


def embeddings_given(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    with torch.no_grad():
        found = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    close(found, logits(model, tokens))
    assert torch.equal(
        model.generate(
            inputs_embeds=model.get_input_embeddings()(tokens),
            attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False,
            pad_token_id=0,
        ),
        greedy(model, tokens, max_new_tokens=5, min_new_tokens=0)[:, 21:],
    )  # fmt: skip


def hidden_states(model: PreTrainedModel, folder: Path) -> None:
    with torch.no_grad():
        found = model(input_ids=ids(model), output_hidden_states=True)
    assert len(found.hidden_states) == model.config.num_hidden_layers + 1
    close(model.get_output_embeddings()(found.hidden_states[-1]), found.logits)


def loss_and_gradients(model: PreTrainedModel, folder: Path) -> None:
    """With gradient checkpointing of both kinds the same, with the default of use_cache too."""
    found = []
    for reentrant in (None, False, True):
        model.zero_grad()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # as a reentrant checkpoint needs
        model.train()
        tokens = ids(model)
        model(input_ids=tokens, labels=tokens).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for grads in found[1:]:
        assert grads.keys() == found[0].keys()
        for name, value in found[0].items():
            torch.testing.assert_close(grads[name], value, rtol=1e-4, atol=1e-6)


def other_dtypes(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    wanted = logits(model, tokens)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        for other in (load(folder, dtype=dtype), copy.deepcopy(model).to(dtype)):
            assert {p.dtype for p in other.parameters()} == {dtype}
            found = logits(other, tokens)
            assert found.dtype == dtype
            # On average: a sum of features that is nearly zero magnifies the rounding of one token.
            assert (found.float() - wanted).abs().mean() <= tolerance * wanted.abs().mean()
            greedy(other, tokens, max_new_tokens=2, min_new_tokens=2)


def copies_and_pickles(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, tokens), logits(model, tokens))
        assert type(other) is type(model)


def save_and_load(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    model.save_pretrained(folder / "again")
    again = load(folder / "again")
    assert type(again) is type(model) and torch.equal(logits(again, tokens), logits(model, tokens))
    with torch.no_grad():
        backbone = load(folder / "again", AutoModel)(input_ids=tokens).last_hidden_state
    close(model.get_output_embeddings()(backbone), logits(model, tokens))


def embeddings_resized(model: PreTrainedModel, folder: Path) -> None:
    tokens, size = ids(model), model.config.vocab_size
    before = logits(model, tokens)
    model.resize_token_embeddings(size + 5, mean_resizing=False)
    assert model.config.vocab_size == size + 5
    model.save_pretrained(folder / "resized")
    close(logits(load(folder / "resized"), tokens)[..., :size], before)


def classifier(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    found = load(folder, AutoModelForSequenceClassification, num_labels=4)
    assert found.config.num_labels == 4
    found.config.pad_token_id = 0
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens).last_hidden_state
        close(found.score(hidden)[:, -1], found(input_ids=tokens).logits)


def rolled_back(model: PreTrainedModel, folder: Path) -> None:
    """Tokens are taken back, also a part of what was read at once."""
    tokens = ids(model, 1)
    for pieces, less in (([15], 3), ([10, 1, 1, 3], 4), ([6, 6], 6)):
        cache, length = DynamicCache(config=model.config), sum(pieces)
        cache.activate_past_recording()
        for piece in tokens[:, :length].split(pieces, 1):
            logits(model, piece, past_key_values=cache, use_cache=True)
        cache.crop(-less)
        assert cache.get_seq_length() == length - less
        found = logits(model, tokens[:, length - less :], past_key_values=cache, use_cache=True)
        close(found, logits(model, tokens)[:, length - less :])


def static_cache(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model, 1)
    found = greedy(model, tokens, cache_implementation="static")
    assert torch.equal(found, greedy(model, tokens))


def named_caches(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model, 1)
    wanted = greedy(model, tokens)
    for name in ("dynamic", "sliding_window", "hybrid"):
        assert torch.equal(greedy(model, tokens, cache_implementation=name), wanted)


def attention_implementations(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model, 1)
    wanted, chosen = logits(model, tokens), greedy(model, tokens)
    for name in ("eager", "sdpa", "flex_attention"):
        other = load(folder, attn_implementation=name)
        close(logits(other, tokens), wanted)
        # Behind a cache, PyTorch's flex kernel gives a stock Llama NaN on some processors.
        if name != "flex_attention":
            assert torch.equal(greedy(other, tokens), chosen)


def exported(model: PreTrainedModel, folder: Path) -> None:
    """The graph is right for a padded batch too."""
    tokens, mask = pad([ids(model, 1, 21)[0], ids(model, 1, 13, seed=1)[0]], "left")
    options = {"attention_mask": mask, "use_cache": False}
    with torch.no_grad():
        graph = torch.export.export(
            model, (), {"input_ids": tokens, **options | {"attention_mask": torch.ones_like(mask)}},
            strict=False,
        ).module()  # fmt: skip
        found = graph(input_ids=tokens, **options).logits
    close(found[mask == 1], logits(model, tokens, **options)[mask == 1])


def autocast(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=tokens, labels=tokens).loss.backward()
        found = greedy(model, tokens, max_new_tokens=2, min_new_tokens=2)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert found.shape[1] == tokens.shape[1] + 2


def draft(model: PreTrainedModel, folder: Path) -> None:
    """Of a stock model's assisted decoding."""
    stock, tokens = load(folder.parent / STOCK), ids(model, 1)
    assert torch.equal(greedy(stock, tokens, assistant_model=model), greedy(stock, tokens))


def target(model: PreTrainedModel, folder: Path) -> None:
    """Of assisted decoding, with a draft that is mostly wrong and with the prompt's own words."""
    stock, tokens = load(folder.parent / STOCK), ids(model, 1)
    wanted = greedy(model, tokens)
    for options in ({"assistant_model": stock}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(greedy(model, tokens, **options), wanted)


def offloaded(model: PreTrainedModel, folder: Path) -> None:
    tokens = ids(model)
    with contextlib.suppress(OSError):
        (folder / "offload").mkdir()
    layers = {name: "cpu" for name, module in model.base_model.named_children() if name != "layers"}
    device_map = {f"{model.base_model_prefix}.{name}": place for name, place in layers.items()}
    device_map |= {
        f"{model.base_model_prefix}.layers.{i}": "disk" if i else "cpu"
        for i in range(model.config.num_hidden_layers)
    }
    device_map["lm_head"] = "cpu"
    other = load(folder, device_map=device_map, offload_folder=folder / "offload")
    close(logits(other, tokens), logits(model, tokens))


ROWS: dict[str, Callable[[PreTrainedModel, Path], None]] = {
    row.__name__: row
    for row in (
        padding_left,
        padding_left_without_positions,
        padding_right,
        padding_between,
        second_turn_padded_left,
        packing,
        packing_with_the_default_cache,
        backbone_packed_and_padded,
        prefill_in_chunks,
        prefix_reuse,
        greedy_with_and_without_cache,
        greedy_padded_left,
        beams,
        sampling,
        streaming,
        guidance,
        embeddings_given,
        hidden_states,
        loss_and_gradients,
        other_dtypes,
        copies_and_pickles,
        save_and_load,
        embeddings_resized,
        classifier,
        rolled_back,
        static_cache,
        named_caches,
        attention_implementations,
        exported,
        autocast,
        draft,
        target,
        offloaded,
    )
}


# What these rows ask depends on the classes and not on the mixer: some mixers stand for all.
OF_CLASSES = (
    embeddings_given, hidden_states, copies_and_pickles, save_and_load, embeddings_resized,
    classifier, sampling, streaming, guidance,
)  # fmt: skip
# What a window beside a mixer may do another way than the mixer alone.
OF_PAIRS = (
    padding_left, padding_between, second_turn_padded_left, packing, prefill_in_chunks,
    prefix_reuse, greedy_with_and_without_cache, loss_and_gradients, rolled_back,
)  # fmt: skip
# Softmax attention is in these: in kept layers, in windows, or in none (one for all of those).
OF_SOFTMAX = (
    STOCK, "window", "sink_window", "gated_deltanet-window", "qwen3_5", "supra-window",
    "gla-window", "mamba2-heads", "lolcats", "mamba",
)  # fmt: skip
SOME = (STOCK, "window", "gated_deltanet-window", "supra", "mamba", "lolcats")


def is_slow(name: str, row: str) -> bool:
    """Graphs take seconds each: some stand for all in every run."""
    return ROWS[row] in (exported, attention_implementations) and name not in (
        STOCK,
        "gated_deltanet-window",
        "lolcats",
    )


CASES = [
    pytest.param(name, row, marks=[pytest.mark.slow] if is_slow(name, row) else [])
    for name in (STOCK, *REMIXES)
    for row in ROWS
    if (name in SOME or ROWS[row] not in OF_CLASSES)
    and (name in OF_SOFTMAX or ROWS[row] is not attention_implementations)
]
CASES += [pytest.param(name, row) for name in BESIDE for row in ROWS if ROWS[row] in OF_PAIRS]


@pytest.mark.parametrize(("model", "row"), CASES, indirect=["model"])
def test_behaviour(
    row: str, model: PreTrainedModel, folders: dict[str, Path], request: Any
) -> None:
    name = request.node.callspec.params["model"]
    ROWS[row](model, folders[name])


@pytest.mark.parametrize("name", [STOCK, "gated_deltanet-window", "mamba"])
def test_continuous_batching_is_refused(name: str, folders: dict[str, Path]) -> None:
    """The stock class does it; it has no place for the state of a request."""
    model, tokens = (
        load(folders[name]),
        [ids(load(folders[name]), 1, n)[0].tolist() for n in (9, 5)],
    )
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=64)
    options = {"generation_config": config, "continuous_batching_config": sizes, "warmup": False}
    if name != STOCK:
        with pytest.raises(RegraftError, match=r"layers \[.*hold mixers.*use generate\(\)"):
            model.generate_batch(tokens, **options)
        return
    for row, found in zip(tokens, model.generate_batch(tokens, **options).values(), strict=True):
        wanted = greedy(model, torch.tensor([row]), max_new_tokens=4, min_new_tokens=4)
        assert found.generated_tokens == wanted[0, len(row) :].tolist()


def test_readme_has_the_count() -> None:
    """Rows and rows times models; `--collect-only -q` prints them."""
    text = " ".join((Path(__file__).parents[2] / "README.md").read_text("utf-8").split())
    assert f"{len(ROWS)} behaviours in {len(CASES)} cases" in text
