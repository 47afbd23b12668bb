"""PEFT on linearized models: the usual target modules reach every layer, adapters merge and load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.remixes import BESIDE, REMIXES
from helpers.tiny import save_model, tokens
from transformers import AutoModelForCausalLM

from regraft import modeling
from regraft.core.checkpoint import Checkpoint

peft = pytest.importorskip("peft")
assert modeling  # imported: its classes are registered

MODELS = REMIXES | {name: BESIDE[name] for name in ("mamba-window", "mamba2-window")}
# Blocks of their own, without queries, keys and values.
OWN = {"mamba": ["x", "gate", "o_proj"], "mamba2": ["x", "b", "c", "gate", "o_proj"]}
USUAL = ["q_proj", "v_proj"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
LAYERS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models by name."""
    place = tmp_path_factory.mktemp("peft")
    source = Checkpoint.open(save_model(place / "stock", layers=LAYERS))
    for name, remix in MODELS.items():
        remix(source).save(place / name)
    return {name: place / name for name in MODELS}


def adapt(folder: Path, targets: list[str] | str | None, **options: Any) -> Any:
    """A model with additions that are not zero."""
    config = peft.LoraConfig(
        target_modules=targets, r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    torch.manual_seed(0)
    return peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).eval()


def adapted(model: Any) -> set[str]:
    """Names of the modules that have additions."""
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def count_by_layer(names: set[str]) -> list[int]:
    return [sum(f".layers.{layer}." in name for name in names) for layer in range(LAYERS)]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=tokens(2, 20)).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_targets_reach_every_layer(name: str, folders: dict[str, Path]) -> None:
    for targets in (OWN.get(name, USUAL), OWN.get(name, PROJECTIONS)):
        model = adapt(folders[name], targets)
        found = adapted(model)
        # Both branches of a gated mixer have projections; they share the one of the output.
        branches = 1 + (model.config.mixers[-1]["name"] == "gated")
        shared = targets.count("o_proj")
        each = branches * (len(targets) - shared) + shared
        kept = sum(target in PROJECTIONS for target in targets)
        specs = model.config.mixers
        assert count_by_layer(found) == [each if spec else kept for spec in specs]

        model.train()(input_ids=tokens(2, 20), labels=tokens(2, 20)).loss.backward()
        additions = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert len(additions) == 2 * len(found)
        assert all(grad is not None and grad.any() for grad in additions.values())


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_adapts_every_linear_layer(name: str, folders: dict[str, Path]) -> None:
    model = adapt(folders[name], "all-linear")
    linear = {
        module_name
        for module_name, module in AutoModelForCausalLM.from_pretrained(
            folders[name]
        ).named_modules()
        if isinstance(module, torch.nn.Linear) and module_name != "lm_head"
    }
    assert adapted(model) == linear
    before = logits(model)
    close(logits(model.merge_and_unload()), before)


@pytest.mark.parametrize("name", ["window", "gated_deltanet-window", "rwkv6", "mamba"])
def test_adapters_are_saved_and_loaded(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapt(folders[name], PROJECTIONS)
    expected, base = logits(model), AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    assert (expected - logits(base)).abs().max() > 1e-2 * expected.abs().max()
    model.save_pretrained(tmp_path)
    for again in (
        peft.PeftModel.from_pretrained(base, tmp_path),
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert torch.equal(logits(again.eval()), expected)


def test_whole_mixers_learn_beside_additions(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapt(folders["supra"], ["down_proj"], modules_to_save=["mixer"])
    learned = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert learned >= {"feature", "feature_bias"}
    with torch.no_grad():
        model.get_parameter(
            next(n for n in model.state_dict() if n.endswith("default.feature"))
        ).mul_(2)
    expected, base = logits(model), AutoModelForCausalLM.from_pretrained(folders["supra"]).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base, tmp_path).eval()), expected)
    close(logits(model.merge_and_unload()), expected)


REMOTE = """
import sys, torch
sys.modules["regraft"] = None
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save(model.eval()(input_ids=torch.load(sys.argv[1])).logits, folder + ".pt")
"""


def test_merged_models_load_without_regraft(folders: dict[str, Path], tmp_path: Path) -> None:
    expected, places = [], [tmp_path / "one", tmp_path / "two"]
    for name, place in zip(("gated_deltanet-window", "mamba2"), places, strict=True):
        model = adapt(folders[name], PROJECTIONS)
        expected.append(logits(model))
        model.merge_and_unload().save_pretrained(place)
    torch.save(tokens(2, 20), tmp_path / "ids")
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "ids"), *map(str, places)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for place, wanted in zip(places, expected, strict=True):
        close(torch.load(f"{place}.pt"), wanted)


def test_targets_must_be_named(folders: dict[str, Path]) -> None:
    """PEFT's table of defaults is its own: it knows no `regraft`, as it knows no new family."""
    with pytest.raises(ValueError, match="target_modules"):
        adapt(folders["window"], None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"v_proj": 4}},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"], "bias": "all"},
    ],
    ids=str,
)
def test_merging_while_reading_equals_peft(
    options: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    """`--adapter`: every number of the merged model is the one that PEFT gives it."""
    base = save_model(tmp_path / "base", "qwen2", layers=LAYERS)
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    config = peft.LoraConfig(
        target_modules=PROJECTIONS, r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, value in model.named_parameters():
        if value.requires_grad and "lora_" not in name:
            value.data += 0.1  # as if it had been trained
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()

    found = Checkpoint.open(base, adapter=tmp_path / "adapter")
    for key, lazy in found.tensors.items():
        name, tolerance = found.names[key], 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(
            lazy.read().float(), merged[name].float(), rtol=tolerance, atol=tolerance, msg=name
        )
