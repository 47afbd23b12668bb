"""Configs as people have them: null and missing keys, lists by layer, ties, windows, few positions.

The law: such a model is grown, or refused in one line; if it is grown, stock transformers computes
from the result what it computes from the source.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import ARCHITECTURES, CONFIGS, inputs, max_relative_difference, outputs, tiny

import regraft
from regraft import modeling
from regraft.checks.growth import difference_bound
from regraft.core.anatomy import find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.core.stock_config import TAKEN_AS_NULL, find_layer_lists
from regraft.errors import RegraftError
from regraft.growth.depth import EXACT, ORDERS, build_layer_order
from regraft.growth.ligo_options import Ligo
from regraft.growth.steps.ligo import Learned
from regraft.growth.steps.transplant import Transplant
from regraft.io.files import read_json, write_json
from regraft.linearize.pipeline import check_row_lengths
from regraft.plan.plan import Plan
from regraft.train.session import check_stage
from regraft.train.stage import Stage

WINDOW, LENGTH = 8, 40
S, F = "sliding_attention", "full_attention"
# Sizes of a tiny model that differ from the class's defaults, and what picks the class.
KEPT = {"architectures", "num_key_value_heads", "sliding_window", "layer_types"}
KEPT |= {"head_dim", "id2label", "label2id", "n_inner", "pooler_output_size"}
# Config keys -> kinds of the three layers that the class makes of them.
WINDOWED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "qwen2": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, [F, S, S]),
    "qwen3": ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, [F, F, S]),
    "qwen3, stated": ("qwen3", {"use_sliding_window": True, "layer_types": [S, F, F]}, [S, F, F]),
    "gemma2": ("gemma2", {}, [S, F, S]),
    "gemma3": ("gemma3_text", {"sliding_window_pattern": 2, "layer_types": None}, [S, F, S]),
    "ministral": ("ministral", {"layer_types": [F, S, F]}, [F, S, F]),
}


def save(folder: Path, family: str, **keys: Any) -> Path:
    """A tiny model as stock transformers saves it."""
    tiny(family, **keys)[1].save_pretrained(folder)
    return folder


def edit(folder: Path, drop: Any = (), **keys: Any) -> None:
    """Change config.json."""
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {k: v for k, v in config.items() if k not in drop} | keys)


def stock(folder: Path) -> Any:
    """The model that `from_pretrained` gives."""
    config = read_json(folder / "config.json")
    encoder = config["model_type"] in ARCHITECTURES
    kind = (
        getattr(transformers, config["architectures"][0])
        if encoder
        else transformers.AutoModelForCausalLM
    )
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def rows(model: Any) -> dict[str, torch.Tensor]:
    """Inputs longer than the windows, or as long as there are positions."""
    given = inputs(model.config)
    if "input_ids" in given:
        # RoBERTa counts positions from two.
        length = min(LENGTH, getattr(model.config, "max_position_embeddings", LENGTH) - 2)
        generator = torch.Generator().manual_seed(1)
        given = {"input_ids": torch.randint(3, 97, (2, length), generator=generator)}
    return given


def compute(folder: Path) -> dict[str, torch.Tensor]:
    """The outputs of the stock model."""
    model = stock(folder)
    return outputs(model, rows(model))


def expect_same(source: Path, result: Path, before: Checkpoint, after: Checkpoint) -> None:
    """Stock source and stock result compute the same."""
    old, new = compute(source), compute(result)
    bound = difference_bound(before, after)
    assert old and all(max_relative_difference(old[key], new[key]) < bound for key in old)


def grow(folder: Path, step: Any = None) -> tuple[Checkpoint, Checkpoint, Path]:
    """Source, result and where it was saved."""
    source = Checkpoint.open(folder)
    result = (step or regraft.Deepen(5))(source)
    out = folder.parent / f"{folder.name}-out"
    result.save(out)
    return source, result, out


def field_names(family: str) -> list[str]:
    """Public keys of a config class."""
    kind = getattr(transformers, CONFIGS[family])
    return [f.name for f in dataclasses.fields(kind) if not f.name.startswith("_")]


def takes(family: str, **keys: Any) -> bool:
    """Whether the class takes the keys."""
    try:
        getattr(transformers, CONFIGS[family]).from_dict(keys)
    except Exception:
        return False
    return True


def required(family: str) -> set[str]:
    """Sizes that must be stated."""
    return find_anatomy({"model_type": family}).required_keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_table_defaults_are_those_of_the_class(family: str) -> None:
    """Every key of the table, missing or null."""
    kind, anatomy = getattr(transformers, CONFIGS[family]), find_anatomy({"model_type": family})
    bare = {key: getattr(kind(), key) for key in anatomy.required_keys()}
    keys = {key for key in anatomy.defaults if not key.startswith("_")} & set(field_names(family))
    assert {anatomy.eps, *(key for key, _ in anatomy.sizes if not key.startswith("_"))} <= (
        keys | set(bare) | {"head_dim"}
    )
    filled, full = anatomy.fill_defaults(bare), kind.from_dict(bare)
    # What the class leaves open its model fills in: see the test of sizes.
    expected = {key: getattr(full, key) for key in keys if getattr(full, key) is not None}
    assert expected and {key: filled[key] for key in expected} == expected

    for key in sorted(keys):
        if takes(family, **bare | {key: None}):
            null = getattr(kind.from_dict({**bare, key: None}), key)
            filled = anatomy.fill_defaults({**bare, key: None})
            assert null is None or filled[key] == null, key
    assert all(takes(family, **{key: None}) for key in TAKEN_AS_NULL - set(anatomy.not_null))


def all_null(family: str) -> tuple[list[str], list[str]]:
    """Keys that a class takes as null, and those it does not; sizes of the tiny model left out."""
    names = [name for name in field_names(family) if name not in KEPT | required(family)]
    taken = [name for name in names if takes(family, **{name: None})]
    return taken, [name for name in names if name not in taken]


@pytest.mark.parametrize("family", CONFIGS)
def test_null_means_what_it_means_to_the_class(family: str, tmp_path: Path) -> None:
    """All keys at once that the class takes as null."""
    folder, (taken, _) = save(tmp_path / "source", family), all_null(family)
    # Tuples in place of named outputs, and what stock crashes on, whatever the model.
    nulls = set(taken) - {"return_dict", "chunk_size_feed_forward"}
    nulls -= {"pad_token_id"} if family == "roberta" else set()
    edit(folder, **dict.fromkeys([*nulls, "some_key", "rope_scaling"]))
    source, result, out = grow(folder)
    expect_same(folder, out, source, result)

    edit(folder, return_dict=None, chunk_size_feed_forward=None, quantization_config={})
    assert Checkpoint.open(folder).config == source.config | {
        "return_dict": True,
        "chunk_size_feed_forward": 0,
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_null_that_the_class_refuses_is_its_default(family: str, tmp_path: Path) -> None:
    """All keys at once; the source cannot be opened with them, the result can."""
    folder, (_, refused) = save(tmp_path / "source", family), all_null(family)
    stated = read_json(folder / "config.json")
    default = getattr(transformers, CONFIGS[family])().to_dict()
    nulls = [key for key in refused if stated[key] == default[key]]
    assert len(nulls) > 5
    untouched = compute(folder)
    edit(folder, **dict.fromkeys(nulls), partial_rotary_factor=None, rope_theta=None)
    source, result, out = grow(folder)
    saved = read_json(out / "config.json")
    assert {key: saved[key] for key in nulls} == {key: default[key] for key in nulls}
    new, bound = compute(out), difference_bound(source, result)
    assert all(max_relative_difference(untouched[key], new[key]) < bound for key in new)


@pytest.mark.parametrize("family", CONFIGS)
def test_sizes_of_null_follow_from_the_others(family: str, tmp_path: Path) -> None:
    """Sizes that the class or its model computes are stated where they no longer follow."""
    sizes = {"hidden": 32, "heads": 4, "kv": 4, "dim": 8, "ffn": 128}
    keys = {"architecture": "ViTModel"} if family == "vit" else {}
    folder = save(tmp_path / "source", family, **sizes, **keys)
    config, anatomy = read_json(folder / "config.json"), find_anatomy({"model_type": family})
    names = ("head_dim", "num_key_value_heads", "n_inner", "pooler_output_size")
    nulls = [
        key
        for key in names
        if config.get(key) == anatomy.fill_defaults(config | {key: None}).get(key)
    ]
    nulls = [key for key in nulls if key in config]
    before = compute(folder)
    edit(folder, **dict.fromkeys(nulls))
    source, result, out = grow(folder, regraft.Widen(hidden=64, heads=8, kv_heads=None))
    new = compute(out)
    assert all(max_relative_difference(before[key], new[key]) < 1e-4 for key in before)
    assert result.sizes == Checkpoint.open(out).sizes and result.sizes["dim"] == 8


@pytest.mark.parametrize("family", CONFIGS)
def test_missing_keys_and_foreign_lists(family: str, tmp_path: Path) -> None:
    """Missing keys mean the class's default; lists that no table knows follow their layers."""
    folder = save(tmp_path / "source", family)
    stated = read_json(folder / "config.json")
    default = getattr(transformers, CONFIGS[family])().to_dict()
    drop = {key for key in stated if key in default and stated[key] == default[key]}
    # Auto would read a mistral with kinds of layers as another class.
    types = {} if family == "mistral" or stated.get("layer_types") else {"layer_types": [F] * 3}
    edit(folder, drop - {"model_type"} - required(family), **types, no_rope=[0, 1, 2])
    source, result, out = grow(folder)
    assert len(source.config) < len(stated) - 5

    saved, order = read_json(out / "config.json"), build_layer_order("identity", 3, 5)
    assert saved["no_rope"] == [layer.source for layer in order]
    assert not types or saved["layer_types"] == [F] * 5
    expect_same(folder, out, source, result)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_lists_as_long_as_the_depth(family: str, layers: int) -> None:
    """Lists by layer follow, known to the class or not; other lists stay."""
    config = tiny(family, layers=layers)[0].to_dict()
    anatomy = find_anatomy(config)
    others = {
        "architectures": ["A", "B", "C"][:layers],
        "eos_token_id": [1, 2, 3][:layers],
        "bad_words_ids": [[1], [2], [3]][:layers],
        "out_indices": [1, 2, 3][:layers],
        "image_size": [15, 10],
        "some_token_ids": [1, 2, 3][:layers],
    }
    layer_types = [F] * layers
    by_layer = {"layer_types": layer_types, "no_rope": [0, 1, 2][:layers]}
    own = {key: config[key] for key in ("layer_rope_theta",) if key in config}
    assert find_layer_lists(config | others | by_layer, anatomy) == by_layer | own
    derived = find_layer_lists({**config, "layer_types": None}, anatomy)
    assert derived.keys() <= {"layer_types", *own}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "bert"])
def test_a_list_of_another_length_is_an_error(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", family)
    edit(folder, layer_types=[F] * 4)
    with pytest.raises(RegraftError, match=f"{family} config has 4 layer_types for 3 layers: give"):
        Checkpoint.open(folder)
    edit(folder, ["layer_types"], per_layer_config={"1": {"attention_dropout": 0.1}})
    with pytest.raises(RegraftError, match="per_layer_config for layers 1: its table"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("case", WINDOWED)
def test_windows_follow_their_layers(case: str, tmp_path: Path) -> None:
    """Under the depth operators, by stock layers in the new order; exactly where it is exact."""
    family, keys, kinds = WINDOWED[case]
    folder = save(tmp_path / "source", family, sliding_window=WINDOW, **keys)
    edit(folder, () if "layer_types" in keys and keys["layer_types"] else ["layer_types"], **keys)
    source = Checkpoint.open(folder)
    assert find_layer_lists(source.config, source.anatomy)["layer_types"] == kinds

    # The window is seen: other kinds give other logits.
    before, shifted = compute(folder)["logits"], tmp_path / "shifted"
    replace_kinds(folder, shifted, kinds[1:] + kinds[:1])
    assert max_relative_difference(before, compute(shifted)["logits"]) > 1e-3

    for operator in ORDERS if case == "qwen2" else ("identity", "stack", "mslt"):
        order = [layer.source for layer in build_layer_order(operator, 3, 6)]
        out = tmp_path / operator
        regraft.Deepen(6, operator)(source).save(out)
        assert read_json(out / "config.json")["layer_types"] == [kinds[layer] for layer in order]
        want = before if operator in EXACT else reorder(stock(folder), kinds, order)
        assert max_relative_difference(want, compute(out)["logits"]) < 2e-5, operator


def replace_kinds(folder: Path, out: Path, kinds: list[str]) -> None:
    """The same model with other kinds of layers."""
    out.mkdir()
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    edit(out, layer_types=kinds)


@torch.no_grad()
def reorder(model: Any, kinds: list[str], order: list[int]) -> torch.Tensor:
    """Logits of a stock model with its own layers in another order."""
    model.model.layers = torch.nn.ModuleList([model.model.layers[layer] for layer in order])
    model.config.num_hidden_layers = len(order)
    model.config.layer_types = [kinds[layer] for layer in order]
    return model(**rows(model), use_cache=False).logits


@pytest.mark.parametrize("case", ["qwen2", "ministral"])
def test_every_other_step_keeps_kinds_of_layers(case: str, tmp_path: Path) -> None:
    family, keys, kinds = WINDOWED[case]
    folder = save(tmp_path / "source", family, sliding_window=WINDOW, **keys)
    edit(folder, () if "layer_types" in keys else ["layer_types"])
    source, wide, out = grow(folder, regraft.Widen(hidden=48, ffn=60))
    assert wide.config.get("layer_types") == source.config.get("layer_types")
    expect_same(folder, out, source, wide)

    followed = [*kinds, kinds[-1], kinds[-1]]  # layers beyond the source's go on as its last one
    assert Transplant(layers=5)(source).config["layer_types"] == followed
    learned = Learned(layers=5, method=Ligo(depth="stack"))(source)
    assert learned.config["layer_types"] == [kinds[layer] for layer in (0, 1, 2, 0, 1)]

    linear = regraft.Remix(mixer="supra", keep="0")(source)
    linear.save(tmp_path / "linear")
    modeling.load(tmp_path / "linear").save_pretrained(tmp_path / "repeated")
    # As regraft wrote it, and as transformers writes it again.
    for opened in (linear, Checkpoint.open(tmp_path / "repeated")):
        deeper = regraft.Deepen(6, "stack")(opened)
        assert deeper.config["num_hidden_layers"] == 6
        assert deeper.config["layer_types"] == kinds * 2
        assert [spec is None for spec in deeper.config["mixers"]] == [True, False, False] * 2


@pytest.mark.parametrize("family", [f for f in CONFIGS if f not in ("vit", "dinov2")])
def test_ties_the_other_way(family: str, tmp_path: Path) -> None:
    """Every other test has the class's default."""
    tied = getattr(transformers, CONFIGS[family])().tie_word_embeddings
    folder = save(tmp_path / "source", family, tie_word_embeddings=not tied)
    source, result, out = grow(folder, regraft.Deepen(4, "llama_pro"))
    expect_same(folder, out, source, result)


def test_mistral_with_kinds_of_layers_is_a_ministral(tmp_path: Path) -> None:
    """As Auto reads it, with a size of heads, which Ministral's class cannot do without."""
    kinds = [S, F, F]
    folder = save(tmp_path / "source", "mistral", hidden=72, sliding_window=WINDOW)
    edit(folder, layer_types=kinds)
    source, result, out = grow(folder)
    saved = read_json(out / "config.json")
    assert saved["architectures"] == ["MinistralForCausalLM"]
    assert saved["model_type"] == source.anatomy.family == "ministral"
    expect_same(folder, out, source, result)

    before = compute(folder)["logits"]
    edit(folder, ["head_dim"])
    out = tmp_path / "bare-out"
    regraft.Deepen(4)(Checkpoint.open(folder)).save(out)
    assert max_relative_difference(before, compute(out)["logits"]) < 2e-5


def test_a_window_without_a_size_is_refused(tmp_path: Path) -> None:
    for family in ("gemma2", "qwen2"):
        folder = save(tmp_path / family, family)
        edit(folder, sliding_window=None, layer_types=[F, S, S])
        with pytest.raises(RegraftError, match="sliding_window"):
            regraft.Widen(ffn=60)(Checkpoint.open(folder))


def test_a_window_of_null_is_none(tmp_path: Path) -> None:
    """Mistral's default is 4,096; null is no window at all."""
    folder = save(tmp_path / "source", "mistral", sliding_window=None)
    _, _, out = grow(folder)
    assert stock(out).config.sliding_window is None


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_few_positions(family: str, tmp_path: Path) -> None:
    key = "n_positions" if family == "gpt2" else "max_position_embeddings"
    folder = save(tmp_path / "source", family, **{key: 64})
    source, result, out = grow(folder)
    expect_same(folder, out, source, result)
    assert Plan.of(source, result).to_dict()["target"]["depth"] == 5

    # Rows of a training are as long as asked for: too long ones are refused before any work.
    long = Stage("next", tokens=4096, length=128)
    for check in (
        lambda: check_row_lengths(source, [long], None),
        lambda: check_stage(source, str(folder), long, None, None),
    ):
        with pytest.raises(RegraftError, match=f"rows of 128 tokens in a {family}: give 1 to 64"):
            check()


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3_text"])
def test_a_missing_theta_is_that_of_the_class(family: str, tmp_path: Path) -> None:
    """Wider heads need another theta, for each kind of layer."""
    folder = save(tmp_path / "source", family)
    edit(folder, ["rope_parameters"])
    source, result, out = grow(folder, regraft.Widen(head_dim=12))
    expect_same(folder, out, source, result)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_other_names_of_keys(family: str, tmp_path: Path) -> None:
    """The class takes keys under the names of other classes, and these win."""
    aliases = getattr(transformers, CONFIGS[family]).attribute_map
    folder = save(tmp_path / "source", family)
    config = read_json(folder / "config.json")
    names = {alias: config[name] for alias, name in aliases.items()}
    edit(folder, set(aliases.values()) - {"n_layer"}, **names)
    source, result, out = grow(folder)
    assert not names.keys() & read_json(out / "config.json").keys()
    expect_same(folder, out, source, result)


def test_lists_of_families_to_come() -> None:
    """Whatever a class derives from the number of layers is found: no list of names is kept."""
    anatomy = find_anatomy({"model_type": "llama"})
    for family, key, values in (
        ("smollm3", "no_rope_layers", [1, 0, 1, 0]),
        ("glm_moe_dsa", "mlp_layer_types", ["dense", "dense", "dense", "sparse"]),
    ):
        config = {"model_type": family, "num_hidden_layers": 4, "no_rope_layer_interval": 2}
        lists = find_layer_lists(config, dataclasses.replace(anatomy, family=family))
        assert lists[key] == values
        with pytest.raises(RegraftError, match=f"has 2 {key} for 4 layers: give one for each"):
            find_layer_lists(
                config | {key: values[:2]}, dataclasses.replace(anatomy, family=family)
            )


def test_a_bridge_leaves_kinds_of_layers_behind(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", "llama")
    edit(folder, layer_types=[F] * 3)
    source, result, out = grow(folder, regraft.Bridge())
    assert result.config["model_type"] == read_json(out / "config.json")["model_type"] == "mistral"
    expect_same(folder, out, source, result)


def test_a_backbone_gives_the_features_of_its_layers(tmp_path: Path) -> None:
    folder = save(tmp_path / "source", "dinov2", architecture="Dinov2Backbone", out_indices=[1, 3])
    source, result, out = grow(folder, regraft.Deepen(6))
    expect_same(folder, out, source, result)
    stack = regraft.Deepen(5, "stack")(source).config
    assert (stack["out_indices"], stack["out_features"]) == ([1, 5], ["stage1", "stage5"])
