"""GGUF files: names, metadata, tokenizer, what is read back, and what is refused. No engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.gguf import VOCAB, byte_level_tokenizer, save_for_gguf, sentencepiece_tokenizer
from helpers.tiny import CHAT, byte_tokenizer, tiny, tokens

from regraft import modeling
from regraft.cli.main import main
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.export import find_target, write
from regraft.export.gguf import engine, quantize, read_back, rotary, vocabulary
from regraft.export.gguf.architecture import find_architecture, list_architectures
from regraft.export.gguf.model import GGUFModel
from regraft.export.gguf.writer import read_tensors
from regraft.growth.sizes_to_steps import cast_checkpoint
from regraft.mixers.remix import Remix

gguf = pytest.importorskip("gguf")


def ready(path: Path, family: str = "llama", **keys: Any) -> GGUFModel:
    checkpoint = Checkpoint.open(save_for_gguf(path, family, **keys))
    return GGUFModel.of(find_target("gguf").convert(checkpoint))


def field(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).fields[key].contents()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> GGUFModel:
    return ready(tmp_path_factory.mktemp("gguf") / "llama", tie_word_embeddings=True)


def test_each_family_has_one_architecture() -> None:
    families = [family for one in list_architectures() for family in one.families]
    assert len(families) == len(set(families))
    assert all(hasattr(gguf.MODEL_ARCH, one.names) for one in list_architectures())


# Sizes that transformers' reader finds in the file too.
ALIKE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"hidden": 72, "tie_word_embeddings": True},
    "phi3": {},
}


@pytest.mark.parametrize("family", ALIKE)
def test_our_own_reader_gives_the_same_model(family: str, tmp_path: Path) -> None:
    model = ready(tmp_path / family, family, **ALIKE[family])
    file = tmp_path / "model.gguf"
    model.write(file, "f32")
    read_back.compare_tensors(file, model.tensors, None)
    assert read_back.is_read_alike(file, model.checkpoint)
    stock = modeling.materialize(model.checkpoint)
    assert read_back.compare_logits(file, stock, tokens(1, 40)) < 1e-5


@torch.no_grad()
def test_a_file_opens_as_the_model_it_was_written_from(
    llama: GGUFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path / "cache"))
    llama.write(tmp_path / "model.gguf", "f32")
    opened = modeling.load(tmp_path / "model.gguf")
    ids = tokens(1, 40)
    expected = modeling.materialize(llama.checkpoint)(ids).logits
    assert torch.allclose(opened(ids).logits, expected, atol=1e-4 * float(expected.abs().max()))


def test_metadata_says_what_the_config_says(llama: GGUFModel, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    llama.write(file, "f32")
    sizes = llama.checkpoint.sizes
    assert field(file, "general.architecture") == "llama"
    assert field(file, "llama.attention.head_count") == sizes["kv"] * sizes["group"]
    assert field(file, "llama.attention.key_length") == sizes["dim"]
    assert field(file, "llama.feed_forward_length") == sizes["ffn"]
    assert len(field(file, "tokenizer.ggml.tokens")) == sizes["vocab"]
    assert field(file, "tokenizer.ggml.pre") == "gpt-2"
    assert field(file, "tokenizer.ggml.eos_token_id") == 2
    assert field(file, "tokenizer.ggml.add_bos_token") is False
    assert field(file, "tokenizer.chat_template") == CHAT
    assert "output.weight" not in read_tensors(file)  # tied


def test_queries_are_in_the_order_of_neighbours(llama: GGUFModel) -> None:
    own = llama.checkpoint["attn.q.weight", 0].read()
    stored = next(one for one in llama.tensors if one.name == "blk.0.attn_q.weight").read()
    dim = llama.checkpoint.sizes["dim"]
    assert torch.equal(stored[0:dim:2], own[: dim // 2])
    assert torch.equal(stored[1:dim:2], own[dim // 2 : dim])


def test_gains_are_stored_whole_and_factors_folded(tmp_path: Path) -> None:
    model = ready(tmp_path / "gemma2", "gemma2")
    by_name = {one.name: one for one in model.tensors}
    gain = model.checkpoint["norm.attn.weight", 0].read()
    assert torch.allclose(by_name["blk.0.attn_norm.weight"].read(), gain + 1)
    query = model.checkpoint["attn.q.weight", 0].read()
    factor = (8 / 24) ** 0.5  # query_pre_attn_scalar is 24 and heads are 8 wide
    assert torch.allclose(by_name["blk.0.attn_q.weight"].read(), query * factor)


def test_a_linearized_model_goes_through_its_stock_class(tmp_path: Path) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "source"))
    made = Remix("sink_window", "1", window=8)(source)
    model = GGUFModel.of(find_target("gguf").convert(made))
    model.write(tmp_path / "model.gguf", "f32")
    assert field(tmp_path / "model.gguf", "granite_swa.attention.sliding_window") == 8
    pattern = field(tmp_path / "model.gguf", "granite_swa.attention.sliding_window_pattern")
    assert pattern == [True, False, True]
    assert read_tensors(tmp_path / "model.gguf")["blk.0.attn_sinks.weight"].shape == (9,)
    assert find_target("gguf").find_misfits(Remix("retnet", "none").build_config(source)) == [
        "layer 0 has the mixer gated (retnet beside a window): linearize with --for granite_swa"
    ]


def test_what_llama_cpp_lacks_goes_through_another_class(tmp_path: Path) -> None:
    assert ready(tmp_path / "a", "mistral").architecture.name == "granite_swa"
    assert ready(tmp_path / "b", "mistral", sliding_window=None).architecture.name == "llama"


def rope(kind: str, **keys: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **keys}}


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, llama.cpp's llama has another"),
    ("llama", rope("dynamic", factor=2.0), "does not scale by the length of a text"),
    ("llama", rope("yarn", factor=2.0, attention_factor=0.7), "attention_factor of rope_param"),
    ("qwen3", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=16), "qwen3 has no such positions"),
    ("qwen3", {"attention_bias": True}, "q_proj.bias', llama.cpp's qwen3 has no such bias"),
    ("gemma", {"tie_word_embeddings": False}, "its head is not the embedding"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is null"),
    ("phi", {"qk_layernorm": True, "hidden": 72}, "qk_layernorm is true"),
    ("olmo2", {}, "its heads are 72 wide together and hidden_size is 36"),
    ("mixtral", {"sliding_window": 8}, "layer 0 sees the last 8 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "keys", "reason"), REFUSED, ids=str)
def test_what_does_not_fit_is_refused(family: str, keys: dict[str, Any], reason: str) -> None:
    config = tiny(family, **keys)[0].to_dict()
    found = find_target("gguf").find_misfits(config)
    assert reason in "; ".join(found) and all("\n" not in line for line in found)


def test_frequency_factors_are_those_of_transformers() -> None:
    keys = rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=16,
    )  # fmt: skip
    factors = rotary.compute_frequency_factors(tiny("llama", **keys)[0])
    assert factors is not None and factors.shape == (4,)
    assert float(factors.min()) >= 1 - 1e-6 and abs(float(factors.max()) - 8) < 1e-4
    assert rotary.compute_frequency_factors(tiny("llama")[0]) is None


def test_quantised_files_are_near(tmp_path: Path) -> None:
    model = ready(tmp_path / "llama", hidden=64, heads=8, kv=4, ffn=96)
    model.write(tmp_path / "q.gguf", "q8_0")
    read_back.compare_tensors(tmp_path / "q.gguf", model.tensors, "Q8_0")
    stored = read_tensors(tmp_path / "q.gguf")
    for one in model.tensors:
        value = one.read()
        assert (stored[one.name] - value).abs().max() <= 0.01 * value.abs().max()
    assert field(tmp_path / "q.gguf", "general.file_type") == 7


def test_the_dtype_of_the_model_stays(tmp_path: Path) -> None:
    source = Checkpoint.open(save_for_gguf(tmp_path / "llama"))
    model = GGUFModel.of(cast_checkpoint(source, "bfloat16"))
    assert model.dtype == "bf16"
    model.write(tmp_path / "b.gguf", "bf16")
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "b.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "BF16" and kinds["blk.0.ffn_norm.weight"] == "F32"
    read_back.compare_tensors(tmp_path / "b.gguf", model.tensors, None)


def test_a_damaged_file_is_found(llama: GGUFModel, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    llama.write(file, "f32")
    data = bytearray(file.read_bytes())
    data[-64 * 64] ^= 64
    file.write_bytes(data)
    with pytest.raises(RegraftError, match="is damaged"):
        read_back.compare_tensors(file, llama.tensors, None)


def test_sentencepiece_scores_follow_the_merges(tmp_path: Path) -> None:
    sentencepiece_tokenizer().save_pretrained(tmp_path)
    keys = vocabulary.read_vocabulary(tmp_path, VOCAB)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"]
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True))
    assert scores["ab"] > scores["\u2581a"] > scores["abc"] > scores["\u2581ab"] > scores["c"]
    kinds = keys["tokenizer.ggml.token_type"]
    assert kinds[1] == vocabulary.CONTROL and kinds[3] == vocabulary.BYTE
    assert kinds[-1] == vocabulary.UNUSED


def test_a_name_says_phi3_where_the_tokenizer_is_its_own() -> None:
    keys = {"tokenizer.ggml.tokens": sorted(vocabulary.PHI3_TOKENS)}
    assert vocabulary.choose_name("mine", keys) == "Phi-3 mine"
    assert vocabulary.choose_name("phi3-mini", keys) == "phi3-mini"
    assert vocabulary.choose_name("my-Phi-3", {"tokenizer.ggml.tokens": ["a"]}) == "my-phi"


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "no-merges")
    byte_level_tokenizer().save_pretrained(tmp_path / "large")
    for name, size, reason in (
        ("no-merges", VOCAB, "no merges"),
        ("large", 97, "260 tokens, the model's embedding 97"),
        ("none", VOCAB, "has no tokenizer"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(RegraftError, match=reason):
            vocabulary.read_vocabulary(tmp_path / name, size)


def test_the_command_writes_what_readme_promises(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save_for_gguf(tmp_path / "source"), tmp_path / "served"
    found = as_json(capsys, "export", str(source), str(out))
    assert found["to"] == "hf" and found["gguf"][0]["file"] == "model-q8_0.gguf"
    assert (out / "model-q8_0.gguf").is_file() and (out / "config.json").is_file()
    assert main(["check", str(source), str(out), "--json"]) == 0
    capsys.readouterr()

    out = tmp_path / "gguf"
    found = as_json(capsys, "export", str(source), str(out), "--to", "gguf")
    assert [one["file"] for one in found["gguf"]] == ["model-f32.gguf"]
    assert found["gguf"][0]["difference"] < 1e-5
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == [
        "README.md", "lineage.json", "model-f32.gguf",
    ]  # fmt: skip
    assert f"llama-cpp-python {engine.ENGINE}" in (out / "README.md").read_text()


def test_bad_input_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama", vocab=VOCAB)[1].save_pretrained(tmp_path / "bare")
    source, out = str(save_for_gguf(tmp_path / "source")), str(tmp_path / "out")
    to_gguf = ("export", source, out, "--to", "gguf")
    assert "has no tokenizer" in refused(
        capsys, "export", str(tmp_path / "bare"), out, "--to", "gguf"
    )
    assert "use one of q8_0, q4_k_m" in refused(capsys, *to_gguf, "--quantize", "q9")
    monkeypatch.setattr(quantize, "find_tool", lambda: None)
    assert "regraft[serve]" in refused(capsys, *to_gguf, "--quantize", "q4_k_m")
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    assert "regraft[serve]" in refused(capsys, *to_gguf, "--check-engine")
    assert "give OUT too" in refused(capsys, "export", source, "--check-engine")
    assert not Path(out).exists()
    assert find_architecture("bert") is None


def test_without_a_tokenizer_the_stock_class_is_written_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny("llama", vocab=VOCAB)[1].save_pretrained(tmp_path / "bare")
    found = as_json(capsys, "export", str(tmp_path / "bare"), str(tmp_path / "out"))
    assert found["gguf"] is None and any("no q8_0 GGUF file" in line for line in found["notes"])
    assert write.explain_no_gguf(Checkpoint.open(tmp_path / "bare"))
