"""Every family's table against the real classes of transformers."""

from __future__ import annotations

import pytest
from helpers.tiny import FAMILIES, GROWABLE, tiny
from helpers.zoo import DECODERS, ENCODERS, SEQ2SEQ, TWO_TOWERS

from regraft.core.anatomy import Anatomy, Part, find_anatomy, list_families, list_served_families
from regraft.errors import RegraftError

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "square": {"hidden": 32, "heads": 4, "kv": 4, "dim": 8},
    "one-kv-head": {"heads": 6, "kv": 1},
}
BIASED = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen3": {"attention_bias": True}}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_table_claims_every_parameter_with_its_shape(family: str, variant: str) -> None:
    config, model = tiny(family, **VARIANTS[variant])
    placed = find_anatomy(config.to_dict()).place(config.to_dict())
    assert {spot.name: spot.shape for spot in placed.values()} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert len({spot.name for spot in placed.values()}) == len(placed)


@pytest.mark.parametrize("family", BIASED)
def test_biases_follow_the_config(family: str) -> None:
    config, model = tiny(family, **BIASED[family])
    placed = find_anatomy(config.to_dict()).place(config.to_dict())
    assert {spot.name for spot in placed.values()} == {name for name, _ in model.named_parameters()}
    assert find_anatomy(config.to_dict()).attention(config.to_dict(), 0)["qkv_bias"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_solve_both_ways(family: str) -> None:
    config = tiny(family)[0].to_dict()
    anatomy = find_anatomy(config)
    sizes = anatomy.solve(config)
    assert (sizes["kv"] * sizes["group"], sizes["dim"], sizes["depth"]) == (9, 8, 3)
    keys = anatomy.config_keys(sizes)
    assert all(config[key] == value for key, value in keys.items())
    assert anatomy.solve({**config, **keys}) == sizes


@pytest.mark.parametrize(("family", "kv"), [("llama", 64), ("mistral", 8), ("qwen2", 32)])
def test_missing_keys_take_the_familys_defaults(family: str, kv: int) -> None:
    config = tiny(family, hidden=512, heads=64, kv=8)[0].to_dict()
    for key in ("head_dim", "tie_word_embeddings"):
        config.pop(key, None)
    assert find_anatomy(config).solve(config)["dim"] == 8
    del config["num_key_value_heads"]
    assert find_anatomy(config).solve(config)["kv"] == kv
    assert find_anatomy(config).solve(config | {"num_key_value_heads": None})["kv"] == 64


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "qwen2",
            {
                "qkv_bias": True,
                "o_bias": False,
                "rotary": True,
                "qk_norm": None,
                "kv": 3,
                "group": 3,
            },
        ),
        ("qwen3", {"qkv_bias": False, "qk_norm": 1e-6, "scale": 8**-0.5}),
        ("gpt2", {"qkv_bias": True, "o_bias": True, "rotary": False, "kv": 9, "group": 1}),
        ("gpt_neox", {"qkv_bias": True, "o_bias": True, "rotary": True, "kv": 9, "group": 1}),
    ],
)
def test_attention_says_what_a_mixer_replaces(family: str, expected: dict) -> None:
    config = tiny(family)[0].to_dict()
    attention = find_anatomy(config).attention(config, 1)
    assert {key: attention[key] for key in expected} == expected


def test_gpt2_scales_follow_its_config() -> None:
    config = tiny("gpt2", scale_attn_by_inverse_layer_idx=True)[0].to_dict()
    scales = [find_anatomy(config).attention(config, layer)["scale"] for layer in range(3)]
    assert scales == [8**-0.5, 8**-0.5 / 2, 8**-0.5 / 3]
    config["scale_attn_weights"] = False
    assert find_anatomy(config).attention(config, 0)["scale"] == 1.0


def test_families_are_found_by_folder() -> None:
    stock = {*GROWABLE, *DECODERS, *ENCODERS, *SEQ2SEQ, *TWO_TOWERS}
    assert set(list_families()) == {*stock, "regraft", *list_served_families()}


def test_unknown_family_says_what_would_have_it() -> None:
    with pytest.raises(RegraftError, match=r"unknown family 'olmo9': transformers .* has no such"):
        find_anatomy({"model_type": "olmo9"})
    with pytest.raises(RegraftError, match="model_type = None: it must be the name of a model"):
        find_anatomy({})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", None, "hidden_size = None: it must be a positive whole number"),
        ("num_attention_heads", 10, "num_attention_heads = 10, not a multiple of 3"),
        ("num_hidden_layers", 0, "num_hidden_layers = 0"),
        ("vocab_size", "many", "vocab_size is 'many', not a whole number"),
    ],
)
def test_config_that_does_not_add_up(key: str, value: object, message: str) -> None:
    config = {**tiny("llama")[0].to_dict(), key: value}
    with pytest.raises(RegraftError, match=message):
        find_anatomy(config).solve(config)


def test_one_key_for_two_products_must_agree() -> None:
    config = tiny("gpt_neox")[0].to_dict()
    with pytest.raises(RegraftError, match=r"num_attention_heads = 7, not|hidden_size = 72"):
        find_anatomy(config).solve({**config, "num_attention_heads": 7})
    sizes = find_anatomy(config).solve(config) | {"hidden": 80}
    with pytest.raises(
        RegraftError,
        match=r"one key hidden_size for hidden \(80\) and kv dim \(72\): grow them together",
    ):
        find_anatomy(config).config_keys(sizes)


def test_table_that_leaves_an_axis_open_is_refused() -> None:
    open_table = Anatomy("toy", {"a": Part("a", "kv group")}, (("heads", "kv group"),), "slot")
    with pytest.raises(RegraftError, match="toy table leaves axes of 'kv group' open"):
        open_table.solve({"heads": 6})
