"""Every family's table against the files that transformers writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import ARCHITECTURES, FAMILIES, GROWABLE, inputs, tiny
from safetensors.torch import load_file

from regraft.core.anatomy import Anatomy, Part, find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.io.files import read_json

NEW = [family for family in GROWABLE if family not in FAMILIES]
CLASSES = [(family, name) for family in GROWABLE for name in ARCHITECTURES.get(family, (None,))]
# Config keys that switch parts on and off.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(
        (family, {"tie_word_embeddings": False})
        for family in ("gemma", "gemma2", "starcoder2", "bert", "roberta")
    ),
    *((family, {"tie_word_embeddings": True}) for family in ("phi3", "olmo2", "mixtral", "phi")),
    *((family, {"attention_bias": True}) for family in ("gemma", "gemma2", "gemma3_text", "olmo2")),
    ("starcoder2", {"use_bias": False}),
    ("phi", {"qk_layernorm": True, "hidden": 72}),
    ("vit", {"qkv_bias": False}),
    ("vit", {"architecture": "ViTModel", "pooler_output_size": 29}),
    ("vit", {"image_size": [15, 10]}),
    ("dinov2", {"use_swiglu_ffn": True}),
    ("dinov2", {"use_mask_token": False}),
    ("dinov2", {"qkv_bias": False}),
]


def saved(folder: Path, family: str, **keys: Any) -> Checkpoint:
    tiny(family, **keys)[1].save_pretrained(folder)
    return Checkpoint.open(folder)


def expect_every_tensor_claimed(folder: Path, checkpoint: Checkpoint) -> None:
    found = {
        checkpoint.anatomy.canonical_name(k): v
        for k, v in load_file(folder / "model.safetensors").items()
    }
    shapes = {checkpoint.names[key]: lazy.shape for key, lazy in checkpoint.tensors.items()}
    assert shapes == {name: tuple(value.shape) for name, value in found.items()}
    assert not checkpoint.dropped
    spots = checkpoint.anatomy.place(checkpoint.config)
    assert all(
        spot.part.axes.shape(checkpoint.sizes, spot.part.stored) == spot.shape
        for spot in spots.values()
    )


@pytest.mark.parametrize(("family", "architecture"), CLASSES)
def test_every_saved_tensor_is_claimed_with_its_shape(
    family: str, architecture: str | None, tmp_path: Path
) -> None:
    checkpoint = saved(tmp_path, family, architecture=architecture)
    expect_every_tensor_claimed(tmp_path, checkpoint)
    assert (
        checkpoint.anatomy.resize_config(checkpoint.config, checkpoint.sizes) == checkpoint.config
    )
    assert checkpoint.config["model_type"] == checkpoint.anatomy.family == family
    if architecture:
        assert checkpoint.config["architectures"] == [architecture]


@pytest.mark.parametrize(("family", "keys"), VARIANTS, ids=lambda value: str(value))
def test_parts_follow_the_config(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, family, **keys)
    expect_every_tensor_claimed(tmp_path, checkpoint)
    assert (
        checkpoint.anatomy.resize_config(checkpoint.config, checkpoint.sizes) == checkpoint.config
    )


@pytest.mark.parametrize("family", GROWABLE)
def test_sizes_are_those_asked_for(family: str, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, family)
    sizes = checkpoint.sizes
    assert (sizes["kv"] * sizes["group"], sizes["dim"], sizes["depth"]) == (9, 8, 3)
    assert sizes["group"] == (1 if checkpoint.anatomy.fixed else 3)
    wide = {"gpt2": 72, "gpt_neox": 72, "bert": 72, "roberta": 72, "mixtral": 40}
    assert (sizes["hidden"], sizes["ffn"]) == (
        wide.get(family, 36),
        {"dinov2": 72, "mixtral": 56}.get(family, 52),
    )


@pytest.mark.parametrize("family", NEW)
def test_missing_keys_take_the_class_defaults(family: str) -> None:
    """A config with only its sizes solves and scales as the class that fills in the rest."""
    config = tiny(family)[0]
    anatomy = find_anatomy(config.to_dict())
    plain = type(config)().to_dict()
    required = anatomy.required_keys()
    assert anatomy.solve({key: plain[key] for key in required}) == anatomy.solve(plain)
    filled = anatomy.fill_defaults({key: plain[key] for key in required})
    stated = {key for key in filled if plain.get(key) is not None}
    assert {key: filled[key] for key in stated} == {key: plain[key] for key in stated}
    computed = {key for key in filled if key.startswith("_")}
    assert anatomy.eps in stated and set(filled) - stated - computed <= {"head_dim", "rms_norm_eps"}


@pytest.mark.parametrize("family", NEW)
def test_switches_say_what_the_class_does(family: str) -> None:
    config, model = tiny(family)
    anatomy = find_anatomy(config.to_dict())
    assert anatomy.causal == (family not in ARCHITECTURES) and (anatomy.inputs == "pixels") == (
        family in ("vit", "dinov2")
    )
    assert config.to_dict()[anatomy.activation]
    eps = {
        getattr(module, "eps", getattr(module, "variance_epsilon", None))
        for module in model.modules()
    } - {None}
    assert eps == {config.to_dict()[anatomy.eps]}
    rotary = any(name.endswith("rotary_emb") for name, _ in model.named_modules())
    assert rotary == anatomy.rotary
    scales = {float(module.scaling) for module in model.modules() if hasattr(module, "scaling")}
    full = anatomy.fill_defaults(config.to_dict())
    assert scales == {anatomy.scale(full, 8, layer) for layer in range(3)}
    assert anatomy.embed_scale == any(
        name.endswith("embed_scale") for name, _ in model.named_buffers()
    )


@pytest.mark.parametrize("family", NEW)
def test_attention_can_be_described(family: str) -> None:
    config = tiny(family)[0].to_dict()
    attention = find_anatomy(config).attention(config, 1)
    assert (attention["kv"] * attention["group"], attention["dim"]) == (9, 8)
    assert attention["qkv_bias"] == (family in ("starcoder2", "phi", *ARCHITECTURES))


@pytest.mark.parametrize("family", NEW)
def test_gains_are_stored_as_the_table_says(family: str) -> None:
    """A norm whose stored gain means zero gives its bias, or nothing."""
    config, model = tiny(family)
    anatomy = find_anatomy(config.to_dict())
    gains = [part for role, part in anatomy.parts.items() if part.norm and part.axes.kind == "gain"]
    assert {part.axes.unit for part in gains} == {family.startswith("gemma")}
    norms = [module for module in model.modules() if type(module).__name__.endswith("Norm")]
    assert norms and all(part.norm for part in anatomy.parts.values() if part.axes.kind == "gain")
    for module in norms:
        with torch.no_grad():
            module.weight.fill_(-1.0 if family.startswith("gemma") else 0.0)
            left = module.bias if hasattr(module, "bias") else torch.zeros(())
            assert (module(torch.randn(3, module.weight.numel())) == left).all()


@pytest.mark.parametrize(
    ("family", "architecture"), [(f, a) for f, a in CLASSES if f not in FAMILIES]
)
def test_a_rewritten_checkpoint_gives_the_same_outputs(
    family: str, architecture: str | None, tmp_path: Path
) -> None:
    config, model = tiny(family, architecture=architecture)
    model.save_pretrained(tmp_path / "source")
    checkpoint = Checkpoint.open(tmp_path / "source")
    replace(checkpoint).save(tmp_path / "copy")
    again = type(model).from_pretrained(tmp_path / "copy", dtype=torch.float32).eval()
    with torch.no_grad():
        before, after = model(**inputs(config)), again(**inputs(config))
    assert all(
        torch.equal(before[key], after[key])
        for key in before
        if isinstance(before[key], torch.Tensor)
    )


def test_layer_types_follow_their_layers() -> None:
    config = tiny("gemma3_text")[0].to_dict()
    anatomy = find_anatomy(config)
    grown = anatomy.resize_config(
        config, anatomy.solve(config) | {"depth": 5}, order=[0, 0, 1, 1, 2]
    )
    local, whole = "sliding_attention", "full_attention"
    assert (
        grown["layer_types"] == [local, local, whole, whole, local]
        and grown["num_hidden_layers"] == 5
    )


def resized(family: str, **changes: int) -> dict[str, Any]:
    config = tiny(family, **({"architecture": "ViTModel"} if family == "vit" else {}))[0].to_dict()
    anatomy = find_anatomy(config)
    return anatomy.resize_config(config, anatomy.solve(config) | changes)


def test_constraints_of_the_class_are_refused_with_the_nearest_size() -> None:
    for family in ("gemma2", "gemma3_text"):
        with pytest.raises(
            RegraftError,
            match="hidden_size to be a multiple of num_attention_heads.*choose 36 or 45",
        ):
            resized(family, hidden=40)
    with pytest.raises(RegraftError, match="hidden to be a multiple of 8, got 44: use 40 or 48"):
        resized("mixtral", hidden=44)
    with pytest.raises(RegraftError, match="ffn to be a multiple of 8, got 60: use 56 or 64"):
        resized("mixtral", ffn=60)
    with pytest.raises(RegraftError, match=r"hidden 48 cannot have ffn 72, use --ffn 96"):
        resized("dinov2", hidden=48)


def test_dinov2_ratio_gives_the_width(tmp_path: Path) -> None:
    grown = resized("dinov2", hidden=48, ffn=144, depth=5)
    assert (grown["mlp_ratio"], grown["out_features"], grown["out_indices"]) == (3, ["stage5"], [5])
    assert set(grown) == set(tiny("dinov2")[0].to_dict())
    model = transformers.Dinov2Model(transformers.Dinov2Config.from_dict(grown))
    assert model.encoder.layer[4].mlp.fc1.weight.shape == (144, 48)
    config = tiny("dinov2", use_swiglu_ffn=True)[0].to_dict()
    sizes = find_anatomy(config).solve(config)
    assert (
        sizes["ffn"] == 48
        and find_anatomy(config).resize_config(config, sizes | {"ffn": 72})["mlp_ratio"] == 3
    )
    with pytest.raises(RegraftError, match="use --ffn 96"):
        find_anatomy(config).resize_config(config, sizes | {"ffn": 80})


def test_vit_keeps_heads_and_pooler_when_it_widens() -> None:
    grown = resized("vit", hidden=50)
    assert (grown["hidden_size"], grown["head_dim"], grown["pooler_output_size"]) == (50, 8, 36)
    old = tiny("vit", architecture="ViTModel", hidden=72)[0].to_dict()
    del old["head_dim"], old["pooler_output_size"]
    sizes = find_anatomy(old).solve(old)
    assert (sizes["dim"], sizes["pool"]) == (8, 72) and find_anatomy(old).resize_config(
        old, sizes
    ) == old
    grown = find_anatomy(old).resize_config(old, sizes | {"hidden": 90})
    assert (grown["head_dim"], grown["pooler_output_size"]) == (8, 72)


def test_phi3_longrope_wants_hidden_to_be_heads_times_head_dim() -> None:
    factors = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "rope_theta": 1e4,
    }
    config = tiny("phi3", hidden=72, rope_parameters=factors)[0].to_dict()
    anatomy = find_anatomy(config)
    sizes = anatomy.solve(config)
    assert anatomy.resize_config(config, sizes) == config
    with pytest.raises(
        RegraftError, match="hidden // heads to be head_dim 8, got 90 // 9: use --hidden 72"
    ):
        anatomy.resize_config(config, sizes | {"hidden": 90})


def test_phi_norms_want_hidden_to_be_heads_times_head_dim() -> None:
    config = tiny("phi", hidden=72, qk_layernorm=True)[0].to_dict()
    sizes = find_anatomy(config).solve(config)
    with pytest.raises(
        RegraftError, match="hidden // heads to be head_dim 8, got 90 // 9: use --hidden 72"
    ):
        find_anatomy(config).resize_config(config, sizes | {"hidden": 90})
    plain = config | {"qk_layernorm": False}
    assert find_anatomy(plain).resize_config(plain, sizes | {"hidden": 90})["head_dim"] == 8


def test_classes_without_a_table_are_named() -> None:
    config = {**tiny("bert")[0].to_dict(), "architectures": ["BertForMultipleChoice"]}
    with pytest.raises(
        RegraftError,
        match=r"no table for the class 'BertForMultipleChoice'.*use BertModel, BertForM",
    ):
        find_anatomy(config).place(config)
    patches = {**tiny("vit")[0].to_dict(), "patch_size": [5, 3]}
    with pytest.raises(RegraftError, match="patches of 5 x 3"):
        find_anatomy(patches).place(patches)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_without_architectures_a_config_is_the_base_model(family: str, tmp_path: Path) -> None:
    base = next(name for name in ARCHITECTURES[family] if name.endswith("Model"))
    config = saved(tmp_path, family, architecture=base).config
    bare = {key: value for key, value in config.items() if key != "architectures"}
    assert find_anatomy(bare).place(bare) == find_anatomy(config).place(config)


def test_what_a_class_does_not_read_is_dropped_with_a_reason(tmp_path: Path) -> None:
    """Google's files of a masked model hold the pooler and the next-sentence head of pre-training."""
    saved(tmp_path, "bert", architecture="BertForPreTraining")
    config = read_json(tmp_path / "config.json") | {"architectures": ["BertForMaskedLM"]}
    text = transformers.BertConfig.from_dict(config).to_json_string(use_diff=False)
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    dropped = Checkpoint.open(tmp_path).dropped
    assert set(dropped) == {
        f"{name}.{end}"
        for name in ("bert.pooler.dense", "cls.seq_relationship")
        for end in ("weight", "bias")
    }


@pytest.mark.parametrize("family", NEW)
def test_streams_are_joined(family: str) -> None:
    """Whatever is read is written, every scale is used, and every branch ends in a norm or in the
    stream.
    """
    anatomy: Anatomy = find_anatomy(tiny(family)[0].to_dict())
    parts: list[Part] = list(anatomy.parts.values())
    hidden = [part for part in parts if "hidden" in (*part.axes.inputs, *part.axes.outputs[0])]
    written = {part.writes for part in hidden if "hidden" in part.axes.outputs[0]}
    read = {part.reads for part in hidden if "hidden" in part.axes.inputs or part.norm}
    assert read - {"head"} <= written and ("branch" in written) == ("branch" in read)
    assert {part.scaled for part in parts if part.scaled} == {
        r for r, p in anatomy.parts.items() if p.axes.kind == "scale"
    }
