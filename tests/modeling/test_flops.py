"""FLOPs from the anatomy equal PyTorch's own count on real models: every family and class, growth,
mixers, the loop.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import ARCHITECTURES, CONFIGS, tiny, tokens
from helpers.tiny import inputs as made
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from regraft import modeling
from regraft.cli import main as cli
from regraft.core.anatomy import find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.growth.sizes_to_steps import Growth
from regraft.mixers.remix import Remix
from regraft.modeling import flops
from regraft.plan.plan import Plan
from regraft.train import loop
from regraft.train.objectives import Images, Packed, Rows
from regraft.train.stage import Stage

CASES = [(family, name) for family in CONFIGS for name in ARCHITECTURES.get(family, (None,))]
MIXERS = [
    Remix("window", "0", window=16),
    Remix("supra", "none", window=0),
    Remix("supra", "none", window=0, options={"feature": "dense"}),
    Remix(
        "gated_deltanet", "none", window=0, options={"grouped": False, "norm": True, "gate": True}
    ),
    Remix("gated_deltanet", "0", window=16),
    Remix("retnet", "none", window=0),
    Remix("mamba", "none", window=0),
    Remix("mamba", "0", window=0, options={"layout": "attention", "conv": 1}),
    Remix("mamba2", "none", window=0, options={"expand": 3, "state": 20, "head_dim": 4}),
    Remix("mamba2", "0", window=16, options={"layout": "attention"}),
    Remix("lightning", "0", window=16, options={"grouped": True, "norm": "none"}),
    Remix("t2r", "none", window=0, options={"feature": 6, "grouped": True}),
    Remix("hedgehog", "none", window=0, options={"feature": 5}),
    Remix("gla", "none", window=0),
    Remix("gla", "0", window=16, options={"gate_from": "keys", "grouped": True}),
    Remix("rwkv6", "none", window=0),
    Remix(
        "rwkv6",
        "none",
        window=0,
        options={"decay": "static", "shift": False, "bonus": False, "grouped": True},
    ),
    Remix("lolcats", "none", window=0, options={"window": 40, "grouped": True}),
]


def outputs(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of everything that the class gives, so that nothing is left out of the backward pass."""
    found = model(**given)
    values = [v for v in found.values() if torch.is_tensor(v) and v.ndim] + list(
        found.get("feature_maps") or ()
    )
    return sum((value.sum() for value in values), torch.zeros(()))


def counted(
    model: PreTrainedModel, given: dict[str, torch.Tensor], ours: bool = False
) -> tuple[int, int]:
    """(forward, forward and backward) FLOPs as PyTorch counts them; `ours`: with `flops.counter`'s
    further kernels.
    """
    found = []
    for back in (False, True):
        with flops.build_flop_counter() if ours else FlopCounterMode(display=False) as counter:
            value = outputs(model, given)
            if back:
                value.backward()
        found.append(counter.get_total_flops())
    return found[0], found[1]


def rows(config: Any, length: int) -> dict[str, torch.Tensor]:
    """Two rows of input; images have one size."""
    return made(config) if hasattr(config, "image_size") else {"input_ids": tokens(2, length)}


def agrees(
    config: dict[str, Any] | Checkpoint, model: PreTrainedModel, length: int, ours: bool
) -> None:
    """Both passes; far closer than the promised 1 %, so that a head on too many positions shows."""
    forward, training = counted(model, rows(model.config, length), ours)
    assert flops.forward_flops(config, length, 2) == pytest.approx(forward, rel=0.001)
    assert flops.training_flops(config, length, 2) == pytest.approx(training, rel=0.001)


@pytest.mark.parametrize(("family", "architecture"), CASES)
def test_every_family_and_class(family: str, architecture: str | None) -> None:
    config, model = tiny(family, architecture=architecture)
    for length in (13, 39):
        agrees(config.to_dict(), model, length, ours=True)
    model.set_attn_implementation("eager")  # kernels that PyTorch's own table has
    if find_anatomy(config.to_dict()).routed:
        model.set_experts_implementation("eager")
    for length in (13, 39):
        agrees(config.to_dict(), model, length, ours=False)
    if "image_size" not in config.to_dict():
        short, long = (counted(model, rows(config, length))[1] for length in (13, 39))
        square = flops.training_flops(config.to_dict(), 39, 2) - 3 * flops.training_flops(
            config.to_dict(), 13, 2
        )
        assert square == pytest.approx(
            long - 3 * short, rel=0.01
        )  # of attention alone, but for a head on one position


@pytest.mark.parametrize("family", CONFIGS)
def test_after_growth(family: str, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path)
    target = Growth(ffn=144, layers=5)(Checkpoint.open(tmp_path))
    for length in (13, 39):
        agrees(target, modeling.materialize(target), length, ours=True)
    assert flops.forward_flops(target, 13) > 1.5 * flops.forward_flops(
        Checkpoint.open(tmp_path), 13
    )


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3}),
        ("bert", {"tie_word_embeddings": False}),
        ("dinov2", {"use_swiglu_ffn": True}),
        ("vit", {"image_size": (10, 25)}),
    ],
)
def test_options_of_a_family(family: str, keys: dict[str, Any]) -> None:
    config, model = tiny(family, **keys)
    if isinstance(config.to_dict().get("image_size"), (list, tuple)):
        high, wide = config.image_size
        given = {"pixel_values": torch.randn(2, config.num_channels, high, wide)}
    else:
        given = rows(config, 39)
    forward, training = counted(model, given, ours=True)
    assert flops.forward_flops(config.to_dict(), 39, 2) == pytest.approx(forward, rel=0.001)
    assert flops.training_flops(config.to_dict(), 39, 2) == pytest.approx(training, rel=0.001)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "remix", MIXERS, ids=lambda remix: f"{remix.mixer}-{remix.window}-{len(remix.options)}"
)
def test_linearized_models(family: str, remix: Remix, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path)
    target = remix(Checkpoint.open(tmp_path))
    model = modeling.materialize(target)
    for length in (17, 150) if family == "llama" else (60,):
        agrees(target, model, length, ours=True)


def per_step(model: PreTrainedModel, stage: Stage, data: Rows, out: Path) -> int:
    """The ledger's FLOPs of a step."""
    return int(
        loop.train(loop.Run(model, [stage], lambda length: data, out))["stages"][0][
            "flops_per_step"
        ]
    )


def text(length: int) -> Packed:
    """Four rows, one document each."""
    ids = tokens(4, length)
    return Packed(
        ids,
        torch.arange(length).expand_as(ids),
        torch.full((4,), length),
        mask=96,
        special=(0, 1, 2),
    )


@pytest.mark.parametrize(
    "remix", [None, Remix(keep="every:2", window=16)], ids=["stock", "linearized"]
)
def test_the_loops_ledger(remix: Remix | None, tmp_path: Path) -> None:
    tiny("llama")[1].save_pretrained(tmp_path / "source")
    target = Checkpoint.open(tmp_path / "source")
    target = remix(target) if remix else target
    stage = Stage("next", 256, length=128, batch=2, precision="float32")
    found = per_step(modeling.materialize(target), stage, text(128), tmp_path / "run")
    assert found == pytest.approx(flops.training_flops(target, 128, 2), rel=0.01)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_the_loops_ledger_of_masked_tokens(family: str, tmp_path: Path) -> None:
    config, model = tiny(family)
    stage = Stage("mask", 64, length=32, batch=2, precision="float32")
    found = per_step(model, stage, text(32), tmp_path)
    assert found == pytest.approx(flops.training_flops(config.to_dict(), 32, 2), rel=0.01)


@pytest.mark.parametrize(
    ("family", "architecture"), [("vit", None), ("dinov2", "Dinov2ForImageClassification")]
)
def test_the_loops_ledger_of_images(family: str, architecture: str | None, tmp_path: Path) -> None:
    config, model = tiny(family, architecture=architecture)
    stage = Stage("image", 2, length=1, batch=2, precision="float32")
    found = per_step(
        model, stage, Images(made(config, 4)["pixel_values"], torch.arange(4)), tmp_path
    )
    assert found == pytest.approx(flops.training_flops(config.to_dict(), 1, 2), rel=0.01)


@pytest.mark.parametrize("kernel", ["flash_attention", "efficient_attention", "cudnn_attention"])
def test_fused_kernels_count_as_plain_products_do(kernel: str) -> None:
    heads = torch.empty(2, 4, 10, 8, device="meta")
    op = f"_scaled_dot_product_{kernel}"
    table = flops.build_flop_counter().flop_registry
    forward = table[getattr(torch.ops.aten, op)](heads, heads, heads)
    backward = table[getattr(torch.ops.aten, f"{op}_backward")](heads, heads, heads, heads)
    assert forward == 2 * 2 * (2 * 4 * 10 * 10 * 8) and backward == 2 * forward


def test_what_has_no_count() -> None:
    config = tiny("bert")[0].to_dict()
    with pytest.raises(RegraftError, match="rows of 42 tokens in a bert: give 1 to 41"):
        flops.forward_flops(config, 42)
    with pytest.raises(RegraftError, match="rows of 0 tokens"):
        flops.forward_flops(tiny("llama")[0].to_dict(), 0)


def test_the_plan_says_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("llama")[1].save_pretrained(tmp_path)
    assert cli.main(["plan", str(tmp_path), "--layers", "6", "--length", "64", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    source, target = said["row_flops_per_token"]["source"], said["row_flops_per_token"]["target"]
    assert said["row_tokens"] == 64 and target["training"] == 3 * target["forward"]
    assert (
        source["forward"]
        == flops.forward_flops(Checkpoint.open(tmp_path), 64) // 64
        < target["forward"]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_decoded_token_costs_what_one_step_through_the_cache_does(
    family: str, tmp_path: Path
) -> None:
    tiny(family, tie_word_embeddings=True)[1].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    model = modeling.materialize(source)
    with torch.no_grad():
        past = modeling.cache_of(model(tokens(1, 40)))
        with flops.build_flop_counter() as counter:
            model(tokens(1, 1), **modeling.cache_kwargs(past))
    assert (
        Plan.of(source, source, context=41).flops_per_token["source"] == counter.get_total_flops()
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_counting_changes_no_bit(family: str) -> None:
    """A run that counts at another step, since it was resumed there, ends with the same weights."""
    _, model = tiny(family)
    found = []
    for counter in (nullcontext(), flops.build_flop_counter()):
        model.zero_grad()
        with counter:
            outputs(model, made(model.config)).backward()
        found.append([value.grad for value in model.parameters() if value.grad is not None])
    assert found[0] and all(map(torch.equal, *found))
