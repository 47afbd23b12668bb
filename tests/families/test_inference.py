"""Tables inferred from stock classes: they agree with the written ones, a proof catches wrong ones,
and unknown types grow and are linearized by them.
"""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import GROWABLE, max_relative_difference, tiny
from transformers import AutoModelForCausalLM

import regraft
from regraft.checks import table_proof
from regraft.checks.check import check
from regraft.cli.main import main
from regraft.core.anatomy import Anatomy, find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.core.part import PlacedPart
from regraft.errors import RegraftError
from regraft.families.inference import inferred, table_file
from regraft.families.inference.infer import infer_tables
from regraft.families.inference.roles import find_role
from regraft.families.inference.table import InferredTable, build_anatomy
from regraft.families.inference.tiny_config import DIM, find_key
from regraft.families.inference.tiny_model import TinyModel, find_tiny_model
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen
from regraft.mixers.remix import Remix
from regraft.mixers.source_windows import chunked_layers
from regraft.modeling.layer_kinds import OWN_SIZES, layer_kinds
from regraft.modeling.loading import materialize

ENCODERS = ("bert", "roberta", "vit", "dinov2")
DECODERS = [family for family in GROWABLE if family not in ENCODERS]
# Types without a table that grow on every axis and are linearized, and such that only grow.
BOTH = ("iquestcoder", "phimoe", "glm4_moe", "jais2", "hyperclovax")
# Types that are hard to infer -> axes that their class keeps closed.
HARD: dict[str, set[str]] = {
    "granitemoeshared": set(),  # experts in one tensor
    "hunyuan_v1_moe": set(),  # sizes that are null
    "ernie4_5_moe": set(),  # neighbours turn together
    "afmoe": {"dim"},  # some layers rotate; a gate on the outputs of heads
    "biogpt": {"group"},  # positions from the third row on; a fixed epsilon
    "modernbert-decoder": {"group"},  # gate and up in one tensor; a head of another name
    "persimmon": {"group", "dim"},  # layer norms over queries and keys of each head
    "gpt_bigcode": {"kv"},  # one key/value head for all queries
    "falcon": set(),  # queries, keys and values packed head by head
    "jetmoe": {"kv", "group", "dim", "attention"},  # amplifies rounding
    "mimo_v2_flash": {"kv", "group", "dim", "attention"},  # layers of different shapes
    # A tied bias, and a head with a map, an activation and a norm.
    "roberta-prelayernorm": {"kv", "group", "dim", "attention"},
}
# Their keys that are not the default.
KEYS: dict[str, dict[str, Any]] = {
    "falcon": {
        "new_decoder_architecture": True,
        "hidden_size": 4096,
        "num_attention_heads": 64,
        "num_kv_heads": 8,
    },
}


def describe(anatomy: Anatomy, config: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """What a table says of every tensor, by its name in a file and without role names."""
    return {
        anatomy.name_in_file(one.name): describe_part(anatomy, config, one)
        for one in anatomy.place(config).values()
    }


def describe_part(anatomy: Anatomy, config: dict[str, Any], placed: PlacedPart) -> tuple[Any, ...]:
    part, axes = placed.part, placed.part.axes
    writes = part.writes if any("hidden" in output for output in axes.outputs) else None
    reads = part.reads if "hidden" in axes.inputs or part.norm else None
    # A head reads what the final norm gives, whatever that is called.
    reads = "normed" if reads == "head" else reads
    stored = part.stored if axes.kind == "map" else None
    return (axes.kind, axes.inputs, axes.outputs, axes.unit, stored, part.norm, reads, writes)


@pytest.mark.parametrize("family", DECODERS)
def test_inference_agrees_with_the_written_table(family: str) -> None:
    config = tiny(family)[0].to_dict()
    written = find_anatomy(config)
    # Of several ways to pack queries, keys and values the proof chooses.
    tables = list(infer_tables(find_tiny_model(config)))
    found = [build_anatomy(table, config) for table in tables]
    assert describe(written, config) in [describe(one, config) for one in found]
    full = written.fill_defaults(config)
    for one in found:
        assert {*one.sizes} == {*written.sizes} and one.slot == written.slot
        names = ("eps", "rotary", "embed_scale", "causal", "activation", "routed", "divides")
        assert all(getattr(one, name) == getattr(written, name) for name in names)
        assert one.scale(full, 8, 0) == pytest.approx(written.scale(full, 8, 0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / inferred.FOLDER


def save_unknown(folder: Path, family: str, **keys: Any) -> TinyModel:
    """Write a tiny random model of a type without a table."""
    tiny_model = find_tiny_model({"model_type": family, **keys})
    model = tiny_model.build_random()
    model.config.dtype = torch.float32
    model.save_pretrained(folder)
    return tiny_model


@pytest.mark.parametrize("family", [*BOTH[1:4], *HARD])
def test_unknown_types_are_proven_on_every_axis(family: str) -> None:
    """All but those that the class keeps closed: an axis that must not be refused is none."""
    closed = inferred.find_table({"model_type": family, **KEYS.get(family, {})}).closed
    assert set(closed) <= HARD.get(family, set())
    # A reason is in words, not what Python raised.
    assert not any("Error:" in why for why in closed.values())


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("ctrl", {}),  # attention that takes values, keys and queries
        ("exaone", {}),  # files call the attention otherwise than the class
        ("moshi", {}),  # attention that makes its cos and sin; windows in the cache alone
        ("flint", {}),  # sinks of another name
        ("llama4_text", {}),  # chunks, and layers that do not rotate
        ("falcon_h1", {"key_multiplier": 0.4, "attention_in_multiplier": 0.7}),
    ],
)
def test_attention_that_classes_have_in_ways_of_their_own(
    family: str, keys: dict[str, Any], cache: Path
) -> None:
    tiny_model = find_tiny_model({"model_type": family, **keys})
    table = next(infer_tables(tiny_model))
    assert "attention" not in table.closed
    # What growth would be proven for is another matter.
    file = cache.parent / inferred.name_file({"model_type": family, **tiny_model.config})
    inferred._write(replace(table, closed={}), {file})
    assert table_proof.prove_attention(table, tiny_model) is None
    if table.key_factor:
        assert table_proof.prove_attention(replace(table, key_factor=""), tiny_model)


def test_layers_that_attend_in_chunks_stay(tmp_path: Path, cache: Path) -> None:
    """Rows are longer than a chunk: the class alone knows where one ends."""
    sizes = {"attention_chunk_size": 16, "interleave_moe_layer_step": 1, "num_local_experts": 2}
    save_unknown(tmp_path / "source", "llama4_text", **sizes)
    source = Checkpoint.open(tmp_path / "source")
    step = Remix("window", "none", window=64, sinks=0)
    converted = step(source)
    kinds = chunked_layers(source.config)
    mixers = converted.config["mixers"]
    assert kinds and [layer for layer, spec in enumerate(mixers) if spec is None] == kinds
    assert any("chunks" in note for note in converted.history[-1]["notes"])
    stock, linear = regraft.load(tmp_path / "source"), materialize(converted)
    ids = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert max_relative_difference(stock(ids).logits, linear(ids).logits) < 1e-5
    texts = [
        model.generate(ids[:, :12], max_new_tokens=12, do_sample=False, pad_token_id=0)
        for model in (stock, linear)
    ]
    assert torch.equal(*texts)


def test_settings_of_single_layers_are_read(tmp_path: Path, cache: Path) -> None:
    """Layers with full attention have wider heads, which the config says layer by layer; what a
    layer gives is multiplied by a number, which is one where it starts as the identity.
    """
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    keys = {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    save_unknown(tmp_path / "source", "gemma4_text", hidden_size_per_layer_input=0, **keys)
    source = Checkpoint.open(tmp_path / "source")
    assert len(source.config["per_layer_config"]) > 1
    factors = [one for (role, _), one in source.tensors.items() if "layer_scalar" in role]
    assert factors and not any(one.read() == 1 for one in factors)
    own = source.config["per_layer_config"]
    kinds = [OWN_SIZES if str(layer) in own else "softmax" for layer in range(source.layers)]
    assert layer_kinds(source) == kinds
    sizes = {"hidden": source.sizes["hidden"] + 16, "ffn": source.sizes["ffn"] + 8}
    grown = Deepen(source.layers + 3)(Widen(**sizes)(source))
    grown.save(tmp_path / "grown")
    # Layers in another order are of the same kinds: their table is there.
    assert inferred.name_file(source.config) == inferred.name_file(grown.config)
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
            for name in ("source", "grown")
        )
    assert max_relative_difference(before, after) < 2e-5


def test_a_factor_on_keys_is_another_table() -> None:
    """A table that was proven with a factor of one says nothing of others."""
    names = [
        inferred.name_file({"model_type": "falcon_h1", "key_multiplier": factor})
        for factor in (1.0, 0.4, 0.3)
    ]
    assert names[0] != names[1] == names[2]


def test_names_of_a_decoder_come_before_those_of_its_encoder() -> None:
    full = {"encoder_layers": 3, "num_hidden_layers": 3, "decoder_layers": 2}
    aliases = {"num_attention_heads": "encoder_attention_heads"}
    assert find_key(full, aliases, "depth") == "decoder_layers"
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    assert find_key(heads, aliases, "heads") == "decoder_attention_heads"
    roles = [find_role(f"transformer.h.{{}}.mlp.c_fc_{number}") for number in (0, 1)]
    assert roles == ["mlp.gate", "mlp.up"]  # EXAONE's


def test_a_factor_on_scores_follows_its_key() -> None:
    """The width of local attention is that of a head here, and is none."""
    tiny_model = find_tiny_model({"model_type": "modernbert-decoder"})
    assert tiny_model.config["local_attention"] == DIM
    assert next(infer_tables(tiny_model)).scale is None


def test_an_unknown_type_grows_and_is_linearized_on_disk(tmp_path: Path, cache: Path) -> None:
    """With fewer key/value heads, other sizes of heads and keys that the class would fill in."""
    save_unknown(tmp_path / "source", BOTH[0], num_key_value_heads=8, num_attention_heads=32)
    source = tmp_path / "source"
    assert main(["grow", str(source), str(tmp_path / "grown"), "--hidden", "80", "--ffn", "104",
                 "--heads", "8", "--layers", "6"]) == 0  # fmt: skip
    assert check(source, tmp_path / "grown")["holds"]
    assert main(["linearize", str(source), str(tmp_path / "linear"), "--mixer", "supra"]) == 0
    assert regraft.load(tmp_path / "linear").config.model_type == "regraft"

    # What growth changes is no other table: all of it came from one inference.
    assert len({file.read_text() for file in cache.iterdir()}) == 1


def test_rounding_is_estimated() -> None:
    """By a model's own sensitivity, below what wrong tables are off by."""
    tiny_model = find_tiny_model({"model_type": BOTH[0]})
    source = table_proof.open_tiny(next(infer_tables(tiny_model)), tiny_model)
    before = table_proof._compute(source, tiny_model)
    rounding = table_proof.estimate_rounding(source, before, tiny_model)
    assert 1e-6 < rounding < table_proof.MAX_ROUNDING
    # With scores a thousand times as large, the last bit of a weight chooses the tokens that count.
    loud = {
        key: replace(lazy, read=lambda lazy=lazy: 30 * lazy.read())
        if key[0] in ("attn.q.weight", "attn.k.weight")
        else lazy
        for key, lazy in source.tensors.items()
    }
    source = replace(source, tensors=loud)
    before = table_proof._compute(source, tiny_model)
    assert rounding < table_proof.estimate_rounding(source, before, tiny_model)


def test_wrong_tables_are_caught() -> None:
    """Each wrong reading closes the axis that it spoils."""
    tiny_model = find_tiny_model({"model_type": BOTH[0], "num_key_value_heads": 8})
    table = next(infer_tables(tiny_model))
    assert not table_proof.prove_growth(table, tiny_model)
    assert table_proof.prove_attention(table, tiny_model) is None

    def change(name: str, **fields: Any) -> InferredTable:
        rows = [replace(row, **fields) if name in row.role else row for row in table.rows]
        return replace(table, rows=tuple(rows))

    wrong = {
        "hidden": change("norm.input_layernorm", signature="1+gain hidden"),
        "depth": change("mlp.down", signature=f"ffn -> {tiny_model.config['hidden_size']}"),
        "group": change("attn.o", signature="kv dim group -> hidden"),
        "dim": replace(table, rotary=False),
        "ffn": change("mlp.up", signature=f"hidden -> {tiny_model.config['intermediate_size']}"),
    }
    for axis, one in wrong.items():
        assert axis in table_proof.prove_growth(one, tiny_model), axis
    assert table_proof.prove_attention(replace(table, rotary=False), tiny_model)


def test_closed_axes_are_refused_and_others_grow(tmp_path: Path) -> None:
    tiny("llama")[1].save_pretrained(tmp_path)
    whole = Checkpoint.open(tmp_path)
    anatomy = replace(whole.anatomy, closed={"hidden": "a reason", "attention": "another"})
    source = replace(whole, anatomy=anatomy)
    assert Deepen(layers=5)(source).layers == 5
    words = r"llama cannot grow its hidden \(a reason\).*proven for depth, ffn, kv, group, dim"
    with pytest.raises(RegraftError, match=words):
        Widen(hidden=72)(source)
    with pytest.raises(RegraftError, match="attention of llama.*cannot be linearized.*another"):
        Remix(mixer="supra")(source)


def test_the_table_prints_as_a_file_that_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_unknown(tmp_path / "source", "jais2")
    assert main(["anatomy", str(tmp_path / "source"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["inferred"] and set(printed["open"]) >= {"hidden", "attention"}

    config = json.loads((tmp_path / "source" / "config.json").read_text())
    text = printed["table"].replace("from ..core", "from regraft.core")
    names: dict[str, Any] = {}
    exec(compile(text, "table", "exec"), names)
    assert describe(names["anatomy"], config) == describe(find_anatomy(config), config)
    assert names["anatomy"].solve(config) == find_anatomy(config).solve(config)
    assert main(["anatomy", str(tmp_path / "source")]) == 0
    assert text.replace("from regraft.core", "from ..core") in capsys.readouterr().out


def test_written_tables_print_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("qwen3")[1].save_pretrained(tmp_path)
    assert main(["anatomy", str(tmp_path / "config.json")]) == 0
    assert table_file.read_family_file("qwen3") in capsys.readouterr().out


def _find(folder: str, queue: Any) -> None:
    import os

    os.environ["REGRAFT_CACHE"] = folder
    queue.put(inferred.find_table({"model_type": BOTH[1]}).closed)


def test_two_processes_infer_at_once_and_a_third_reads(tmp_path: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    workers = [context.Process(target=_find, args=(str(cache.parent), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [{}, {}]
    for worker in workers:
        worker.join()
    before = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert inferred.find_table({"model_type": BOTH[1]}).closed == {}
    assert before == {file: file.stat().st_mtime_ns for file in cache.iterdir()}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "kosmos-2"},
            "several parts: its language model is a 'kosmos_2_text_model'",
        ),
        ({"model_type": "longt5"}, "'longt5' has an encoder and a decoder"),
        ({"model_type": "olmo9"}, "unknown family 'olmo9': transformers .* has no such model_type"),
        ({"model_type": BOTH[0], "num_attention_heads": "x"}, "cannot read this"),
        ({"model_type": BOTH[0], "num_hidden_layers": 10**9}, "the limit is 4,096"),
    ],
)
def test_what_no_table_can_hold_is_refused_with_what_would_work(
    config: dict[str, Any], words: str
) -> None:
    with pytest.raises(RegraftError, match=words) as caught:
        find_anatomy(config)
    assert "\n" not in str(caught.value) and "write regraft/families" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", "/proc/none")
    with pytest.raises(RegraftError, match="cannot keep the inferred table of .*REGRAFT_CACHE"):
        find_anatomy({"model_type": BOTH[1]})
