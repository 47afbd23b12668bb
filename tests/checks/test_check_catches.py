"""Results that are wrong on purpose, each with a lineage.json that fits it, do not pass `check`; and
every exact operator's results do.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny
from safetensors.torch import load_file, save_file

from regraft import modeling
from regraft.checks import liveness, outputs
from regraft.checks.check import check
from regraft.core.checkpoint import Checkpoint
from regraft.core.fused import fused_index, join_fused, split_fused
from regraft.errors import RegraftError
from regraft.growth import depth
from regraft.growth.operators import WIDTH
from regraft.growth.sizes_to_steps import Growth
from regraft.io.files import sha256

# What running both models shows, without reading lineage.json or a weight.
FUNCTION = {"rel_logit_diff", "hidden_diff", "greedy_gap", "parallel_vs_recurrent"}
BIASED = {"attention_bias": True, "mlp_bias": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": BIASED,
    "gpt2": {"n_positions": 64},
    "qwen2": {
        "use_sliding_window": True,
        "sliding_window": 40,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "gemma3_text": {
        "attention_bias": True,
        "sliding_window": 40,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "bert": {"max_position_embeddings": 41},
}


@dataclass
class Result:
    """A grown model that is about to be written wrongly."""

    made: Checkpoint
    config: dict[str, Any]
    values: dict[str, torch.Tensor]
    lineage: dict[str, Any]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @classmethod
    def read(cls, folder: Path) -> Result:
        made = Checkpoint.open(folder)
        lineage = json.loads((folder / "lineage.json").read_text())
        values = load_file(folder / "model.safetensors")
        return cls(made, copy.deepcopy(made.config), values, lineage)

    def write(self, folder: Path) -> Path:
        """With hashes that fit, as a tool would write it that hides what it did."""
        folder.mkdir()
        save_file(self.values, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config))
        files = {name: sha256(folder / name) for name in ("model.safetensors", "config.json")}
        (folder / "lineage.json").write_text(json.dumps(self.lineage | {"files": files}))
        return folder

    def name(self, role: str, layer: int | None) -> str:
        """The name in the file of a tensor, or of the fused one that a role lies in."""
        placed = self.made.anatomy.place(self.made.config)
        found = (role, layer)
        if found not in placed:
            found = next(
                key
                for key, one in placed.items()
                if key[1] == layer and fused_index(role, one.part, key[0]) is not None
            )
        return self.made.anatomy.name_in_file(placed[found].name)

    def has(self, role: str, layer: int | None = 0) -> bool:
        try:
            return self.name(role, layer) in self.values
        except StopIteration:
            return False

    def edit(
        self, role: str, layer: int | None, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Change a tensor as it is stored, or one inside a fused one with its outputs first."""
        name = self.name(role, layer)
        whole = self.values[name].clone()
        placed = self.made.anatomy.place(self.made.config)
        if (role, layer) in placed:
            self.values[name] = change(whole).contiguous()
            return
        key, one = next(
            (key, one)
            for key, one in placed.items()
            if key[1] == layer and fused_index(role, one.part, key[0]) is not None
        )
        index = fused_index(role, one.part, key[0])
        assert index is not None
        pieces = split_fused(whole, one.part, self.made.sizes)
        pieces[index] = change(pieces[index].clone())
        self.values[name] = join_fused(pieces, one.part).contiguous()

    def layer_names(self, layer: int) -> dict[str, str]:
        """Role -> name in the file of a layer's tensors."""
        return {
            role: self.made.anatomy.name_in_file(name)
            for (role, of), name in self.made.names.items()
            if of == layer
        }


Mistake = Callable[[Result], None]


def on(role: str, change: Callable[[torch.Tensor], torch.Tensor], layer: int | None = 0) -> Mistake:
    return lambda result: result.edit(role, layer, change)


def put(index: tuple[int, ...], value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] += value
        return tensor

    return change


def keys(**changes: Any) -> Mistake:
    return lambda result: result.config.update(changes)


def swap_layers(result: Result) -> None:
    low, high = result.layer_names(0), result.layer_names(2)
    for role, name in low.items():
        values = result.values
        values[name], values[high[role]] = values[high[role]], values[name]


def repeat_layer(result: Result) -> None:
    for role, name in result.layer_names(0).items():
        result.values[result.layer_names(2)[role]] = result.values[name].clone()


def round_all(result: Result) -> None:
    result.values = {name: v.bfloat16().float() for name, v in result.values.items()}


def permute_heads(role: str) -> Mistake:
    def change(result: Result) -> None:
        dim = result.made.sizes["dim"]
        result.edit(
            role,
            0,
            lambda v: v.unflatten(0, (-1, dim)).roll(1, 0).flatten(0, 1),
        )

    return change


def drop_tensor(role: str) -> Mistake:
    def change(result: Result) -> None:
        del result.values[result.name(role, 0)]

    return change


def on_gain(change: Callable[[torch.Tensor], torch.Tensor]) -> Mistake:
    def edit(result: Result) -> None:
        role = "norm.attn.weight" if result.has("norm.attn.weight") else "norm.attn_post.weight"
        result.edit(role, 0, change)

    return edit


def add_tensor(result: Result) -> None:
    result.values["more.weight"] = torch.ones(3)


def exchange(one: str, other: str) -> Mistake:
    def change(result: Result) -> None:
        values = result.values
        a, b = result.name(one, 0), result.name(other, 0)
        values[a], values[b] = values[b], values[a]

    return change


def flip_tie(result: Result) -> None:
    embedding = result.values[result.name("embed.weight", None)]
    tied = result.made.anatomy.fill_defaults(result.config)["tie_word_embeddings"]
    result.config["tie_word_embeddings"] = not tied
    if not tied:
        del result.values[result.name("head.weight", None)]
        return
    untied = result.made.anatomy.place(result.config)
    for role in ("head.weight", "head.own.bias"):
        if (role, None) in untied:
            name = untied[role, None].name
            shape = (len(embedding), embedding.shape[1])[: 2 if role == "head.weight" else 1]
            result.values[name] = torch.randn(shape, generator=result.generator)


def replace_head(result: Result) -> None:
    role = "head.weight" if result.has("head.weight", None) else "embed.weight"
    result.edit(role, None, lambda v: torch.randn(v.shape, generator=result.generator))


def drop_last_layer(result: Result) -> None:
    last = result.made.layers - 1
    for name in result.layer_names(last).values():
        del result.values[name]
    key = next(key for key, axes in result.made.anatomy.sizes if axes == "depth")
    result.config[key] = last
    if "layer_types" in result.config:
        result.config["layer_types"] = result.config["layer_types"][:last]


def shift_layer_types(result: Result) -> None:
    kinds = result.config["layer_types"]
    result.config["layer_types"] = [*kinds[1:], kinds[0]]


def shorten_window(by: int) -> Mistake:
    return lambda result: result.config.update(sliding_window=result.config["sliding_window"] - by)


def scale_rope(factor: float, key: str = "rope_theta") -> Mistake:
    def change(result: Result) -> None:
        rope = result.config["rope_parameters"]
        for parameters in [v for v in rope.values() if isinstance(v, dict)] or [rope]:
            parameters[key] = parameters[key] * factor

    return change


def stretch_rope(result: Result) -> None:
    result.config["rope_parameters"].update(rope_type="linear", factor=2.0)


def scale_eps(result: Result) -> None:
    key = result.made.anatomy.eps
    result.config[key] = 1e-3 + result.config[key]


def change_activation(result: Result) -> None:
    result.config[result.made.anatomy.activation] = "relu"


def store_half(result: Result) -> None:
    result.values = {name: v.half() for name, v in result.values.items()}
    result.config["dtype"] = "float16"


def other_source(result: Result) -> None:
    result.lineage["source"]["sha256"] = "0" * 64


def wake_new_layer(result: Result) -> None:
    # Behind a norm whose gain is zero, the map alone wakes nothing.
    result.edit("attn.o.weight", 2, put((0, 0), 1.0))
    if result.has("norm.attn_post.weight", 2):
        result.edit("norm.attn_post.weight", 2, put((0,), 1.0))


def times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda v: v * factor


def zero_row(tensor: torch.Tensor) -> torch.Tensor:
    tensor[1] = 0
    return tensor


def roll(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, 0)


# Mistake -> whether running both models must show it, whatever lineage.json says.
COMMON: dict[str, tuple[Mistake, bool]] = {
    "one attention weight off by 1e-3": (on("attn.o.weight", put((0, 0), 1e-3)), False),
    "one MLP weight off by 1e-3": (on("mlp.down.weight", put((3, 2), 1e-3), 2), False),
    "one gain off by 1e-3": (on_gain(put((5,), 1e-3)), False),
    "one weight off by 1": (on("mlp.down.weight", put((0, 0), 1.0)), True),
    "a row of the vocabulary": (on("embed.weight", put((96, 0), 1e-2), None), False),
    "a bias of zeros": (on("attn.q.bias", times(0.0)), True),
    "a bias dropped from the file": (drop_tensor("attn.k.bias"), True),
    "a tie too many or too few": (flip_tie, True),
    "another head": (replace_head, True),
    "two layers swapped": (swap_layers, True),
    "a layer twice": (repeat_layer, True),
    "the top layer gone": (drop_last_layer, False),
    "a new layer that is not idle": (wake_new_layer, True),
    "all rounded to bfloat16": (round_all, True),
    "one tensor rounded to bfloat16": (
        on("mlp.up.weight", lambda v: v.bfloat16().float()),
        True,
    ),
    "query heads permuted": (permute_heads("attn.q.weight"), True),
    "value heads permuted": (permute_heads("attn.v.weight"), True),
    "a gain scaled by 1 %": (on_gain(times(1.01)), True),
    "queries scaled by 1 %": (on("attn.q.weight", times(1.01)), True),
    "keys negated": (on("attn.k.weight", times(-1.0)), True),
    "a matrix upside down": (on("attn.o.weight", lambda v: v.flip(0)), True),
    "a row of zeros": (on("mlp.up.weight", zero_row), True),
    "the vocabulary shifted": (on("embed.weight", roll, None), True),
    "epsilon": (scale_eps, True),
    "activation": (change_activation, True),
    "NaN": (on("attn.o.weight", put((0, 0), float("nan"))), True),
    "a tensor too many": (add_tensor, False),
    "stored as float16": (store_half, False),
    "another token that ends texts": (keys(eos_token_id=7), False),
    "another source": (other_source, False),
}
ROTARY: dict[str, tuple[Mistake, bool]] = {
    "rotary base by 1 %": (scale_rope(1.01), True),
    "rotary base by 0.001 %": (scale_rope(1.00001), False),
}
WINDOWS: dict[str, tuple[Mistake, bool]] = {
    "kinds of layers shifted": (shift_layer_types, True),
    "a window shorter by one": (shorten_window(1), True),
    "a window longer by one": (shorten_window(-1), True),
    "no window": (
        lambda result: result.config.update(layer_types=["full_attention"] * result.made.layers),
        True,
    ),
}
POSITIONS: dict[str, tuple[Mistake, bool]] = {
    "positions shifted": (on("pos.weight", roll, None), True),
    "the last position": (on("pos.weight", lambda v: torch.cat([v[:-1], v[:1]]), None), True),
}
OWN: dict[str, dict[str, tuple[Mistake, bool]]] = {
    "llama": {
        **ROTARY,
        "rotary scaling": (stretch_rope, True),
        "gate and up exchanged": (exchange("mlp.gate.weight", "mlp.up.weight"), True),
    },
    "gpt2": {
        **POSITIONS,
        "no scale of attention": (keys(scale_attn_weights=False), True),
        "a scale by layer": (keys(scale_attn_by_inverse_layer_idx=True), True),
    },
    "qwen2": {**ROTARY, **WINDOWS},
    "gemma3_text": {
        **ROTARY,
        **WINDOWS,
        "scale of attention": (keys(query_pre_attn_scalar=25), True),
        "logits capped": (keys(final_logit_softcapping=30.0), True),
    },
    "gpt_neox": {
        **ROTARY,
        "residuals one after the other": (keys(use_parallel_residual=False), True),
        "a larger rotary share": (scale_rope(2.0, "partial_rotary_factor"), True),
    },
    "bert": {
        **POSITIONS,
        "the second segment": (on("type.weight", put((1, 0), 1e-2), None), False),
    },
}
CASES = [(family, name) for family in FAMILIES for name in {**COMMON, **OWN[family]}]


@pytest.fixture(scope="module", autouse=True)
def fast_checks() -> Any:
    """Short texts, every source run once, and no trial of training, which has its own tests."""
    models: dict[Path, Any] = {}
    seen: dict[Any, outputs.Behaviour] = {}
    load, observe = modeling.load_stored, outputs.observe

    def load_once(checkpoint: Checkpoint) -> Any:
        if checkpoint.origin.name != "source":
            return load(checkpoint)
        if checkpoint.origin not in models:
            models[checkpoint.origin] = load(checkpoint)
        return models[checkpoint.origin]

    def observe_once(
        model: Any, given: Any, reach: Any, causal: bool, images: Any
    ) -> outputs.Behaviour:
        if model not in models.values():
            return observe(model, given, reach, causal, images)
        if (id(model), reach) not in seen:
            seen[id(model), reach] = observe(model, given, reach, causal, images)
        return seen[id(model), reach]

    alive = {"dead": {"entries": 0, "tensors": []}, "locked": {"units": 0, "tensors": []}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "GREEDY_TOKENS", 4)
        patch.setattr(outputs, "LAST_TOKENS", 4)
        patch.setattr(modeling, "load_stored", load_once)
        patch.setattr(outputs, "observe", observe_once)
        patch.setattr(liveness, "check_liveness", lambda *given, **named: alive)
        yield


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    made: dict[str, tuple[Path, Path]] = {}

    def grow(family: str) -> tuple[Path, Path]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny(family, layers=2, **FAMILIES[family])[1].save_pretrained(folder / "source")
            Growth(ffn=56, layers=3)(Checkpoint.open(folder / "source")).save(folder / "out")
            made[family] = (folder / "source", folder / "out")
        return made[family]

    return grow


@pytest.mark.parametrize(("family", "name"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_a_wrong_result_is_caught(
    family: str, name: str, grown: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, out = grown(family)
    result = Result.read(out)
    mistake, seen = {**COMMON, **OWN[family]}[name]
    mistake(result)
    try:
        receipts = check(source, result.write(tmp_path / "wrong"))
    except RegraftError:
        return
    assert not receipts["holds"] and receipts["failed"]
    assert not seen or FUNCTION & set(receipts["failed"]), receipts


def test_there_are_thirty_mistakes_in_every_family() -> None:
    assert all(len({**COMMON, **OWN[family]}) >= 30 for family in FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_right_result_holds(
    family: str, grown: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    """Written as the wrong ones are."""
    source, out = grown(family)
    receipts = check(source, Result.read(out).write(tmp_path / "same"))
    assert receipts["holds"] and receipts["unequal"] == receipts["config_differs"] == []
    assert receipts["reference"] == "stock" and receipts["reach_limited"] is None
    wanted = {"gpt2": 64, "bert": 41, "qwen2": 112, "gemma3_text": 112}
    assert receipts["reached_tokens"] == wanted.get(family, 96)
    causal = ["logits", "hidden states", "greedy text", "cache"]
    assert receipts["compared"] == (causal[:2] if family == "bert" else causal)


# Together they have every exact operator, of the stream too.
PAIRS = [
    ("hidden=pad,ffn=zero_in,heads=split", "identity"),
    ("hidden=tile,ffn=pair,heads=pad", "llama_pro"),
    ("hidden=lemon,ffn=duplicate,heads=zero_in", "identity"),
    ("hidden=duplicate,ffn=tile,heads=lemon", "llama_pro"),
]


def test_every_exact_operator_is_among_them() -> None:
    named = {item.partition("=")[2] for how, _ in PAIRS for item in how.split(",")}
    assert named == {how for how, operator in WIDTH.items() if operator.preserves != "not"}
    assert {deep for _, deep in PAIRS} == set(depth.EXACT)


@pytest.mark.parametrize(("how", "deep"), PAIRS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_results_of_exact_operators_hold(
    family: str, how: str, deep: str, grown: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    source, _ = grown(family)
    before = Checkpoint.open(source)
    dtype = "bfloat16" if deep == "llama_pro" else None
    growth = Growth(
        hidden=2 * before.sizes["hidden"],
        ffn=2 * before.sizes["ffn"],
        layers=4,
        width_init=how,
        depth_init=deep,
        dtype=dtype,
    )
    growth(before).save(tmp_path / "out")
    receipts = check(source, tmp_path / "out")
    assert receipts["holds"] and receipts["exact"], receipts
    assert receipts["not_replayed"] is None and receipts["hidden_diff"] is not None
