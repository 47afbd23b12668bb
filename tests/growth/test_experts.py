"""Dense models become models with experts, and those get more, without changing a logit; noise says
what it costs; the rest is refused in a line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.cli import run_main
from helpers.tiny import inputs, max_relative_difference, outputs, read_files, tiny

import regraft
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.experts import CLASSES, TARGETS
from regraft.growth.shrink import shrink
from regraft.growth.sizes_to_steps import Growth
from regraft.growth.steps.add_experts import AddExperts
from regraft.io.output import MARKER

BOUND = 2e-5
SIZES: dict[str, Any] = {"hidden": 40, "ffn": 56, "layers": 2}
TIED = {"tie_word_embeddings": True}
ROPE = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}
DENSE: list[tuple[str, dict[str, Any], int, int]] = [
    ("llama", {"heads": 10, "kv": 2}, 4, 2),
    ("llama", {"heads": 10, "kv": 2, "rms_norm_eps": 1e-3} | TIED | ROPE, 3, 3),
    ("mistral", {"hidden_act": "gelu"}, 4, 1),
    ("qwen3", {}, 4, 2),
    ("qwen3", {"attention_bias": True} | TIED, 5, 3),
    ("qwen2", {}, 4, 2),
]


def save(family: str, folder: Path, **keys: Any) -> tuple[Any, Any]:
    config, model = tiny(family, **(SIZES | keys))
    model.save_pretrained(folder)
    return config, model


def open_stock(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def difference(config: Any, model: Any, stock: Any) -> float:
    given = inputs(config)
    return max_relative_difference(outputs(model, given)["logits"], outputs(stock, given)["logits"])


@pytest.mark.parametrize(("family", "keys", "experts", "top_k"), DENSE, ids=str)
def test_equal_experts_give_what_the_mlp_gave(
    family: str, keys: dict[str, Any], experts: int, top_k: int, tmp_path: Path
) -> None:
    config, model = save(family, tmp_path / "source", **keys)
    grown = AddExperts(experts, top_k)(Checkpoint.open(tmp_path / "source"))
    grown.save(tmp_path / "out")
    stock = open_stock(tmp_path / "out")
    assert type(stock).__name__ == CLASSES[TARGETS[family]].name
    assert (stock.config.num_experts, stock.config.num_experts_per_tok) == (experts, top_k)
    assert difference(config, model, stock) < BOUND

    # Any router will do, and tokens really go to different experts.
    torch.manual_seed(3)
    routers = [
        value for name, value in stock.named_parameters() if name.endswith("mlp.gate.weight")
    ]
    assert len(routers) == 2 and all(bool(router.any()) for router in routers)
    with torch.no_grad():
        for router in routers:
            router.copy_(torch.randn_like(router))
    assert difference(config, model, stock) < BOUND


@pytest.mark.parametrize("family", CLASSES)
def test_more_experts_in_whole_sets_are_exact(family: str, tmp_path: Path) -> None:
    dense = next(name for name, target in TARGETS.items() if target == family)
    config, _ = save(dense, tmp_path / "dense", heads=10, kv=2)
    first = AddExperts(3, 2, noise=0.5)(Checkpoint.open(tmp_path / "dense"))
    first.save(tmp_path / "source")
    grown = Growth(experts=6, layers=3)(Checkpoint.open(tmp_path / "source"))
    grown.save(tmp_path / "out")
    before, after = open_stock(tmp_path / "source"), open_stock(tmp_path / "out")
    assert after.config.num_experts_per_tok == 4 and after.config.num_experts == 6
    assert difference(config, before, after) < BOUND
    assert "stay alike" in str(grown.history[-1]["notes"])
    with pytest.raises(RegraftError, match="whole sets: use --experts 3 or 6, not 5"):
        AddExperts(5)(Checkpoint.open(tmp_path / "source"))
    with pytest.raises(RegraftError, match="use --top-k 4"):
        AddExperts(6, 2)(Checkpoint.open(tmp_path / "source"))


def test_the_command_grows_width_first_and_its_check_holds(tmp_path: Path, capsys: Any) -> None:
    config, model = save("mistral", tmp_path / "source", hidden=36, ffn=52)
    words = ["grow", tmp_path / "source", tmp_path / "out", "--experts", "4", "--top-k", "2"]
    code, _, err = run_main(capsys, *words, "--hidden", "48", "--ffn", "64", "--vocab", "104")
    assert code == 0, err
    receipts = regraft.check(tmp_path / "source", tmp_path / "out")
    assert receipts["holds"] and receipts["exact"] and receipts["greedy"] == 24
    stock = open_stock(tmp_path / "out")
    assert stock.config.hidden_size == 48 and stock.config.sliding_window == 40


def test_experts_shrink_to_the_mlp(tmp_path: Path) -> None:
    save("qwen2", tmp_path / "source")
    Growth(experts=4, ffn=64)(Checkpoint.open(tmp_path / "source")).save(tmp_path / "out")
    shrink(tmp_path / "out", tmp_path / "back")
    files = read_files(tmp_path / "back")
    files.pop(MARKER)
    assert files == read_files(tmp_path / "source")


@pytest.mark.parametrize("options", [["--expert-noise", "0.05"], ["--expert-reinit", "0.5"]])
def test_what_parts_the_experts_says_what_it_costs(
    options: list[str], tmp_path: Path, capsys: Any
) -> None:
    config, model = save("qwen3", tmp_path / "source")
    words = ["grow", tmp_path / "source", tmp_path / "out", "--experts", "4", *options, "--json"]
    code, out, err = run_main(capsys, *words)
    assert code == 0, err
    found = json.loads(out)
    assert 0 < found["step0"]["rel_logit_diff"] < 2
    assert any("not exact" in note for note in found["notes"])
    assert not regraft.check(tmp_path / "source", tmp_path / "out")["exact"]

    # Of the source's neurons the others stay; which ones are new differs by expert.
    grown, source = (Checkpoint.open(tmp_path / name) for name in ("out", "source"))
    old = source.tensors["mlp.up.weight", 0].read()
    same = [(grown.tensors[f"mlp.{e}.up.weight", 0].read() == old).all(1) for e in range(4)]
    counts = [int(rows.sum()) for rows in same]
    assert counts == ([28] * 4 if options[0] == "--expert-reinit" else [0] * 4)
    if counts[0]:
        assert not torch.equal(same[0], same[1])
        down = grown.tensors["mlp.0.down.weight", 0].read()
        kept = (down == source.tensors["mlp.down.weight", 0].read()).all(0)
        assert torch.equal(kept, same[0])


REFUSED: list[tuple[str, dict[str, Any], Growth, str]] = [
    ("gpt2", {}, Growth(experts=4), "--experts is not for gpt2.*use one of llama"),
    (
        "llama",
        {"hidden": 36, "heads": 9},
        Growth(experts=4),
        "hidden to be a multiple of 8, got 36",
    ),
    (
        "llama",
        {"heads": 10, "kv": 2, "attention_bias": True},
        Growth(experts=4),
        "no attention_bias",
    ),
    ("qwen3", {}, Growth(experts=2, top_k=3), "--top-k 3 of --experts 2: give no more"),
    ("qwen3", {}, Growth(layers=3, top_k=3), "--top-k 3 would change nothing: give --experts"),
    ("qwen3", {}, Growth(experts=2, expert_noise=-1.0), "--expert-noise must be >= 0, not -1.0"),
    ("qwen3", {}, Growth(experts=2, expert_reinit=1.5), "is a share, 0 to 1, not 1.5"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        Growth(experts=2),
        "no layer_types, and layers of .* differ",
    ),
]


@pytest.mark.parametrize(("family", "keys", "growth", "says"), REFUSED, ids=str)
def test_what_cannot_be_is_said(
    family: str, keys: dict[str, Any], growth: Growth, says: str, tmp_path: Path
) -> None:
    save(family, tmp_path, **keys)
    with pytest.raises(RegraftError, match=says):
        growth(Checkpoint.open(tmp_path))
