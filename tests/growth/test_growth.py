"""The law of growth: a grown model, written and read back by its stock class, gives the source's
logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import ARCHITECTURES, GROWABLE, inputs, max_relative_difference, outputs, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.checks.outputs import GREEDY_TOKENS, compare_models
from regraft.core.anatomy import find_anatomy
from regraft.core.checkpoint import Checkpoint
from regraft.core.part import Part
from regraft.errors import RegraftError
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.widen import Widen
from regraft.mixers.remix import Remix
from regraft.modeling import load
from regraft.plan.plan import Plan

BOUND = 2e-5
COUPLED = ("gpt2", "gpt_neox", "bert", "roberta")
AFTER = ("bert", "roberta")  # norms come after the sum
DECODERS = tuple(family for family in GROWABLE if family not in ARCHITECTURES)
CLASSES = [(family, None) for family in DECODERS]
CLASSES += [(family, name) for family, names in ARCHITECTURES.items() for name in names[:3]]
RMS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "mixtral",
)
EPSILON = {"gpt2": "layer_norm_epsilon", "starcoder2": "norm_epsilon"}
LAW = settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))


def difference(
    family: str, folder: Path, *steps: Any, architecture: str | None = None, **keys: Any
) -> float:
    """Worst relative difference over all outputs of the grown model, read by its stock class."""
    config, model = tiny(family, architecture=architecture, **keys)
    model.save_pretrained(folder / "source")
    grown = Checkpoint.open(folder / "source")
    for step in steps:
        grown = step(grown)
    grown.save(folder / "out", overwrite=True)
    stock = type(model).from_pretrained(folder / "out", dtype=torch.float32).eval()
    given = inputs(config)
    before, after = outputs(model, given), outputs(stock, given)
    axis = 1 if architecture == "Dinov2Backbone" else -1
    return max(max_relative_difference(before[name], after[name], axis) for name in before)


def expected_refusal(family: str, heads: int, kv: int, how: str) -> str | None:
    """What a refusal must say for 9 query heads over 3 key/value heads at hidden 36; None: it must
    not be refused.

    Groups grow by whole groups or by more queries in each (three or more to a key/value head), or
    every key/value head is split into the three of its group (9 of them). Two classes of rules
    beyond that: some want hidden to be a multiple of the heads; olmo2 norms all heads together, so
    that only whole multiples keep the mean square: not 4 queries to each of 9 split heads, and no
    shared outputs (`split`) of new heads; pairs of new heads take two whole sets each.
    """
    if heads % kv:
        return "evenly: use --heads"
    if heads // kv < 3 and kv != 9:
        return "reach --kv-heads"
    if family in ("llama", "gemma2", "gemma3_text") and 36 % heads:
        return "choose"
    whole = heads % 9 == 0 and kv % 3 == 0 and (kv != 9 or heads <= 27)
    if family == "olmo2" and heads > 9 and (not whole or how == "split"):
        return "use .* times as many"
    if family == "olmo2" and how == "pair" and (kv % 6 == 0 or kv != 9 and heads // kv % 6 == 0):
        return "two whole sets.*heads=pad"
    return None


def widths(family: str) -> st.SearchStrategy[int]:
    """Hidden sizes that a family's tiny model can grow to."""
    if family in AFTER:
        return st.sampled_from([144, 216])
    if family in COUPLED:
        return st.integers(10, 24).map(lambda heads: 8 * heads)
    if family in ("llama", "gemma2", "gemma3_text"):
        return st.integers(5, 12).map(lambda times: 9 * times)
    return (
        st.integers(6, 15).map(lambda times: 8 * times)
        if family == "mixtral"
        else st.integers(37, 120)
    )


@LAW
@given(
    more=st.integers(1, 40), how=st.sampled_from(["pad", "zero_in", "pair", "split", "duplicate"])
)
@pytest.mark.parametrize("family", GROWABLE)
def test_more_neurons(family: str, tmp_path: Path, more: int, how: str) -> None:
    ffn = {"mixtral": 56 + 8 * more, "dinov2": 72 + 36 * more}.get(family, 52 + more)
    assert difference(family, tmp_path, Widen(ffn=ffn, how=how)) < BOUND


@LAW
@given(
    data=st.data(), fold=st.sampled_from(["auto", "stream"]), how=st.sampled_from(["pad", "lemon"])
)
@pytest.mark.parametrize("family", GROWABLE)
@pytest.mark.parametrize("tied", [True, False])
def test_a_wider_stream(
    family: str, tied: bool, tmp_path: Path, data: st.DataObject, fold: str, how: str
) -> None:
    hidden = data.draw(widths(family))
    step = Widen(hidden=hidden, how=how, fold=fold)  # type: ignore[arg-type]
    keys = {} if family in ("vit", "dinov2") else {"tie_word_embeddings": tied}
    if family == "dinov2":
        step = Widen(hidden=hidden, ffn=3 * hidden, how=f"pad,hidden={how}", fold=fold)  # type: ignore[arg-type]
    assert difference(family, tmp_path, step, **keys) < BOUND


@pytest.mark.parametrize(("family", "architecture"), CLASSES)
@pytest.mark.parametrize("how", ["tile", "duplicate"])
def test_a_copied_stream(family: str, architecture: str | None, how: str, tmp_path: Path) -> None:
    if how == "duplicate" and architecture and "For" not in architecture:
        pytest.skip(
            "the hidden width itself comes out, its copies in another order: see test_growing.py"
        )
    hidden = 2 * (72 if family in COUPLED else 40 if family == "mixtral" else 36)
    assert (
        difference(family, tmp_path, Widen(hidden=hidden, how=how), architecture=architecture)
        < BOUND
    )


@pytest.mark.parametrize(("family", "architecture"), [item for item in CLASSES if item[1]])
def test_every_class_of_an_encoder_grows(family: str, architecture: str, tmp_path: Path) -> None:
    hidden = 144 if family in AFTER else 72
    steps = [Widen(hidden=hidden, ffn=144), Deepen(5)]
    assert difference(family, tmp_path, *steps, architecture=architecture) < BOUND


@LAW
@given(
    kv=st.integers(3, 9),
    group=st.integers(1, 5),
    how=st.sampled_from(["pad", "zero_in", "pair", "split"]),
)
@pytest.mark.parametrize("family", [family for family in DECODERS if family not in COUPLED])
def test_more_heads(family: str, tmp_path: Path, kv: int, group: int, how: str) -> None:
    heads = max(kv * group, 9)
    step, refusal = (
        Widen(heads=heads, kv_heads=kv, how=how),
        expected_refusal(family, heads, kv, how),
    )
    if refusal is None:
        assert difference(family, tmp_path, step) < BOUND
        return
    with pytest.raises(RegraftError, match=refusal):
        difference(family, tmp_path, step)


@pytest.mark.parametrize("family", GROWABLE)
def test_twice_the_heads(family: str, tmp_path: Path) -> None:
    more = {"hidden": 144} if family in COUPLED else {}
    assert difference(family, tmp_path, Widen(heads=18, **more), hidden=36) < BOUND


@LAW
@given(dim=st.integers(5, 20).map(lambda half: 2 * half))
@pytest.mark.parametrize("family", [family for family in GROWABLE if family not in COUPLED])
def test_wider_heads_of_every_family(family: str, tmp_path: Path, dim: int) -> None:
    assert difference(family, tmp_path, Widen(head_dim=dim)) < BOUND


@LAW
@given(dim=st.integers(5, 20).map(lambda half: 2 * half))
@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_wider_heads_of_every_rotary_type(family: str, rope: str, tmp_path: Path, dim: int) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 5000.0, "factor": 2.0}
    if rope == "llama3":
        parameters |= {
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    if rope == "yarn":
        parameters |= {"original_max_position_embeddings": 16}
    assert difference(family, tmp_path, Widen(head_dim=dim), rope_parameters=parameters) < BOUND


@pytest.mark.parametrize("family", GROWABLE)
@pytest.mark.parametrize("how", ["identity", "llama_pro"])
@pytest.mark.parametrize("layers", [4, 8])
def test_more_layers_bit_for_bit(family: str, how: str, layers: int, tmp_path: Path) -> None:
    found = difference(family, tmp_path, Deepen(layers, how))
    assert found < BOUND if family in AFTER else found == 0.0


def test_keys_follow_a_softmax_scale_that_depends_on_the_layer(tmp_path: Path) -> None:
    assert (
        difference("gpt2", tmp_path, Deepen(5, "llama_pro"), scale_attn_by_inverse_layer_idx=True)
        < BOUND
    )


@LAW
@given(order=st.permutations([0, 1, 2, 3]), epsilon=st.sampled_from([1e-6, 1e-2]))
@pytest.mark.parametrize("family", GROWABLE)
def test_steps_compose_in_any_order(
    family: str, tmp_path: Path, order: list[int], epsilon: float
) -> None:
    wide = {"llama": 45, "gemma2": 45, "gemma3_text": 45, "dinov2": 72}.get(family, 48)
    wide = 144 if family in AFTER else 96 if family in COUPLED else wide
    first, last = (144, 288) if family == "dinov2" else (64, 136)
    early = order.index(0) < order.index(3)
    heads = (
        Widen(heads=18)
        if family not in (*COUPLED, "llama", "gemma2", "gemma3_text")
        else Widen(ffn=first)
    )
    wider = Widen(hidden=wide, ffn=first) if family == "dinov2" else Widen(hidden=wide)
    steps = [
        heads if family != "dinov2" else Widen(heads=18),
        wider,
        Deepen(5),
        Widen(ffn=last, how="split"),
    ]
    if not early and heads == Widen(ffn=first):
        steps[0] = Widen(ffn=last + 8)
    if family == "dinov2" and order.index(1) > order.index(3):
        steps[1] = Widen(hidden=wide, ffn=last)
    key = EPSILON.get(family, "rms_norm_eps" if family in RMS else "layer_norm_eps")
    bound = (
        5e-3 if family in AFTER and epsilon > 1e-3 else BOUND
    )  # two norms in a row see epsilon twice
    assert difference(family, tmp_path, *[steps[i] for i in order], **{key: epsilon}) < bound


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("llama", Widen(hidden=30), "smaller than the source's 36"),
        ("llama", Widen(hidden=40), "36 or 45, or --bridge to write it as mistral"),
        ("llama", Widen(head_dim=11), "even --head-dim, got 11: use 10 or 12"),
        ("llama", Widen(heads=10, kv_heads=4), "evenly: use --heads 12"),
        ("llama", Widen(hidden=40, how="tile"), "use --hidden 36 or 72"),
        ("llama", Widen(ffn=60, how="stretch"), "unknown operator 'stretch'"),
        ("llama", Widen(ffn=60, how="width=tile"), "names no axis 'width'"),
        ("gpt2", Widen(heads=12), "add --hidden 96"),
        ("gpt2", Widen(hidden=75), "use --hidden 72 or 80"),
        ("gpt_neox", Widen(head_dim=10), "add --hidden 90, or --bridge to write it as phi"),
        ("qwen3", Widen(hidden=45, fold="eps"), "use --fold stream"),
        ("llama", Deepen(2), "less than the source's 3"),
        ("llama", Deepen(7, "upscale"), "at most 6 layers"),
        ("llama", Deepen(7, "gstack"), "use 6 or 9"),
        ("llama", Deepen(4, "sandwich"), "unknown --depth-init 'sandwich'"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_what_can(
    family: str, step: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RegraftError) as caught:
        difference(family, tmp_path, step)
    assert message in str(caught.value), str(caught.value)


def test_dynamic_rotary_positions_forbid_wider_heads(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(RegraftError, match="'dynamic' sets frequencies by the length"):
        difference("llama", tmp_path, Widen(head_dim=12), rope_parameters=rope)


def test_bfloat16_is_stored_as_it_came(tmp_path: Path) -> None:
    _, model = tiny("llama")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    grown = Widen(hidden=45, ffn=60)(Checkpoint.open(tmp_path / "source"))
    assert {lazy.read().dtype for lazy in grown.tensors.values()} == {torch.bfloat16}


def test_noise_separates_copies_and_changes_nothing(tmp_path: Path) -> None:
    assert difference("mistral", tmp_path, Widen(hidden=72, how="tile")) < BOUND
    down = Widen(hidden=72, how="tile")(Checkpoint.open(tmp_path / "source"))[
        "mlp.up.weight", 0
    ].read()
    assert not torch.allclose(down[:, :36], down[:, 36:])
    even = Widen(hidden=72, how="tile", noise=0.0)(Checkpoint.open(tmp_path / "source"))[
        "mlp.up.weight", 0
    ].read()
    assert torch.equal(even[:, :36], even[:, 36:])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("step", ["stream", "tile", "ffn", "layers", "llama_pro"])
def test_a_linearized_model_grows_too(family: str, step: str, tmp_path: Path) -> None:
    _, model = tiny(family)
    model.save_pretrained(tmp_path / "source")
    mixed = Remix(keep="1", window=9)(Checkpoint.open(tmp_path / "source"))
    wide = 96 if family in COUPLED else 45
    steps = {"ffn": Widen(ffn=60), "layers": Deepen(5), "llama_pro": Deepen(7, "llama_pro")}
    if family not in COUPLED:
        steps |= {"stream": Widen(hidden=wide), "tile": Widen(hidden=72, how="tile")}
    if step not in steps:
        with pytest.raises(RegraftError, match="grow heads first, then linearize"):
            Widen(hidden=wide)(mixed)
        return
    mixed.save(tmp_path / "mixed")
    grown = steps[step](Checkpoint.open(tmp_path / "mixed"))
    grown.save(tmp_path / "out")
    given = {"input_ids": torch.arange(24)[None] + 3}
    before, after = (outputs(load(tmp_path / name), given)["logits"] for name in ("mixed", "out"))
    assert max_relative_difference(before, after) < BOUND


def test_wider_normed_heads_that_cannot_learn_are_said(tmp_path: Path) -> None:
    assert difference("qwen3", tmp_path, Widen(head_dim=12)) < BOUND
    source = Checkpoint.open(tmp_path / "source")
    notes = Plan.of(source, Widen(head_dim=12)(source)).notes
    assert len(notes) == 1 and "--head-dim 16 keeps all of them alive" in notes[0]
    assert not Plan.of(source, Widen(head_dim=16)(source)).notes


def test_heads_that_follow_hidden_are_said(tmp_path: Path) -> None:
    assert difference("llama", tmp_path, Widen(hidden=48), hidden=36) < BOUND
    source = Checkpoint.open(tmp_path / "source")
    target = Widen(hidden=48)(source)
    assert target.sizes["kv"] * target.sizes["group"] == 12
    assert Plan.of(source, target).notes == [
        "9 heads became 12: in llama the hidden size must be the number of heads times the size of a head"
    ]


@pytest.mark.parametrize("family", DECODERS)
def test_decoding_through_the_cache_gives_the_same(family: str, tmp_path: Path) -> None:
    hidden = 144 if family in COUPLED else 72
    assert difference(family, tmp_path, Widen(hidden=hidden, ffn=104), Deepen(4)) < BOUND
    source, out = Checkpoint.open(tmp_path / "source"), Checkpoint.open(tmp_path / "out")
    found = compare_models(source, out, seed=0)
    assert found["parallel_vs_recurrent"] < BOUND and found["greedy"] == GREEDY_TOKENS


@pytest.mark.parametrize("family", GROWABLE)
def test_the_algebra_holds_in_double_precision(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the stock code's float32 islands (norms, rotary tables, routers) run in float64 too."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    to = torch.Tensor.to

    def kept(self: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        given = tuple(torch.float64 if item is torch.float32 else item for item in given)
        named = {
            name: torch.float64 if item is torch.float32 else item for name, item in named.items()
        }
        return to(self, *given, **named)

    _, model = tiny(family)
    model.double().save_pretrained(tmp_path / "source")
    hidden = 144 if family in COUPLED else 80 if family == "mixtral" else 72
    ffn = 4 * hidden if family == "dinov2" else 104
    grown = Deepen(5)(Widen(hidden=hidden, ffn=ffn)(Checkpoint.open(tmp_path / "source")))
    grown.save(tmp_path / "out")
    monkeypatch.setattr(torch.Tensor, "to", kept)
    with torch.random.fork_rng(), double_default():
        pair = [
            type(model).from_pretrained(tmp_path / name, dtype=torch.float64).eval()
            for name in ("source", "out")
        ]
        for each in pair if family == "mixtral" else ():
            each.set_experts_implementation("eager")
        given = {
            k: v if v.dtype == torch.long else v.double() for k, v in inputs(model.config).items()
        }
        before, after = (outputs(each, given) for each in pair)
    worst = max(max_relative_difference(before[name], after[name]) for name in before)
    assert worst < (1e-8 if family in AFTER else 1e-10), worst


@contextmanager
def double_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


Table = dict[str, Part]


def changed(*roles: str, **fields: Any) -> Callable[[Table], Table]:
    """A table with some fields of some parts wrong."""
    return lambda parts: parts | {role: replace(parts[role], **fields) for role in roles}


LAYER_NORMS = ("norm.attn.bias", "norm.mlp.bias", "norm.final.bias")
STACKED = "hidden -> kv dim + kv dim + kv dim"
QKV = ("attn.q", "attn.v", "attn.k")
MUTATIONS: dict[str, tuple[str, Callable[[Table], Table]]] = {
    "one-plus of a gain forgotten": ("gemma", changed("norm.attn.weight", signature="gain hidden")),
    "fused order wrong": ("gpt2", changed("attn.qkv.weight", "attn.qkv.bias", fused=QKV)),
    "layer norm taken for RMS": ("gpt2", changed(*LAYER_NORMS, norm=False, writes="own")),
    "axes swapped": ("llama", changed("attn.o.weight", signature="kv dim group -> hidden")),
    "stored the other way round": ("gpt2", changed("attn.o.weight", stored="out in")),
    "gate and up not told apart": (
        "phi3",
        changed("mlp.gate_up.weight", signature="hidden -> ffn", fused=()),
    ),
    "post-norm read as pre-norm": ("gemma2", changed("norm.attn_post.weight", writes="normed")),
    "stream read as normed": ("olmo2", changed("attn.q.weight", reads="normed")),
    "norm before a tied head forgotten": ("llama", changed("norm.final.weight", writes="normed")),
    "interleaved read as stacked": (
        "gpt_neox",
        changed("attn.qkv.weight", signature="hidden -> kv dim + kv dim + kv dim"),
    ),
    "average forgets the layer scale": ("dinov2", changed("mlp.down.weight", scaled=None)),
}
WIDE = {"gpt2": 144, "gpt_neox": 96, "dinov2": 72, "gemma2": 45, "llama": 45}


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_tables_are_caught(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, or visibly another function: no mistake in a table goes unnoticed."""
    family, mutate = MUTATIONS[name]
    anatomy = find_anatomy({"model_type": family})
    keys = {"tie_word_embeddings": True} if family == "llama" else {}
    heads = {"heads": 9, "head_dim": 16} if family == "gpt2" else {}
    ffn = 288 if family == "dinov2" else 60
    first = Widen(hidden=WIDE.get(family, 48), ffn=ffn, fold="stream", **heads)
    more = (
        Widen(ffn=2 * ffn)
        if family in COUPLED or family == "dinov2"
        else Widen(heads=18, kv_heads=6)
    )
    assert difference(family, tmp_path, first, **keys) < BOUND
    module = importlib.import_module(f"regraft.families.{family}")
    monkeypatch.setattr(module, "anatomy", replace(anatomy, parts=mutate(dict(anatomy.parts))))
    try:
        found = difference(family, tmp_path, first, more, **keys)
    except (RegraftError, RuntimeError):
        return
    assert found > 20 * BOUND, found


@pytest.mark.parametrize("step", [Deepen(5), Deepen(5, "llama_pro"), Widen(ffn=104)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_tensor_is_the_same_whenever_it_is_read(family: str, step: Any, tmp_path: Path) -> None:
    tiny(family)[1].save_pretrained(tmp_path)
    for lazy in step(Checkpoint.open(tmp_path)).tensors.values():
        assert torch.equal(lazy.read(), lazy.read())
