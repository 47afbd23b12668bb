"""One class for all hosts: cached equals uncached, generation in every mode, save and load."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from helpers.tiny import (
    FAMILIES,
    GROWABLE,
    byte_tokenizer,
    max_relative_difference,
    save_model,
    tiny,
    tokens,
)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

import regraft
from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix
from regraft.modeling import mixer_slot, remote_code
from regraft.modeling.generate import generate

TOLERANCE = 1e-5
REMIXES = {
    "hybrid": Remix("gated_deltanet", "0", window=8, sinks=2),
    "none-kept": Remix("gated_deltanet", "none", window=8, sinks=2),
    "supra": Remix("supra", "1", window=0),
}
OTHERS = {
    "retnet": Remix("retnet", "0", window=0),
    "lightning": Remix("lightning", "1", window=8, options={"gate": "sigmoid"}),
    "t2r": Remix("t2r", "0", window=0, options={"feature": 6}),
    "hedgehog": Remix("hedgehog", "none", window=8, options={"grouped": True}),
    "gla": Remix("gla", "1", window=0, options={"rank": 4}),
    "rwkv6": Remix("rwkv6", "none", window=0, options={"rank": 4, "shift_rank": 3}),
    "rwkv6-beside-window": Remix(
        "rwkv6", "0", window=8, options={"decay": "static", "grouped": True}
    ),
    "lolcats": Remix("lolcats", "0", window=0, options={"window": 8, "feature": 4}),
    "mamba": Remix("mamba", "0", window=0),
    "mamba2-beside-window": Remix("mamba2", "0", window=8, options={"layout": "attention"}),
}
# every family with the first, each other mixer with two families, whose turn it is
HOSTED = [(family, remix) for family in FAMILIES for remix in REMIXES.values()]
HOSTED += [
    (FAMILIES[(3 * i + j) % len(FAMILIES)], remix)
    for i, remix in enumerate(OTHERS.values())
    for j in (0, 4)
]
HOSTS = pytest.mark.parametrize(
    ("family", "remix"),
    HOSTED,
    ids=[f"{family}-{remix.mixer}-{remix.window}" for family, remix in HOSTED],
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    for family in FAMILIES:
        tiny(family)[1].save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def linearized(source: Path, remix: Remix) -> torch.nn.Module:
    """A linearized model whose fresh weights are perturbed, so that no gate hides a branch."""
    model = modeling.materialize(remix(Checkpoint.open(source)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for slot in model.slots():
            for parameter in slot.parameters() if hasattr(slot, "mixer") else []:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@HOSTS
@torch.no_grad()
def test_prompt_in_pieces_equals_the_whole(
    sources: dict[str, Path], family: str, remix: Remix
) -> None:
    model, ids = linearized(sources[family], remix), tokens(2, 30)
    whole = model(ids, use_cache=False).logits
    for cuts in ([1] * 12 + [18], [7, 1, 1, 19, 2], [29, 1]):
        cache, parts = None, []
        for piece in ids.split(cuts, 1):
            out = model(piece, **modeling.cache_kwargs(cache), use_cache=True)
            cache = modeling.cache_of(out)
            parts.append(out.logits)
        assert relative(torch.cat(parts, 1), whole) < TOLERANCE
    assert cache.get_seq_length() == 30


@HOSTS
@torch.no_grad()
def test_generation(sources: dict[str, Path], family: str, remix: Remix) -> None:
    model, ids = linearized(sources[family], remix), tokens(2, 20)
    model.generation_config.eos_token_id = None
    arguments = {"max_new_tokens": 4, "do_sample": False}
    greedy = model.generate(ids, **arguments)
    assert torch.equal(greedy, model.generate(ids, use_cache=False, **arguments))
    beams = model.generate(ids, num_beams=3, **arguments)
    assert torch.equal(beams, model.generate(ids, num_beams=3, use_cache=False, **arguments))
    assert model.generate(ids, max_new_tokens=4, do_sample=True, top_k=20).shape == (2, 24)
    padded = torch.cat((torch.zeros(2, 5, dtype=torch.long), ids), 1)
    padded[1, 5:] = torch.cat((torch.zeros(3, dtype=torch.long), ids[1, 3:]))
    mask = torch.ones_like(padded)
    mask[0, :5], mask[1, :8] = 0, 0
    batched = model.generate(padded, attention_mask=mask, **arguments)
    assert torch.equal(batched[0, 25:], greedy[0, 20:])
    alone = model.generate(ids[1:, 3:], **arguments)
    assert torch.equal(batched[1, 25:], alone[0, 17:])


@pytest.mark.parametrize(
    ("family", "keep"), [("qwen3", "0"), ("mistral", "0"), ("gemma2", "0"), ("gemma2", "none")]
)
@torch.no_grad()
def test_static_caches_of_layers_of_several_types(family: str, keep: str, tmp_path: Path) -> None:
    """A mask for each type of layer, sliding windows that overflow, padding on the left."""
    tiny(family)[1].save_pretrained(tmp_path)
    model = linearized(tmp_path, Remix("gated_deltanet", keep, window=8))
    model.generation_config.eos_token_id = None
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :6] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    assert torch.equal(
        model.generate(ids, cache_implementation="static", **arguments),
        model.generate(ids, **arguments),
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_documents_equal_documents_alone(sources: dict[str, Path], family: str) -> None:
    model, ids = linearized(sources[family], REMIXES["hybrid"]), tokens(1, 50)
    positions = torch.cat([torch.arange(n) for n in (20, 30)]).unsqueeze(0)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    for part in (slice(0, 20), slice(20, 50)):
        assert relative(packed[:, part], model(ids[:, part], use_cache=False).logits) < TOLERANCE


@torch.no_grad()
def test_state_bytes_do_not_depend_on_length(sources: dict[str, Path]) -> None:
    model, sizes = linearized(sources["llama"], REMIXES["hybrid"]), []
    for length in (30, 300):
        cache = modeling.cache_of(model(tokens(1, length), use_cache=True))
        sizes.append(modeling.state_bytes(cache))
    (kept, *converted), (kept_long, *converted_long) = sizes
    assert converted == converted_long and kept_long == 10 * kept


def test_save_and_load_through_auto_classes(sources: dict[str, Path], tmp_path: Path) -> None:
    Remix("gated_deltanet", "0", window=8)(Checkpoint.open(sources["qwen3"])).save(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(model, modeling.RegraftForCausalLM)
    ids = tokens(1, 30)
    logits = model(ids).logits
    assert torch.equal(regraft.load(str(tmp_path / "out"))(ids).logits, logits)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()(ids).logits, logits
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_saved_model_opens_as_a_checkpoint(
    sources: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model, ids = linearized(sources[family], REMIXES["hybrid"]), tokens(1, 12)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        modeling.materialize(Checkpoint.open(tmp_path))(ids).logits, model(ids).logits
    )


@pytest.mark.parametrize("remix", OTHERS.values(), ids=OTHERS)
@torch.no_grad()
def test_every_mixer_saves_loads_and_generates(
    sources: dict[str, Path], tmp_path: Path, remix: Remix
) -> None:
    model, ids = linearized(sources["qwen2"], remix), tokens(1, 12)
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(ids, **greedy), model.generate(ids, **greedy))


@pytest.mark.parametrize("remix", OTHERS.values(), ids=OTHERS)
def test_remote_code_brings_all_that_it_imports(
    sources: dict[str, Path], tmp_path: Path, remix: Remix
) -> None:
    remote_code.write_remote_code(tmp_path, remix(Checkpoint.open(sources["llama"])).config)
    for file in tmp_path.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert all((tmp_path / f"{name}.py").is_file() for name in names), (
                    file.name,
                    names,
                )


def test_wrong_uses_are_refused(sources: dict[str, Path]) -> None:
    model, ids = linearized(sources["llama"], REMIXES["hybrid"]), tokens(1, 4)
    with pytest.raises(RegraftError, match=r"attention_mask has shape \(1, 4, 4\)"):
        model(ids, attention_mask=torch.ones(1, 4, 4))
    with pytest.raises(RegraftError, match="StaticLayer.*DynamicCache"):
        model(
            ids,
            **modeling.cache_kwargs(
                StaticCache(config=AutoConfig.from_pretrained(sources["llama"]), max_cache_len=8)
            ),
        )
    with (
        pytest.raises(RegraftError, match="no branch 'linera'"),
        modeling.force_branch(model, "linera"),
    ):
        pass
    cache = DynamicCache(config=model.config)
    model(ids, **modeling.cache_kwargs(cache))
    with pytest.raises(ValueError, match="cannot take 2 tokens back"):
        cache.crop(-2)


@torch.no_grad()
def test_the_cache_has_two_names_and_reaches_every_mixer(
    sources: dict[str, Path], monkeypatch
) -> None:
    model, ids = linearized(sources["gpt_neox"], REMIXES["hybrid"]), tokens(1, 6)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    logits = [
        model(ids, **{name: one}).logits
        for name, one in zip(("cache", "past_key_values"), caches, strict=True)
    ]
    assert torch.equal(*logits) and caches[0].get_seq_length() == caches[1].get_seq_length() == 6
    with pytest.raises(RegraftError, match="two names of one thing"):
        model.base_model(ids, cache=caches[0], past_key_values=caches[1])
    monkeypatch.setattr(mixer_slot, "CACHES", ("renamed",))
    with pytest.raises(RegraftError, match="hands no cache to attention under the names renamed"):
        model(ids)


@torch.no_grad()
def test_branch_switch_is_undone(sources: dict[str, Path]) -> None:
    model, ids = linearized(sources["llama"], REMIXES["hybrid"]), tokens(1, 40)
    free = model(ids).logits
    with modeling.force_branch(model, "window"):
        window = model(ids).logits
    assert not torch.equal(free, window) and torch.equal(model(ids).logits, free)


@pytest.mark.parametrize("family", GROWABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outline_has_the_tables_of_the_real_model_and_no_weights(dtype, family, tmp_path):
    tiny(family)[1].to(dtype).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    real, empty = modeling.materialize(checkpoint), modeling.build_meta_model(checkpoint)
    assert all(
        parameter.is_meta and parameter.dtype == torch.float32 for parameter in empty.parameters()
    )
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in real.named_parameters()}
    tables = dict(real.named_buffers())
    assert tables.keys() == dict(empty.named_buffers()).keys()
    assert all(torch.equal(value, tables[name]) for name, value in empty.named_buffers())


@pytest.mark.parametrize(("mixer", "more"), [("sink_window", 1), ("window", 0)])
def test_prompts_begin_with_bos_where_a_mixer_is_made_for_that(
    mixer: str, more: int, tmp_path: Path
) -> None:
    source = Checkpoint.open(save_model(tmp_path))
    model, tokenizer = modeling.materialize(Remix(mixer, "0", window=8)(source)), byte_tokenizer()
    assert generate(model, tokenizer, "abc", 2).prompt_tokens == 3 + more
    assert generate(model, tokenizer, tokenizer.bos_token + "abc", 2).prompt_tokens == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@torch.no_grad()
def test_weights_laid_out_for_decoding_give_the_same_text_and_files(
    family: str, tmp_path: Path
) -> None:
    save_model(tmp_path / "stock", family)
    remix = Remix("gated_deltanet", "1", window=8, sinks=2)
    remix(Checkpoint.open(tmp_path / "stock")).save(tmp_path / "model")
    model, rows = modeling.load(tmp_path / "model"), tokens(2, 40)
    expected = model(rows).logits
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.prepare_decoding(rows=3)
    assert all(p.is_contiguous() for p in model.parameters())

    model.prepare_decoding(rows=2)
    assert not all(p.is_contiguous() for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    # Prompts under inference mode and steps outside it, and the other way round.
    for first in (True, False):
        cache = DynamicCache(config=model.config)
        with torch.inference_mode(first), torch.no_grad():
            model(rows[:, :20], use_cache=True, **modeling.cache_kwargs(cache))
        steps = []
        for piece in rows[:, 20:].split(1, 1):
            with torch.inference_mode(not first), torch.no_grad():
                out = model(piece, use_cache=True, **modeling.cache_kwargs(cache))
            steps.append(out.logits)
        assert max_relative_difference(expected[:, 20:], torch.cat(steps, 1)) < TOLERANCE

    model.save_pretrained(tmp_path / "saved")
    again = modeling.load(tmp_path / "saved")
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    assert all(p.is_contiguous() for p in model.parameters())


def test_kept_layers_grow_in_place_and_pass_gradients(tmp_path: Path) -> None:
    Remix("gated_deltanet", "1", window=8, sinks=2)(
        Checkpoint.open(save_model(tmp_path / "stock", layers=3))
    ).save(tmp_path / "model")
    model, rows = modeling.load(tmp_path / "model"), tokens(2, 30)
    make = modeling.cache_kwargs
    weight = model.get_input_embeddings().weight

    found = []
    for cuts in ([30], [11, 12, 20, 30]):
        cache, total, begin = DynamicCache(config=model.config), torch.zeros(()), 0
        assert [type(layer).__name__ for layer in cache.layers][1] == "GrowingLayer"
        for end in cuts:
            total = (
                total + model(rows[:, begin:end], use_cache=True, **make(cache)).logits.exp().sum()
            )
            begin = end
        found.append(torch.autograd.grad(total, weight)[0])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))

    # Rows that were selected as a view have a buffer of their own.
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(rows[:, :20], use_cache=True, **make(cache))
        held = cache.layers[1].buffers[0]
        model(rows[:, 20:25], use_cache=True, **make(cache))
        assert cache.layers[1].buffers[0] is held
        cache.batch_select_indices(slice(0, 1))
        some = model(rows[:1, 25:], use_cache=True, **make(cache)).logits
        assert max_relative_difference(model(rows[:1]).logits[:, 25:], some) < TOLERANCE
