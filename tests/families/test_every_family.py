"""What holds for every decoder family: all sizes grow at once, attention gives way to windows.

A family is a case in `helpers.zoo.DECODERS`, nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import inputs, max_relative_difference, outputs, tokens
from helpers.zoo import DECODERS, ENCODERS, build
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import regraft
from regraft.core.anatomy import find_anatomy
from regraft.core.attention import has_softmax
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.sizes import has_coupled_heads
from regraft.io.files import read_json, write_json
from regraft.mixers.remix import Remix
from regraft.modeling.cache import cache_kwargs, cache_of

BOUND, ENCODER_BOUND = 2e-5, 1e-4
# Config keys that switch parts on or off -> families that have the switch.
SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("cohere", {"use_qk_norm": True}),
    ("cohere", {"tie_word_embeddings": False}),
    ("olmoe", {"clip_qkv": 0.5}),
    ("mpt", {"attn_config": {"softmax_scale": 0.4}}),
    ("stablelm", {"use_parallel_residual": True}),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
    ("granitemoe", {"tie_word_embeddings": True}),
    ("gpt_oss", {"layer_types": None, "attention_bias": False}),
    ("lfm2", {"conv_bias": True, "block_ffn_dim_multiplier": 1.7, "tie_word_embeddings": False}),
    ("lfm2", {"block_ffn_dim_multiplier": None}),
    ("lfm2", {"block_auto_adjust_ff_dim": False, "conv_L_cache": 4}),
]


@torch.no_grad()
def compute(
    folder: Path,
    load: Any = AutoModelForCausalLM.from_pretrained,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits on rows longer than the windows."""
    return load(folder, dtype=dtype).eval()(input_ids=tokens(2, 23)).logits


def grow_every_axis(source: Checkpoint, head_dim: int | None = None) -> Checkpoint:
    """All sizes at once: whole multiples of heads, as norms over all of them need; then layers."""
    old = source.sizes
    heads, dim = 2 * old["kv"] * old["group"], head_dim or old["dim"]
    if source.anatomy.alibi:
        heads, dim = heads // 2, 2 * old["dim"]
    hidden = heads * dim if has_coupled_heads(source) else 64
    ffn = None if source.anatomy.ffn_ratio else old["ffn"] + 8
    if "mlp_ratio" in source.config:
        ffn = source.config["mlp_ratio"] * hidden
    wide = regraft.Widen(hidden=hidden, ffn=ffn, heads=heads, head_dim=dim)(source)
    return wide if "depth" in source.anatomy.closed else regraft.Deepen(5)(wide)


def open_source(folder: Path, family: str, **keys: Any) -> tuple[Checkpoint, torch.Tensor]:
    """A tiny model as stock transformers saves it, and its logits; every tensor is claimed."""
    build(family, **keys)[1].save_pretrained(folder)
    source = Checkpoint.open(folder)
    assert not source.dropped
    assert source.anatomy.resize_config(source.config, source.sizes) == source.config
    return source, compute(folder)


@pytest.mark.parametrize("family", DECODERS)
def test_a_family_grows_and_linearizes(family: str, tmp_path: Path) -> None:
    """Grown in every size it computes the same; so do windows as long as the row in two layers."""
    source, before = open_source(tmp_path / "source", family)
    grown = grow_every_axis(source, head_dim=16)
    grown.save(tmp_path / "grown")
    assert Checkpoint.open(tmp_path / "grown").sizes == grown.sizes
    assert max_relative_difference(before, compute(tmp_path / "grown")) < BOUND

    Remix(mixer="window", window=64, keep="0")(source).save(tmp_path / "linear")
    after = compute(tmp_path / "linear", lambda folder, dtype: regraft.load(str(folder)))
    assert max_relative_difference(before, after) < BOUND


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_mixers_know_padding_documents_and_the_cache(family: str, tmp_path: Path) -> None:
    """Rows with padding, packed documents and one token at a time give what rows alone do. Stock
    layers without softmax see across the documents of a row.
    """
    source, _ = open_source(tmp_path / "source", family)
    Remix(mixer="window", window=5, sinks=2, keep="none")(source).save(tmp_path / "linear")
    model, ids = regraft.load(str(tmp_path / "linear")).eval(), tokens(2, 13)
    alone = model(input_ids=ids).logits

    mask = (torch.arange(16) >= 3).long().expand(2, -1)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), 1)
    found = model(input_ids=padded, attention_mask=mask).logits[:, 3:]
    assert max_relative_difference(alone, found) < BOUND

    positions = torch.cat((torch.arange(6), torch.arange(7)))[None]
    parts = [model(input_ids=part).logits for part in (ids[:1, :6], ids[:1, 6:])]
    found = model(input_ids=ids[:1], position_ids=positions).logits
    if all(has_softmax(source.anatomy, source.config, layer) for layer in range(source.layers)):
        assert max_relative_difference(torch.cat(parts, 1), found) < BOUND

    output, steps = None, []
    for piece in ids.split((9, 1, 1, 1, 1), 1):
        past = {} if output is None else cache_kwargs(cache_of(output))
        output = model(input_ids=piece, use_cache=True, **past)
        steps.append(output.logits)
    assert max_relative_difference(alone, torch.cat(steps, 1)) < BOUND


@torch.no_grad()
def compute_outputs(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor that the class in a folder's config gives."""
    name = read_json(folder / "config.json")["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    return outputs(model, inputs(model.config))


@pytest.mark.parametrize(
    ("family", "architecture"),
    [(one, name) for one, (names, _) in ENCODERS.items() for name in names],
)
def test_an_encoder_grows(family: str, architecture: str, tmp_path: Path) -> None:
    build(family, architecture=architecture)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    assert not source.dropped
    before = compute_outputs(tmp_path / "source")
    grow_every_axis(source).save(tmp_path / "grown")
    after = compute_outputs(tmp_path / "grown")
    assert before and before.keys() == after.keys()
    for key, value in before.items():
        # Post-norm layers that are new pass the stream up to the norms' epsilon.
        assert max_relative_difference(value, after[key]) < ENCODER_BOUND, key


@pytest.mark.parametrize(("family", "keys"), SWITCHES, ids=lambda value: str(value))
def test_growth_under_other_switches(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    source, _ = open_source(tmp_path / "source", family, **keys)
    grow_every_axis(source).save(tmp_path / "grown")
    # Norms of a few numbers, less their mean, pass on rounding, which differs between processors.
    dtype = torch.float64 if "use_qk_norm" in keys else torch.float32
    before, after = (compute(tmp_path / name, dtype=dtype) for name in ("source", "grown"))
    assert max_relative_difference(before, after) < BOUND


def test_older_names_of_lfm2_keys(tmp_path: Path) -> None:
    """The first files count softmax layers; their other names of keys win over today's."""
    source, _ = open_source(tmp_path / "source", "lfm2", block_auto_adjust_ff_dim=False)
    config = read_json(tmp_path / "source" / "config.json")
    width = config.pop("intermediate_size")
    older = {"layer_types": None, "full_attn_idxs": [1], "block_ff_dim": width}
    write_json(
        tmp_path / "source" / "config.json",
        config | older | {"tie_embedding": True, "tie_word_embeddings": False},
    )
    before = compute(tmp_path / "source")
    grow_every_axis(Checkpoint.open(tmp_path / "source")).save(tmp_path / "grown")
    grown = read_json(tmp_path / "grown" / "config.json")
    assert not {"block_ff_dim", "tie_embedding"} & grown.keys()
    assert grown["full_attn_idxs"] is None
    assert max_relative_difference(before, compute(tmp_path / "grown")) < BOUND


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("mpt", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.4, "alibi_bias_max": 4}}),
        ("olmo", {"clip_qkv": 0.5}),
        ("olmoe", {"clip_qkv": 0.5}),
    ],
)
def test_windows_clip_as_the_source_does(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    source, before = open_source(tmp_path / "source", family, **keys)
    Remix(mixer="window", window=64, keep="none")(source).save(tmp_path / "linear")
    after = compute(tmp_path / "linear", lambda folder, dtype: regraft.load(str(folder)))
    assert max_relative_difference(before, after) < BOUND


@pytest.mark.parametrize("family", DECODERS)
def test_defaults_are_those_of_the_class(family: str) -> None:
    """A config with its required keys alone has the sizes and epsilon of the class."""
    anatomy, plain = find_anatomy({"model_type": family}), CONFIG_MAPPING[family]().to_dict()
    plain = {**plain, **anatomy.rewrite(plain)}
    bare = {key: plain[key] for key in anatomy.required_keys()}
    filled = anatomy.fill_defaults(bare)
    stated = {key for key in filled if plain.get(key) is not None}
    assert {key: filled[key] for key in stated} == {key: plain[key] for key in stated}
    assert anatomy.solve(bare) == anatomy.solve(plain)


def test_what_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    cases = (
        ("olmoe", {"clip_qkv": 0.5}, {"hidden": 64, "head_dim": 16}, "keep --head-dim 8"),
        ("stablelm", {"qk_layernorm": True}, None, "no part for parameter"),
        ("olmo", {"tie_word_embeddings": True}, {"hidden": 64}, "which keep hidden at 40"),
        ("cohere", {"use_qk_norm": True}, {"head_dim": 16}, "subtract the mean of a head"),
        ("bloom", {}, {"heads": 8, "hidden": 64}, "ALiBi, with other slopes for 8 heads"),
        ("mpt", {}, {"hidden": 64, "ffn": 136}, "an MLP of 4 times hidden.*use --ffn 256"),
        ("opt", {"do_layer_norm_before": False}, {"ffn": 40}, "do_layer_norm_before = False has"),
    )
    for number, (family, keys, sizes, message) in enumerate(cases):
        folder = tmp_path / str(number)
        build(family, **keys)[1].save_pretrained(folder)
        with pytest.raises(RegraftError, match=message):
            regraft.Widen(**(sizes or {}))(Checkpoint.open(folder))


def test_esm_keeps_contacts_and_stored_frequencies(tmp_path: Path) -> None:
    """Files of earlier releases have the frequencies in every layer, and the first one's count."""
    model = build("esm", position_embedding_type="rotary")[1]
    model.esm.rotary_embeddings.inv_freq.mul_(1.01)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("inv_freq"))
    value = tensors.pop(name)
    for layer in range(3):
        tensors[f"esm.encoder.layer.{layer}.attention.self.rotary_embeddings.inv_freq"] = (
            value + layer
        )
    save_file(tensors, file, {"format": "pt"})
    source = Checkpoint.open(tmp_path / "source")
    grow_every_axis(source).save(tmp_path / "grown")

    ids = tokens(2, 23)
    loads = [
        transformers.EsmForMaskedLM.from_pretrained(tmp_path / one, attn_implementation="eager")
        for one in ("source", "grown")
    ]
    with torch.no_grad():
        for compute_one in (
            lambda one: one(ids).logits,
            lambda one: one.predict_contacts(ids, torch.ones_like(ids)),
        ):
            before, after = (compute_one(one.eval()) for one in loads)
            assert max_relative_difference(before, after) < ENCODER_BOUND
    with pytest.raises(RegraftError, match="for heads of 8, not 16: grow --hidden to a multiple"):
        regraft.Widen(hidden=64, head_dim=16)(source)
