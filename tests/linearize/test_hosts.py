"""Every decoder that can be linearized gives a directory that opens: by transformers, by regraft,
and without regraft, with its experts, caps and windows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.cli import run_main
from helpers.tiny import byte_tokenizer, tiny, tokens
from transformers import AutoModelForCausalLM

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.mixers.remix import Remix

KEYS = {"gemma2": {"attn_logit_softcapping": 2.0}, "mixtral": {"sliding_window": 16}}
HOSTS = "llama mistral mixtral qwen2 qwen3 gemma gemma2 phi phi3 gpt2 gpt_neox starcoder2".split()
FLAGS = ("--mixer", "gla", "--keep", "1", "--window", "16", "--sinks", "0", "--json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hosts")


def make(folder: Path, family: str, capsys: pytest.CaptureFixture) -> Path:
    """A source in bfloat16 and, linearized by the command, `FAMILY-out`."""
    source, out = folder / family, folder / f"{family}-out"
    if not out.exists():
        _, model = tiny(family, **KEYS.get(family, {}))
        model.to(torch.bfloat16).save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        code, _, said = run_main(capsys, "linearize", source, out, *FLAGS)
        assert code == 0, said
    return out


@pytest.mark.parametrize("family", HOSTS)
def test_what_linearize_writes_opens(
    family: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    out, x = make(folder, family, capsys), tokens(1, 16)
    stock = AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32).eval()
    opened, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert opened.config._attn_implementation == stock.config._attn_implementation
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    own = modeling.load(out)

    # Within the window and with gates shut, both are the source.
    with torch.no_grad():
        expected = stock(x).logits
        for model in (opened.eval(), own):
            with modeling.force_branch(model, "window"):
                difference = (model(x).logits - expected).abs().max() / expected.abs().max()
            assert difference < 1e-5

    # The model's own names and its checkpoint's, there and back.
    stored = modeling.to_checkpoint_names(own, own.state_dict())
    checkpoint = Checkpoint.open(out)
    assert set(checkpoint.names.values()) <= set(stored)
    named = {name: stored[name] for name in checkpoint.names.values()}
    back = modeling.from_checkpoint_names(own, named)
    assert all(torch.equal(back[name], value) for name, value in own.named_parameters())


def test_a_model_is_saved_again_under_the_names_it_had(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = make(folder, "mixtral", capsys)
    AutoModelForCausalLM.from_pretrained(out, dtype="auto").save_pretrained(tmp_path / "again")
    before, after = Checkpoint.open(out), Checkpoint.open(tmp_path / "again")
    for key, lazy in before.tensors.items():
        assert torch.equal(lazy.read(), after.tensors[key].read()), key


REMOTE = """
import sys, torch
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, dtype=torch.float32
    ).eval()
    assert "regraft" not in sys.modules and type(model).__name__.startswith("Regraft")
    ids = torch.arange(3, 33).unsqueeze(0)
    print(float(model(ids).logits.double().abs().sum()))
"""


def test_experts_and_caps_load_without_regraft(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    outs = [make(folder, family, capsys) for family in ("gemma2", "mixtral")]
    environment = {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "",
        "HOME": str(tmp_path),
    }
    command = [sys.executable, "-c", REMOTE, *map(str, outs)]
    printed = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    ids = torch.arange(3, 33).unsqueeze(0)
    with torch.no_grad():
        for out, total in zip(outs, printed.stdout.split(), strict=True):
            expected = float(modeling.load(out)(ids).logits.double().abs().sum())
            assert float(total) == pytest.approx(expected, rel=1e-5)


def test_configs_without_a_cap_still_open(tmp_path: Path) -> None:
    """As they were before there was such a key; a cap of the wrong type is refused."""
    tiny("llama")[1].save_pretrained(tmp_path / "source")
    Remix()(Checkpoint.open(tmp_path / "source")).save(tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    assert all("softcap" not in fields for fields in config["attention"] if fields)
    Checkpoint.open(tmp_path / "out")
    config["attention"][1]["softcap"] = "much"
    file.write_text(json.dumps(config))
    with pytest.raises(RegraftError, match="softcap"):
        Checkpoint.open(tmp_path / "out")
