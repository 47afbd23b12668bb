"""Tensors are taken under the names under which transformers takes them: grown or refused in a
line, and grown into what transformers computes from the source.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.cli import as_json, refused
from helpers.tiny import (
    ARCHITECTURES,
    CONFIGS,
    inputs,
    max_relative_difference,
    outputs,
    save_model,
    tiny,
)
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import regraft
from regraft import modeling
from regraft.checks.growth import EXACT
from regraft.core.checkpoint import Checkpoint
from regraft.core.model_tensors import UNTIED
from regraft.errors import RegraftError
from regraft.growth.sizes_to_steps import Growth
from regraft.io import safetensors
from regraft.mixers.remix import Remix

Tensors = dict[str, torch.Tensor]
DECODERS = [family for family in CONFIGS if family not in ARCHITECTURES]
TIED = [family for family in CONFIGS if family not in ("vit", "dinov2")]
# Heads that files hold under other names than lm_head.weight.
HEADS = {
    "gpt_neox": "embed_out.weight",
    "bert": "cls.predictions.decoder.weight",
    "roberta": "lm_head.decoder.weight",
}
BUFFERS = {
    "gpt2": ("h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
    "gpt_neox": ("gpt_neox.layers.0.attention.masked_bias",),
    "bert": ("bert.embeddings.position_ids", "embeddings.token_type_ids"),
    "roberta": ("roberta.embeddings.position_ids",),
}
ROTARY = ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def edit(folder: Path, change: Callable[[Tensors], Tensors], **keys: Any) -> Path:
    """Other tensors and config keys in a directory."""
    file, config = folder / "model.safetensors", folder / "config.json"
    values = {name: value.clone().contiguous() for name, value in change(load_file(file)).items()}
    save_file(values, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))
    return folder


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """A change that replaces a pattern in all names."""
    return lambda values: {re.sub(old, new, name): value for name, value in values.items()}


def load_stock(folder: Path) -> tuple[PreTrainedModel, set[str]]:
    """(the model as `from_pretrained` reads it, keys that it misses)."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    options = {"dtype": torch.float32, "output_loading_info": True}
    model, info = kind.from_pretrained(folder, **options)
    return model.eval(), set(info["missing_keys"])


def stock_difference(source: Path, out: Path) -> float:
    """The largest relative difference of any output, both models as transformers reads them; what
    it reads without missing keys is written so.
    """
    (before, lost), (after, missing) = load_stock(source), load_stock(out)
    assert not lost and not missing
    given = inputs(before.config)
    left, right = outputs(before, given), outputs(after, given)
    assert left and set(left) <= set(right)
    return max(max_relative_difference(left[name], right[name]) for name in left)


def expect_grown(folder: Path) -> Checkpoint:
    """What is opened grows into a model of the same outputs."""
    opened = Checkpoint.open(folder)
    out = folder.with_name("grown")
    Growth(ffn=opened.sizes["ffn"] + opened.sizes["hidden"], layers=3)(opened).save(out)
    assert stock_difference(folder, out) < EXACT
    return opened


def input_name(model: PreTrainedModel) -> str:
    """The name of the token embedding."""
    table = model.get_input_embeddings().weight
    return next(name for name, value in model.named_parameters() if value is table)


CASES = [(family, "no prefix") for family in CONFIGS]
CASES += [(family, case) for family in TIED for case in ("head only", "different")]
CASES += [(family, case) for family in ("llama", *BUFFERS) for case in ("equal", "buffers")]
CASES += [(family, "legacy") for family in ("bert", "roberta")]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_what_transformers_reads_is_grown(family: str, case: str, tmp_path: Path) -> None:
    tie = {"tie_word_embeddings": True} if family in TIED else {}
    _, model = tiny(family, layers=2, **tie)
    model.save_pretrained(tmp_path / "source")
    head = HEADS.get(family, "lm_head.weight")
    embed = input_name(model) if family in TIED else ""
    extra = {name: torch.ones(3) for name in BUFFERS.get(family, ROTARY)}
    changes: dict[str, Callable[[Tensors], Tensors]] = {
        "no prefix": renamed(rf"^{model.base_model_prefix}\.", ""),
        "head only": renamed(f"^{re.escape(embed)}$", head),
        "equal": lambda values: values | {head: values[embed]},
        "different": lambda values: values | {head: values[embed].flip(0)},
        "buffers": lambda values: values | extra,
        "legacy": lambda values: renamed("LayerNorm.bias", "LayerNorm.beta")(
            renamed("LayerNorm.weight", "LayerNorm.gamma")(values)
        ),
    }
    names = set(load_file(tmp_path / "source" / "model.safetensors"))
    opened = expect_grown(edit(tmp_path / "source", changes[case]))
    expected = {"buffers": set(extra), "equal": {head}}
    assert set(opened.dropped) == expected.get(case, set())

    # The names are those that the class itself writes, of a head of its own too.
    written = set(load_file(tmp_path / "grown" / "model.safetensors"))
    layer = re.compile(r"\.[2-9]\.(?!experts)")
    assert names <= written and all(layer.search(name) for name in written - names - untied(head))
    assert (head in written) == (case == "different")
    tied = json.loads((tmp_path / "grown" / "config.json").read_text()).get("tie_word_embeddings")
    assert case != "different" or tied is False


def untied(head: str) -> set[str]:
    """Tensors that only a model with a head of its own has."""
    return {head, head.replace("weight", "bias")}


OTHERS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
CLASSES = [
    (family, name)
    for family in DECODERS
    for name in (f"{CONFIGS[family].removesuffix('Config')}{ending}" for ending in OTHERS)
    if hasattr(transformers, name)
    and (name.endswith("Model") or family in ("llama", "gpt2", "gpt_neox"))
]


@pytest.mark.parametrize(("family", "name"), CLASSES)
def test_decoders_of_other_classes(family: str, name: str, tmp_path: Path) -> None:
    """Base models and classifiers, also under the names of the other."""
    _, causal = tiny(family, layers=2)
    model = getattr(transformers, name)(copy.deepcopy(causal.config))
    model.save_pretrained(tmp_path / "source")
    base = model.base_model_prefix
    opened = Checkpoint.open(tmp_path / "source")
    assert not opened.dropped and not opened.anatomy.continues_text(opened.config)
    other = renamed("^", f"{base}.") if name.endswith("Model") else renamed(rf"^{base}\.", "")
    expect_grown(edit(tmp_path / "source", other))


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_receipts_without_a_language_model_s_head(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Growth is proved, and what needs text is refused by the class's name."""
    _, causal = tiny("llama", layers=2)
    source, out = tmp_path / "source", tmp_path / "out"
    getattr(transformers, name)(copy.deepcopy(causal.config)).save_pretrained(source)
    as_json(capsys, "grow", source, out, "--hidden", "72", "--layers", "3")
    assert as_json(capsys, "check", source, out)["holds"]
    for words in (("linearize", source, tmp_path / "linear"), ("generate", source, "hello")):
        assert f"is a {name}" in refused(capsys, *words)
    assert f"no bridge for {name}" in refused(
        capsys, "grow", source, tmp_path / "bridge", "--hidden", "40", "--bridge"
    )


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    tiny("llama", layers=2)[1].save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_a_head_that_differs_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Merged adapters: the config says tied, the head was trained. It was dropped once."""
    source = save_model(tmp_path / "source")
    table = "model.embed_tokens.weight"
    edit(
        source,
        lambda values: values | {"lm_head.weight": 2 * values[table]},
        tie_word_embeddings=True,
    )
    out = tmp_path / "out"
    assert UNTIED in as_json(capsys, "plan", source, "--ffn", "60")["notes"]
    as_json(capsys, "grow", source, out, "--ffn", "60")
    assert UNTIED in json.loads((out / "lineage.json").read_text())["steps"][0]["notes"]
    assert as_json(capsys, "check", source, out)["holds"]
    assert stock_difference(source, out) < EXACT


def test_equal_values_are_compared_in_blocks(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every difference is seen, whatever the blocks, and dtypes do not matter."""
    monkeypatch.setattr(safetensors, "COMPARED", 36 * 5)
    table = "model.embed_tokens.weight"
    for row in (0, 4, 5, 96):
        edit(llama, lambda values, row=row: values | {
            "a": values[table].bfloat16(),
            "b": values[table].bfloat16().float(),
            "c": values[table].bfloat16().float().index_fill(0, torch.tensor([row]), 7.0),
        })  # fmt: skip
        entries = safetensors.read_entries(llama)
        assert safetensors.have_equal_values(entries["a"], entries["b"])
        assert not safetensors.have_equal_values(entries["a"], entries["c"])
        assert not safetensors.have_equal_values(entries["a"], entries["model.norm.weight"])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_head_of_a_linearized_host(family: str, tmp_path: Path) -> None:
    """Under its host's own names, tied or, where it differs, not."""
    tiny(family, layers=2, tie_word_embeddings=True)[1].save_pretrained(tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    Remix(keep="0", window=8)(source).save(tmp_path / "out")
    (tmp_path / "out" / "lineage.json").unlink()
    embed, head = source.names["embed.weight", None], HEADS.get(family, "lm_head.weight")
    edit(tmp_path / "out", renamed(f"^{embed}$", head))
    stored = Checkpoint.open(tmp_path / "out")
    assert "head.weight" not in {role for role, _ in stored.tensors}
    assert torch.equal(
        stored.tensors["embed.weight", None].read(), source.tensors["embed.weight", None].read()
    )

    edit(
        tmp_path / "out",
        lambda values: values | {embed: values[head].flip(0)},
    )
    untied = Checkpoint.open(tmp_path / "out")
    assert untied.config["tie_word_embeddings"] is False
    ids = torch.arange(20)[None]
    with torch.no_grad():
        logits = modeling.materialize(untied)(ids).logits
        reference = modeling.materialize(stored)(ids).logits
    assert logits.shape == reference.shape and not torch.allclose(logits, reference, atol=1e-2)


def test_what_transformers_would_make_up_is_refused(tmp_path: Path) -> None:
    """An untied model without a head, a pooler that is not there, a head of another class."""
    tiny("llama")[1].save_pretrained(tmp_path / "llama")
    edit(tmp_path / "llama", without("lm_head"))
    with pytest.raises(RegraftError, match=r'lacks tensor .lm_head.weight.*"tie_word_embeddings"'):
        Checkpoint.open(tmp_path / "llama")
    for name in ("BertModel", "BertForSequenceClassification"):
        tiny("bert", architecture=name)[1].save_pretrained(tmp_path / name)
        edit(tmp_path / name, without("pooler"))
        with pytest.raises(RegraftError, match="lacks tensor .*pooler.*with random numbers"):
            Checkpoint.open(tmp_path / name)
        assert load_stock(tmp_path / name)[1]


def without(part: str) -> Callable[[Tensors], Tensors]:
    """A change that takes out the tensors with a word in their names."""
    return lambda values: {name: value for name, value in values.items() if part not in name}


def test_heads_of_other_classes_are_dropped_by_name(llama: Path) -> None:
    """transformers ignores them; a bias that the class has no place for stays an error."""
    edit(llama, lambda values: values | {"score.weight": torch.ones(2, 36)})
    assert Checkpoint.open(llama).dropped == {"score.weight": "LlamaForCausalLM does not use it"}
    edit(llama, lambda values: values, architectures=["LlamaModel"])
    assert set(Checkpoint.open(llama).dropped) == {"score.weight", "lm_head.weight"}
    expect_grown(llama)
    query = "model.layers.0.self_attn.q_proj.bias"
    edit(llama, lambda values: values | {query: torch.ones(72)})
    with pytest.raises(RegraftError, match=f"no part for parameter '{query}'"):
        Checkpoint.open(llama)


def test_one_tensor_under_two_names(llama: Path) -> None:
    edit(llama, lambda values: values | {"norm.weight": values["model.norm.weight"]})
    with pytest.raises(RegraftError, match="holds 'model.norm.weight' under two names"):
        Checkpoint.open(llama)


def test_names_that_fit_need_no_transformers(llama: Path) -> None:
    """Opening stays quick."""
    code = (
        "import sys; from regraft.core.checkpoint import Checkpoint; Checkpoint.open(sys.argv[1]);"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(llama)], check=True)


WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "peft",
}


@pytest.mark.parametrize("mark", WRAPPERS)
@pytest.mark.parametrize("sharded", [False, True])
def test_wrappers_are_named_and_the_command_strips_them(
    mark: str, sharded: bool, tmp_path: Path
) -> None:
    _, model = tiny("llama", layers=2)
    size = {"max_shard_size": "60KB"} if sharded else {}
    model.save_pretrained(tmp_path, **size)
    anywhere = mark == "_fsdp_wrapped_module."
    old, new = (r"(self_attn\.)", rf"{mark}\1") if anywhere else ("^", mark)
    for file in tmp_path.glob("*.safetensors"):
        save_file(renamed(old, new)(load_file(file)), file, {"format": "pt"})
    for file in tmp_path.glob("*.index.json"):
        index = json.loads(file.read_text())
        index["weight_map"] = {re.sub(old, new, k): v for k, v in index["weight_map"].items()}
        file.write_text(json.dumps(index))

    with pytest.raises(RegraftError, match=f"{re.escape(mark)}', which {WRAPPERS[mark]}") as caught:
        Checkpoint.open(tmp_path)
    assert "\n" not in str(caught.value)
    if mark in ("module.", "_fsdp_wrapped_module."):
        code = re.search('python -c "(.*)"', str(caught.value))
        assert code
        exec(code[1], {})
        assert not Checkpoint.open(tmp_path).dropped


Q = "model.layers.0.self_attn.q_proj"
INT32, INT8, UINT8 = (
    torch.zeros(72, 36, dtype=dtype) for dtype in (torch.int32, torch.int8, torch.uint8)
)  # noqa: E501
FP8 = torch.zeros(72, 36).to(torch.float8_e4m3fn)
QUANTISED = {
    "GPTQ or AWQ": {f"{Q}.qweight": INT32, f"{Q}.qzeros": INT32, f"{Q}.scales": torch.ones(1, 72)},
    "bitsandbytes in 4 bits": {f"{Q}.weight": UINT8, f"{Q}.weight.absmax": torch.ones(3)},
    "bitsandbytes in 8 bits": {f"{Q}.weight": INT8, f"{Q}.SCB": torch.ones(72)},
    "fp8 in blocks": {f"{Q}.weight": FP8, f"{Q}.weight_scale_inv": torch.ones(1, 1)},
    "compressed-tensors": {f"{Q}.weight": INT8, f"{Q}.weight_scale": torch.ones(1)},
    "is F8_E4M3": {f"{Q}.weight": FP8},
    "is U8, not floating point": {f"{Q}.weight": UINT8[:8]},
}


@pytest.mark.parametrize("scheme", QUANTISED)
def test_quantised_files_without_the_key(scheme: str, llama: Path) -> None:
    edit(llama, lambda values: without(f"{Q}.weight")(values) | QUANTISED[scheme])
    with pytest.raises(RegraftError, match=scheme) as caught:
        Checkpoint.open(llama)
    assert "\n" not in str(caught.value)


def rename_weights(name: str) -> Callable[[Path], None]:
    """A change that gives the file of weights another name."""

    def rename(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(folder / name)

    return rename


def add_index(folder: Path) -> None:
    """A second set of weights."""
    (folder / "model-1.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {
        "weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "model-1.safetensors")
    }  # noqa: E501
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FOREIGN: dict[str, Callable[[Path], object]] = {
    "adapter.*give the model that it was trained on, and --adapter": lambda folder: (
        folder / "adapter_config.json"
    ).write_text("{}"),
    "lora_A.*--adapter": lambda folder: edit(
        folder, lambda values: values | {LORA: torch.ones(2, 36)}
    ),
    "two sets of weights": add_index,
    "in Mistral's own format": rename_weights("consolidated.safetensors"),
    "is TensorFlow's": rename_weights("tf_model.h5"),
    "is Flax's": rename_weights("flax_model.msgpack"),
    "is ONNX's": rename_weights("onnx/model.onnx"),
    "a shard without its index": rename_weights("model-00001-of-00002.safetensors"),
    "without its adapter_config.json": rename_weights("adapter_model.safetensors"),
    "bin' is a pickle": rename_weights("pytorch_model.bin"),
    "pt' is a pickle": rename_weights("model.pt"),
    "only variants.*--variant fp16": rename_weights("model.fp16.safetensors"),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_foreign_folders_are_named(message: str, llama: Path) -> None:
    FOREIGN[message](llama)
    with pytest.raises(RegraftError, match=message) as caught:
        Checkpoint.open(llama)
    assert "\n" not in str(caught.value)


def test_folders_without_a_config(tmp_path: Path) -> None:
    """What Mistral publishes beside the Hugging Face files, alone; an adapter without its model."""
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    with pytest.raises(RegraftError, match="in Mistral's own format.*fetch the Hugging Face files"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(RegraftError, match="is an adapter .*not a whole model"):
        Checkpoint.open(tmp_path)


def test_weights_beside_others_are_taken(llama: Path) -> None:
    """Those that transformers takes: Mistral's own and pickles may lie there too."""
    for name in ("consolidated.safetensors", "pytorch_model.bin", "model.fp16.safetensors"):
        (llama / name).write_bytes(b"")
    expect_grown(llama)


@pytest.mark.parametrize("size", ["60KB", "5GB"])
def test_variants(size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other weights in the directory, one file or several, by flag and by path."""
    source, out = save_model(tmp_path / "source"), tmp_path / "out"
    _, model = tiny("llama", layers=4, vocab=259, seed=1)
    model.half().save_pretrained(source, variant="fp16", max_shard_size=size)
    plain = Checkpoint.open(source)
    variant = regraft.open(str(source), variant="fp16")
    assert plain.variant is None and variant.variant == "fp16"
    assert variant.tensors["norm.final.weight", None].dtype == torch.float16

    flag = ("--variant", "fp16")
    as_json(capsys, "plan", source, "--ffn", "60", *flag)
    as_json(capsys, "grow", source, out, "--ffn", "60", *flag)
    assert as_json(capsys, "grow", variant.origin, out, "--ffn", "60")  # is there already
    if size == "60KB":
        assert as_json(capsys, "check", source, out, *flag)["holds"]
    assert "fp16" in json.loads((out / "lineage.json").read_text())["source"]["path"]
    assert "has no variant 'fp32' of its weights (it has fp16)" in refused(
        capsys, "plan", source, "--ffn", "60", "--variant", "fp32"
    )


def test_tensors_in_the_form_of_memory_are_named(tmp_path: Path) -> None:
    """Experts that transformers was told to save as one tensor."""
    _, model = tiny("mixtral", layers=2)
    model.save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(RegraftError, match="form that transformers keeps in memory"):
        Checkpoint.open(tmp_path)
