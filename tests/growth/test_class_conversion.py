"""Class bridges: the other family's stock class gives the same logits, and its sizes grow alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import tiny

from regraft import modeling
from regraft.core.checkpoint import Checkpoint, LazyTensor
from regraft.errors import RegraftError
from regraft.growth import class_conversion
from regraft.growth.steps.bridge import Bridge
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen
from regraft.io import files

BOUND = 2e-5
PARALLEL: dict[str, Any] = {"heads": 3, "dim": 16, "use_parallel_residual": True}
SEQUENTIAL = PARALLEL | {"use_parallel_residual": False}
TIED, BARE = {"tie_word_embeddings": True}, {"attention_bias": False}


def turning(share: float, **keys: Any) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": share,
        }
        | keys
    }


CASES: list[tuple[str, dict[str, Any]]] = [
    ("mistral", {}),
    ("mistral", TIED),
    ("mistral", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}}),
    ("mistral", {"rms_norm_eps": 1e-2, "hidden_act": "gelu"}),
    *((to, keys | TIED) for to, keys in (("phi", PARALLEL), ("starcoder2", SEQUENTIAL))),
    *((to, keys | BARE) for to, keys in (("phi", PARALLEL), ("starcoder2", SEQUENTIAL))),
    *(
        (to, keys | turning(1.0) | TIED | BARE)
        for to, keys in (("phi", PARALLEL), ("starcoder2", SEQUENTIAL))
    ),
    *((to, keys | turning(0.25)) for to, keys in (("phi", PARALLEL), ("starcoder2", SEQUENTIAL))),
    *(
        (to, keys | turning(0.35)) for to, keys in (("phi", PARALLEL), ("starcoder2", SEQUENTIAL))
    ),  # 5 of 16, so 6
    *(
        (
            to,
            keys
            | turning(0.5, rope_type="linear", factor=3.0, rope_theta=500.0)
            | {"layer_norm_eps": 1e-2},
        )
        for to, keys in (("phi", PARALLEL), ("starcoder2", SEQUENTIAL))
    ),
    (
        "phi",
        PARALLEL | turning(0.5, rope_type="yarn", factor=2.0, original_max_position_embeddings=16),
    ),
    ("phi", PARALLEL | {"hidden_act": "relu", "hidden_dropout": 0.1, "pad_token_id": 96}),
    ("starcoder2", SEQUENTIAL | turning(1.0, rope_type="dynamic", factor=2.0)),
]
FAMILY = {"mistral": "llama", "phi": "gpt_neox", "starcoder2": "gpt_neox"}
STEPS: list[Any] = [
    Widen(ffn=61),
    Widen(hidden=61, fold="stream"),
    Widen(hidden=61),
    Widen(heads=5),
    Deepen(5),
]
GROWN: list[tuple[str, dict[str, Any], Any]] = [
    *(
        ("mistral", {"hidden": 48, "heads": 3, "kv": 3, "dim": 16}, step)
        for step in (*STEPS, Widen(head_dim=22))
    ),
    *(("phi", PARALLEL, step) for step in (*STEPS, Widen(head_dim=23), Widen(head_dim=32))),
    *(("phi", PARALLEL | turning(1.0) | TIED, step) for step in (*STEPS, Widen(head_dim=23))),
    *(
        ("starcoder2", SEQUENTIAL, step)
        for step in (*STEPS, Widen(head_dim=22), Widen(head_dim=32))
    ),
    *(("starcoder2", SEQUENTIAL | turning(0.35), Widen(head_dim=dim)) for dim in (22, 32)),
    *(
        ("starcoder2", SEQUENTIAL | turning(1.0) | TIED, step)
        for step in (*STEPS, Widen(head_dim=22))
    ),
]


def name(value: Any) -> str:
    """A short test id."""
    if isinstance(value, dict):
        return ",".join(value)
    return (
        value
        if isinstance(value, str)
        else ",".join(f"{key}={item}" for key, item in vars(value).items() if item)
    )


def ids(rows: int = 2, length: int = 24) -> torch.Tensor:
    """Any token, special ones too."""
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def crossed(
    folder: Path, to: str, keys: dict[str, Any], *steps: Any, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, Checkpoint]:
    """(source model, the bridged and grown model as its stock class reads it, its checkpoint)."""
    model = tiny(FAMILY[to], **keys)[1].to(dtype)
    model.save_pretrained(folder / "source")
    made = Bridge()(Checkpoint.open(folder / "source"))
    for step in steps:
        made = step(made)
    made.save(folder / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder / "out", dtype=dtype).eval()
    assert type(stock).__name__ == made.config["architectures"][0] and stock.config.model_type == to
    return model, stock, made


@torch.no_grad()
def difference(model: Any, stock: Any) -> float:
    """max |logit difference| / max |logit|."""
    before, after = model(ids()).logits, stock(ids()).logits
    return float((before - after).abs().max() / before.abs().max())


@torch.no_grad()
def cached_difference(model: Any, stock: Any) -> float:
    """The same with the stock model reading a prefix, then token by token."""
    before, cache = model(ids()).logits, None
    pieces = []
    for piece in (ids()[:, :9], *ids()[:, 9:].split(1, 1)):
        out = stock(piece, **modeling.cache_kwargs(cache), use_cache=True)
        pieces.append(out.logits)
        cache = modeling.cache_of(out)
    return float((before - torch.cat(pieces, 1)).abs().max() / before.abs().max())


def continued(model: Any) -> list[list[int]]:
    """What greedy generation makes of three prompts."""
    made = model.generate(ids(3, 7), max_new_tokens=24, min_new_tokens=24, do_sample=False)
    return made.tolist()


@pytest.mark.parametrize(("to", "keys"), CASES, ids=name)
def test_a_bridge_keeps_the_function(to: str, keys: dict[str, Any], tmp_path: Path) -> None:
    model, stock, made = crossed(tmp_path, to, keys)
    assert difference(model, stock) <= (0.0 if to == "mistral" else BOUND)
    assert cached_difference(model, stock) < BOUND
    assert continued(model) == continued(stock)
    assert made.sizes == Checkpoint.open(tmp_path / "source").sizes
    assert (
        getattr(stock.config, "sliding_window", None) is None
    )  # every position sees all before it


@pytest.mark.parametrize(("to", "keys"), CASES, ids=name)
def test_in_float64_only_the_rounding_of_float32_tables_is_left(
    to: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    model, stock, _ = crossed(tmp_path, to, keys, dtype=torch.float64)
    theta = isinstance(keys.get("rope_parameters"), dict) and to != "mistral"
    assert difference(model, stock) < (1e-6 if theta else 1e-13)


@pytest.mark.parametrize(("to", "keys", "step"), GROWN, ids=name)
def test_each_size_grows_alone_behind_a_bridge(
    to: str, keys: dict[str, Any], step: Any, tmp_path: Path
) -> None:
    model, stock, _ = crossed(tmp_path, to, keys, step)
    assert difference(model, stock) < BOUND
    assert cached_difference(model, stock) < BOUND


@pytest.mark.parametrize(("to", "keys", "step"), GROWN, ids=name)
def test_growth_behind_a_bridge_in_float64(
    to: str, keys: dict[str, Any], step: Any, tmp_path: Path
) -> None:
    model, stock, _ = crossed(tmp_path, to, keys, step, dtype=torch.float64)
    assert difference(model, stock) < 1e-5


@pytest.mark.parametrize("to", ["mistral", "phi", "starcoder2"])
def test_growths_compose_behind_a_bridge(to: str, tmp_path: Path) -> None:
    keys = {
        "mistral": {"hidden": 48, "heads": 3, "kv": 3, "dim": 16},
        "phi": PARALLEL,
        "starcoder2": SEQUENTIAL,
    }[to]
    steps = [
        Widen(hidden=61),
        Widen(heads=4, head_dim=22),
        Deepen(4),
        Widen(ffn=70, how="split"),
        Widen(head_dim=44),
    ]
    model, stock, made = crossed(tmp_path, to, keys, *steps)
    assert (made.sizes["hidden"], made.sizes["kv"], made.sizes["dim"], made.sizes["depth"]) == (
        61,
        4,
        44,
        4,
    )
    assert difference(model, stock) < BOUND


@pytest.mark.parametrize(
    ("to", "keys", "step"),
    [
        ("mistral", {"hidden": 48, "heads": 3, "kv": 3, "dim": 16}, Widen(hidden=61)),
        ("phi", PARALLEL, Widen(heads=5)),
        ("phi", PARALLEL, Widen(head_dim=23)),
        ("phi", PARALLEL, Widen(hidden=61)),
        ("starcoder2", SEQUENTIAL, Widen(heads=5)),
    ],
    ids=name,
)
def test_the_source_offers_its_bridge_by_name(
    to: str, keys: dict[str, Any], step: Any, tmp_path: Path
) -> None:
    tiny(FAMILY[to], **keys)[1].save_pretrained(tmp_path)
    with pytest.raises(RegraftError, match=f"--bridge to write it as {to}"):
        step(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(("to", "keys"), CASES, ids=name)
def test_every_source_tensor_is_accounted_for(
    to: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    tiny(FAMILY[to], **keys)[1].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    made = Bridge()(source)
    used = {name for lazy in made.tensors.values() for name in lazy.provenance.sources}
    assert used | set(made.dropped) == set(source.names.values()) | set(source.dropped)
    for lazy in made.tensors.values():
        value = lazy.read()
        assert (tuple(value.shape), value.dtype) == (lazy.shape, lazy.dtype)
        assert lazy.provenance.kind in ("zero", "fresh") or lazy.provenance.sources
        assert lazy.provenance.kind != "zero" or not value.any()


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    tiny("gpt_neox", **PARALLEL)[1].save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    asked: list[Any] = []

    def watched(key: Any, lazy: LazyTensor) -> LazyTensor:
        return replace(lazy, read=lambda: asked.append(key) or lazy.read())

    made = Bridge()(
        replace(source, tensors={key: watched(key, lazy) for key, lazy in source.tensors.items()})
    )
    assert not asked
    made.tensors["attn.q.weight", 1].read()
    assert set(asked) == {("attn.qkv.weight", 1), ("norm.attn.weight", 1)}


@pytest.mark.parametrize("keys", [PARALLEL, SEQUENTIAL], ids=["parallel", "sequential"])
def test_keys_that_a_config_leaves_out_mean_what_its_class_takes(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    """GPT-NeoX' defaults are not those of Phi and StarCoder2: activation, positions, epsilon,
    tying, special tokens.
    """
    to = "phi" if keys["use_parallel_residual"] else "starcoder2"
    model, _, _ = crossed(tmp_path, to, keys)
    full = files.read_json(tmp_path / "source" / "config.json")
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    short = {key: full[key] for key in (*needed, "num_attention_heads", "use_parallel_residual")}
    files.write_json(tmp_path / "source" / "config.json", short)
    made = Bridge()(Checkpoint.open(tmp_path / "source"))
    made.save(tmp_path / "short")
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "short", dtype=torch.float32
    ).eval()
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", dtype=torch.float32
    ).eval()
    assert difference(model, again) == 0.0 and difference(model, stock) < BOUND
    for key in (
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "max_position_embeddings",
        "initializer_range",
    ):
        assert getattr(stock.config, key) == getattr(again.config, key), key


@pytest.mark.parametrize("keys", [PARALLEL, SEQUENTIAL], ids=["parallel", "sequential"])
@pytest.mark.parametrize(
    "scaling", [None, {"type": "linear", "factor": 2.0}], ids=["plain", "linear"]
)
def test_older_rotary_keys_are_understood(
    keys: dict[str, Any], scaling: Any, tmp_path: Path
) -> None:
    to = "phi" if keys["use_parallel_residual"] else "starcoder2"
    crossed(tmp_path, to, keys)
    config = files.read_json(tmp_path / "source" / "config.json")
    del config["rope_parameters"]
    config |= {"rotary_emb_base": 300, "rotary_pct": 0.5, "rope_scaling": scaling}
    files.write_json(tmp_path / "source" / "config.json", config)
    grow = Widen(head_dim=22)
    grow(Bridge()(Checkpoint.open(tmp_path / "source"))).save(tmp_path / "grown")
    Widen(head_dim=30)(Checkpoint.open(tmp_path / "grown")).save(tmp_path / "again")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "source", dtype=torch.float32
    ).eval()
    assert model.config.rope_parameters["partial_rotary_factor"] == 0.5
    for folder in ("grown", "again"):
        stock = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / folder, dtype=torch.float32
        ).eval()
        assert difference(model, stock) < BOUND


def test_norms_are_folded_in_float32_and_stored_as_the_source_is(tmp_path: Path) -> None:
    tiny("gpt_neox", **PARALLEL)[1].to(torch.bfloat16).save_pretrained(tmp_path)
    source = Checkpoint.open(tmp_path)
    made = Bridge()(source)
    assert {lazy.read().dtype for lazy in made.tensors.values()} == {torch.bfloat16}
    weight, bias, gain, shift = (
        source[role, 1].read().float()
        for role in ("mlp.up.weight", "mlp.up.bias", "norm.mlp.weight", "norm.mlp.bias")
    )
    assert torch.equal(made["mlp.up.weight", 1].read(), (weight * gain).bfloat16())
    assert torch.equal(made["mlp.up.bias", 1].read(), (weight @ shift + bias).bfloat16())


def test_the_history_names_the_family_and_survives_the_files(tmp_path: Path) -> None:
    crossed(tmp_path, "phi", PARALLEL)
    made = Checkpoint.open(tmp_path / "out")
    assert made.history == ({"step": "Bridge", "arguments": {"to": "phi"}},)
    assert made.tensors["attn.q.weight", 0].provenance.sources == (
        "gpt_neox.layers.0.attention.query_key_value.weight",
        "gpt_neox.layers.0.input_layernorm.weight",
    )


@pytest.mark.parametrize(
    ("family", "keys", "to", "message"),
    [
        ("llama", {"attention_bias": True}, None, "this llama has no bridge: widen it as it is"),
        ("llama", {"mlp_bias": True}, "mistral", "no attention_bias and no mlp_bias"),
        ("llama", {}, "phi", "this llama has no bridge to phi: use --bridge mistral"),
        ("gpt_neox", PARALLEL, "starcoder2", "no bridge to starcoder2: use --bridge phi"),
        ("gpt2", {}, None, "this gpt2 has no bridge"),
        ("qwen2", {}, "llama", "gpt_neox to phi (use_parallel_residual true)"),
        (
            "gpt_neox",
            PARALLEL | {"pad_token_id": 200},
            None,
            "pad_token_id below vocab_size 97, got 200",
        ),
        (
            "gpt_neox",
            SEQUENTIAL
            | turning(0.25, rope_type="yarn", factor=2.0, original_max_position_embeddings=16),
            None,
            "rotary type 'yarn' over 4 of 16 coordinates",
        ),
        (
            "gpt_neox",
            PARALLEL | turning(0.35, rope_type="dynamic", factor=2.0),
            None,
            "rotary type 'dynamic' over 5 of 16 coordinates, an odd number,",
        ),
        ("gpt_neox", SEQUENTIAL | {"dim": 15}, None, "head_dim 15 is odd"),
        (
            "gpt_neox",
            SEQUENTIAL | turning(0.125, rope_theta=1e6),
            None,
            "1e+06 ** 8, beyond float32",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_has_no_bridge_is_refused(
    family: str, keys: dict[str, Any], to: str | None, message: str, tmp_path: Path
) -> None:
    tiny(family, **keys)[1].save_pretrained(tmp_path)
    with pytest.raises(RegraftError) as caught:
        Bridge(to)(Checkpoint.open(tmp_path))
    assert message in str(caught.value), str(caught.value)


def test_a_bridge_that_forgets_a_tensor_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("gpt_neox", **PARALLEL)[1].save_pretrained(tmp_path)
    crossing = class_conversion.CONVERSIONS["gpt_neox", "phi"]
    folds = {base: norm for base, norm in crossing.folds.items() if base != "mlp.up"}
    monkeypatch.setitem(
        class_conversion.CONVERSIONS, ("gpt_neox", "phi"), replace(crossing, folds=folds)
    )
    with pytest.raises(RegraftError, match="post_attention_layernorm.bias' has no place in phi"):
        Bridge()(Checkpoint.open(tmp_path))
