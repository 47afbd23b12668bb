"""`--to`: every key of the target is what the result has, or is refused by name; nothing is
dropped, and what is carried over changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import refused, run_main
from helpers.tiny import GROWABLE, inputs, max_relative_difference, outputs, tiny
from safetensors.torch import save_file

from regraft.checks.check import check
from regraft.checks.growth import is_exact
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.sizes_to_steps import Growth
from regraft.growth.steps.untie import TIE
from regraft.growth.target_config import (
    NEUTRAL,
    find_reason,
    match_target,
    read_target,
    read_with_defaults,
)
from regraft.mixers.remix import Remix

# Values for keys whose default is null, or of which not every other value is one.
OTHERS: dict[str, Any] = {
    "dtype": "bfloat16",
    "architectures": ["LlamaModel"],
    "problem_type": "regression",
    "classifier_dropout": 0.4,
    "use_bidirectional_attention": True,
    "summary_activation": "tanh",
    "summary_type": "last",
    "sliding_window": 8,
    "pad_token_id": 5,
    "id2label": None,
    "label2id": None,
    "layer_types": None,
    "stage_names": None,
    "out_features": ["stage1"],
    "out_indices": [1],
    "pooler_act": "relu",
}


def change(key: str, value: Any) -> Any:
    """Another value of a config key, that its class takes."""
    if isinstance(value, dict) and key == "rope_parameters":
        return json.loads(json.dumps(value).replace("10000", "20000").replace("1000000", "2"))
    if key in ("id2label", "label2id"):
        return {k: f"other {v}" for k, v in value.items()} if key == "id2label" else None
    if key == "layer_types":
        other = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
        return [other[value[0]], *value[1:]]
    if OTHERS.get(key) is not None and value != OTHERS[key]:
        return OTHERS[key]
    if isinstance(value, bool):
        return not value
    if key in ("hidden_act", "hidden_activation", "activation_function"):
        return "relu"
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 0.5 + 0.05
    return None


def save(family: str, folder: Path, **keys: Any) -> tuple[Any, Any]:
    config, model = tiny(family, **keys)
    model.save_pretrained(folder)
    return config, model


def write_target(folder: Path, fields: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def larger_fields(family: str, source: Checkpoint) -> dict[str, Any]:
    """A target that differs in sizes alone, with every key of the class."""
    ffn = {"mixtral": 64, "dinov2": 108}.get(family, 60)
    fields = json.loads(tiny(family, ffn=ffn, layers=4)[0].to_json_string(use_diff=False))
    kinds = Growth(ffn=ffn, layers=4)(source).config.get("layer_types")
    return fields | ({"layer_types": kinds} if kinds else {})


@pytest.mark.parametrize("family", GROWABLE)
def test_no_key_of_a_target_is_dropped(family: str, tmp_path: Path) -> None:
    config, model = save(family, tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    base, sizes = larger_fields(family, source), {key for key, _ in source.anatomy.sizes}
    larger = Growth(to=write_target(tmp_path / "target", base))(source)
    accepted, refused = {}, []
    for key in sorted(set(base) - sizes - {"model_type", "transformers_version"}):
        if (value := change(key, base[key])) is None:
            continue
        to = write_target(tmp_path / "target", base | {key: value})
        try:
            if key == TIE:
                grown = Growth(to=to)(source)
            else:
                grown = match_target(source, read_target(source, to), ())(larger)
        except RegraftError as error:
            reasons = (key, "rope_theta", "growth does not change", "sliding_window")
            assert any(reason in str(error) for reason in reasons), (key, error)
            refused.append(key)
            continue
        if find_reason(key, NEUTRAL) is None:
            wanted = read_with_defaults(base | {key: value})
            assert read_with_defaults(grown.config)[key] == wanted[key], key
            accepted[key] = value
    assert accepted and refused, (accepted, refused)

    # All that was accepted, together.
    to = write_target(tmp_path / "target", base | accepted)
    Growth(to=to)(source).save(tmp_path / "out")
    stock = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    given = inputs(config)
    before, after = outputs(model, given), outputs(stock, given)
    bound = 1e-3 if family in ("bert", "roberta", "olmo2") else 2e-5
    for name, value in before.items():
        assert max_relative_difference(value, after[name]) < bound, (name, accepted)


def test_a_tied_source_grows_to_an_untied_target(tmp_path: Path, capsys: Any) -> None:
    """Qwen3-0.6B beside Qwen3-8B: other sizes, an output embedding of its own, more positions."""
    keys = {"tie_word_embeddings": True, "max_position_embeddings": 128, "max_window_layers": 3}
    config, model = save("qwen3", tmp_path / "source", **keys)
    fields = tiny("qwen3", hidden=48, ffn=60, heads=12, kv=4, layers=5)[0].to_dict()
    fields |= {
        "tie_word_embeddings": False,
        "max_position_embeddings": 256,
        "attention_dropout": 0.1,
    }
    to = write_target(tmp_path / "target", json.loads(json.dumps(fields, default=str)))
    code, _, err = run_main(capsys, "grow", tmp_path / "source", tmp_path / "out", "--to", to)
    assert code == 0, err
    stock = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert stock.lm_head.weight is not stock.get_input_embeddings().weight
    assert stock.config.max_position_embeddings == 256 and stock.config.attention_dropout == 0.1
    given = inputs(config)
    before, after = outputs(model, given)["logits"], outputs(stock, given)["logits"]
    assert max_relative_difference(before, after) < 2e-5
    receipts = check(tmp_path / "source", tmp_path / "out")
    assert receipts["holds"] and receipts["exact"]


def test_keys_of_older_releases_count_too(tmp_path: Path) -> None:
    """A source that has rope_theta beside everything else, and a target whose keys are missing."""
    save("llama", tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    fields = json.loads(file.read_text())
    del fields["rope_parameters"], fields["rms_norm_eps"]
    file.write_text(json.dumps(fields | {"rope_theta": 500.0, "torch_dtype": "float32"}))
    source = Checkpoint.open(tmp_path / "source")
    larger = fields | {"intermediate_size": 60, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6}
    same = write_target(tmp_path / "same", larger | {"rope_theta": 500})
    assert not [step for step in Growth(to=same)(source).history if step["step"] == "Carry"]

    other = write_target(tmp_path / "other", larger)
    with pytest.raises(RegraftError, match="rope_theta 10000.0 .without --to: 500"):
        Growth(to=other)(source)
    adopted = Growth(to=other, adopt=("rope_theta",))(source)
    adopted.save(tmp_path / "out")
    assert read_with_defaults(adopted.config)["rope_parameters"]["rope_theta"] == 10000
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 10000


def test_a_linearized_source_takes_settings_but_no_other_mixers(tmp_path: Path) -> None:
    save("llama", tmp_path / "source")
    linear = Remix("gla", "0", window=0)(Checkpoint.open(tmp_path / "source"))
    linear.save(tmp_path / "linear")
    source = Checkpoint.open(tmp_path / "linear")
    fields = Growth(layers=4)(source).config
    fields = fields | {"max_position_embeddings": 99}
    grown = Growth(to=write_target(tmp_path / "target", fields))(source)
    assert grown.layers == 4 and grown.config["max_position_embeddings"] == 99
    fields = fields | {"mixers": [None] * 4, "attention": [None] * 4}
    to = write_target(tmp_path / "target", fields)
    with pytest.raises(RegraftError, match="linearize after growing"):
        Growth(to=to, adopt=("all",))(source)


def test_new_biases_have_no_moments(tmp_path: Path, capsys: Any) -> None:
    save("llama", tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    to = write_target(tmp_path / "t", larger_fields("llama", source) | {"attention_bias": True})
    moments = {
        f"{kind}/{source.names[key]}": lazy.read().abs()
        for kind in ("exp_avg", "exp_avg_sq")
        for key, lazy in source.tensors.items()
    }
    save_file(moments, tmp_path / "adam.safetensors")
    words = ["grow", tmp_path / "source", tmp_path / "out", "--to", to, "--optimizer-state"]
    line = refused(capsys, *words, tmp_path / "adam.safetensors")
    assert "q_proj.bias', of which the optimiser has no moments" in line


def test_adopted_keys_are_the_target_s_and_said_to_be_inexact(tmp_path: Path, capsys: Any) -> None:
    save("llama", tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    base = larger_fields("llama", source)
    base |= {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}
    to = write_target(tmp_path / "target", base | {"of_nobody": 1})
    words = ["grow", tmp_path / "source", tmp_path / "out", "--to", to]

    # All are named, each with both values.
    code, _, err = run_main(capsys, *words)
    line = err.strip().splitlines()[-1]
    assert code == 2 and "rope_theta 77.0 (without --to: 10000.0)" in line
    assert "rms_norm_eps 0.01" in line and "--adopt of_nobody,rms_norm_eps,rope_theta" in line
    code, _, err = run_main(capsys, *words, "--adopt", "rope_theta")
    assert code == 2 and "rms_norm_eps" in err and "rope_theta 77" not in err
    code, _, err = run_main(capsys, *words, "--adopt", "all,hidden_act")
    assert code == 2 and "--adopt hidden_act" in err and "does not differ" in err

    code, said, err = run_main(capsys, *words, "--adopt", "rope_theta, rms_norm_eps,of_nobody")
    assert code == 0 and "Not exact: outputs move" in said, err
    assert "Note: not exact, since it is as the target has it: of_nobody 1" in said
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 77.0
    assert written["rms_norm_eps"] == 1e-2 and written["of_nobody"] == 1
    receipts = check(tmp_path / "source", tmp_path / "out")
    assert receipts["holds"] and not receipts["exact"] and receipts["rel_logit_diff"] > 1e-3


def test_a_head_of_its_own_is_tied_only_when_asked(tmp_path: Path) -> None:
    save("llama", tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    to = write_target(
        tmp_path / "t", larger_fields("llama", source) | {"tie_word_embeddings": True}
    )
    with pytest.raises(RegraftError, match="tie_word_embeddings True .without --to: False"):
        Growth(to=to)(source)
    tied = Growth(to=to, adopt=("tie_word_embeddings",))(source)
    assert ("head.weight", None) not in tied.tensors and "lm_head.weight" in tied.dropped
    assert not is_exact(list(tied.history))


def test_an_equal_head_is_tied(tmp_path: Path) -> None:
    config, model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "tied")
    Growth(untie=True)(Checkpoint.open(tmp_path / "tied")).save(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    to = write_target(
        tmp_path / "t", larger_fields("llama", source) | {"tie_word_embeddings": True}
    )
    grown = Growth(to=to)(source)
    grown.save(tmp_path / "out")
    assert grown.history[1]["step"] == "Tie" and is_exact(list(grown.history))
    stock = type(model).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert stock.lm_head.weight is stock.get_input_embeddings().weight
    given = inputs(config)
    before, after = outputs(model, given)["logits"], outputs(stock, given)["logits"]
    assert max_relative_difference(before, after) < 2e-5


@pytest.mark.parametrize(
    ("family", "keys", "adopt", "message"),
    [
        (
            "bert",
            {"add_cross_attention": True, "is_decoder": True},
            "all",
            "parameters, '.*' gives",
        ),
        ("phi", {"qk_layernorm": True}, "all", "growth does not make"),
        ("llama", {"hidden_size": 27}, "all", "smaller than the source"),
    ],
)
def test_settings_that_need_other_tensors_are_refused(
    family: str, keys: dict[str, Any], adopt: str, message: str, tmp_path: Path
) -> None:
    save(family, tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    to = write_target(tmp_path / "target", larger_fields(family, source) | keys)
    with pytest.raises(RegraftError, match=message):
        Growth(to=to, adopt=(adopt,))(source)


def test_adopting_needs_a_target(tmp_path: Path, capsys: Any) -> None:
    save("llama", tmp_path / "source")
    words = ["plan", tmp_path / "source", "--ffn", 60, "--adopt", "rope_theta"]
    code, _, err = run_main(capsys, *words)
    assert code == 2 and "--adopt rope_theta takes over keys of a target: give --to" in err
