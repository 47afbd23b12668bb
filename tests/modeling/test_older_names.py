"""Checkpoints with the names of earlier versions load as they were, and are saved with today's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import regraft
from regraft import Merge, modeling
from regraft.core.checkpoint import Checkpoint
from regraft.core.moments import MOMENTS
from regraft.errors import RegraftError
from regraft.growth.optimizer_state import grow_optimizer_state
from regraft.io.files import sha256
from regraft.mixers.older_names import first_name, rename_older
from regraft.mixers.remix import Remix

WEIGHTS = "model.safetensors"
# The names of version 0.1.0, written out once more.
OLDER = {
    "q_proj": "qkv.q", "k_proj": "qkv.k", "v_proj": "qkv.v", "o_proj": "o",
    "q_norm": "qkv.q_norm", "k_norm": "qkv.k_norm",
}  # fmt: skip
CASES = {
    "gated_deltanet-window": ("qwen3", Remix("gated_deltanet", "0", window=8, inherit="v,o")),
    "t2r": ("gpt_neox", Remix("t2r", "0", window=0, options={"rotary": False})),
    "mamba2": ("llama", Remix("mamba2", "0", window=0)),
}


def older(name: str) -> str:
    inside = r"(\.mixer\.(?:linear\.|window\.)?)"
    return re.sub(rf"{inside}({'|'.join(OLDER)})\.", lambda m: f"{m[1]}{OLDER[m[2]]}.", name)


def write_older(folder: Path, out: Path, nested: bool) -> None:
    """A directory with the older names; `nested`: as 0.1.0 had it, all of the host's in `host`."""
    shutil.copytree(folder, out)
    values = {older(name): value for name, value in load_file(folder / WEIGHTS).items()}
    assert set(values) != set(load_file(folder / WEIGHTS))
    if nested:
        values = {f"host.{name}": value for name, value in values.items()}
        config = json.loads((folder / "config.json").read_text())
        own = {"architectures", "auto_map", "dtype", "model_type", "slot", "mixers", "attention"}
        host = {key: value for key, value in config.items() if key not in own}
        config = {key: config[key] for key in own}
        # As transformers saved it: with the kinds of layers that caches are made for.
        config["layer_types"] = ["regraft_state"] * host["num_hidden_layers"]
        config["host"] = host | {"model_type": host.pop("host")}
        (out / "config.json").write_text(json.dumps(config))
    save_file(values, out / WEIGHTS, {"format": "pt"})
    lineage = json.loads((out / "lineage.json").read_text())
    lineage["files"] = {name: sha256(out / name) for name in lineage["files"]}
    (out / "lineage.json").write_text(json.dumps(lineage))


@pytest.fixture(scope="module", params=[(c, n) for c in CASES for n in (False, True)], ids=str)
def folders(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(directory of today, the same model with the older names)."""
    (case, nested), place = request.param, tmp_path_factory.mktemp("older")
    family, remix = CASES[case]
    tiny(family, layers=2)[1].save_pretrained(place / "source")
    remix(Checkpoint.open(place / "source")).save(place / "today")
    write_older(place / "today", place / "older", nested)
    return place / "today", place / "older"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(tokens(2, 20)).logits


def names_of(folder: Path) -> set[str]:
    return set(load_file(folder / WEIGHTS))


def test_they_load_everywhere(folders: tuple[Path, Path]) -> None:
    today, folder = folders
    expected = logits(AutoModelForCausalLM.from_pretrained(today))
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    for other in (
        model,
        type(model).from_pretrained(folder),
        modeling.RegraftForCausalLM.from_pretrained(folder),
        regraft.load(folder),
        modeling.materialize(Checkpoint.open(folder)),
    ):
        assert torch.equal(logits(other), expected)
    with torch.no_grad():
        hidden = model.base_model(tokens(2, 20)).last_hidden_state
        for backbone in (
            AutoModel.from_pretrained(folder),
            AutoModelForSequenceClassification.from_pretrained(folder).base_model,
        ):
            assert torch.equal(backbone.eval()(tokens(2, 20)).last_hidden_state, hidden)


def test_they_are_saved_with_todays_names(folders: tuple[Path, Path], tmp_path: Path) -> None:
    today, folder = folders
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "by transformers")
    Checkpoint.open(folder).save(tmp_path / "by regraft")
    expected = logits(AutoModelForCausalLM.from_pretrained(today))
    for saved in tmp_path.iterdir():
        # GPT-NeoX's class has a name of its own for the head in files.
        found = {name.replace("embed_out", "lm_head") for name in names_of(saved)}
        assert found == names_of(today)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved)), expected)


def test_moments_grow(folders: tuple[Path, Path], tmp_path: Path) -> None:
    _, folder = folders
    old, values = Checkpoint.open(folder), load_file(folder / WEIGHTS)
    moments = {f"{kind}/{name}": values[name].clone() for kind in MOMENTS for name in values}
    save_file(moments, tmp_path / "moments")
    grow_optimizer_state(old, [], tmp_path / "moments", tmp_path / "grown")
    grown = {name.partition("/")[2] for name in load_file(tmp_path / "grown")}
    assert grown == set(old.names.values())


@pytest.mark.parametrize("folders", [("t2r", False), ("t2r", True)], indirect=True)
def test_t2r_merges(folders: tuple[Path, Path]) -> None:
    old = Checkpoint.open(folders[1])
    found, expected = (logits(modeling.materialize(one)) for one in (Merge()(old), old))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_check_does_their_steps_again(folders: tuple[Path, Path]) -> None:
    _, folder = folders
    found = regraft.check(folder.parent / "source", folder)
    assert found["holds"], found


REMOTE = """
import sys, torch
sys.modules["regraft"] = None
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 33)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print(float(model(ids).logits.double().sum()))
"""


@pytest.mark.parametrize("folders", [("gated_deltanet-window", True)], indirect=True)
def test_saved_code_knows_them(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Code of today beside weights with older names, without regraft."""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-c", REMOTE, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    today, older = done.stdout.split()
    assert today == older


def test_the_table_is_its_own_inverse(folders: tuple[Path, Path]) -> None:
    names = names_of(folders[0])
    assert {name: rename_older(name) for name in names} == {name: name for name in names}
    assert {rename_older(first_name(name)) for name in names} == names
    slashes = {name.replace(".", "/"): first_name(name).replace(".", "/") for name in names}
    assert all(rename_older(old) == new for new, old in slashes.items())


def test_windows_of_gemma_2_had_no_cap(tmp_path: Path) -> None:
    """0.1.0 left the source's cap out; what was trained so is loaded so, and stays so."""
    tiny("gemma2", attn_logit_softcapping=0.05)[1].save_pretrained(tmp_path / "source")
    Remix("window", "0", window=8)(Checkpoint.open(tmp_path / "source")).save(tmp_path / "today")
    config = json.loads((tmp_path / "today/config.json").read_text())
    for fields in filter(None, config["attention"]):
        assert fields.pop("softcap") == 0.05
    (tmp_path / "today/config.json").write_text(json.dumps(config))
    write_older(tmp_path / "today", tmp_path / "older", nested=True)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "older")
    mixers = [slot.mixer for slot in model.slots() if hasattr(slot, "mixer")]
    assert mixers and all(mixer.attention.softcap is None for mixer in mixers)
    model.save_pretrained(tmp_path / "saved")
    Checkpoint.open(tmp_path / "older").save(tmp_path / "saved again")
    for folder in ("saved", "saved again"):
        assert torch.equal(logits(regraft.load(tmp_path / folder)), logits(model))
    with pytest.raises(RegraftError, match="attn_logit_softcapping is 50.0"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "today", attn_logit_softcapping=50.0)
