"""Laws of measuring: perplexity and KL against a plain computation, baselines, the bench."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.cli import as_json, refused
from helpers.tiny import tiny, tokens, write_text

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.evaluation import baselines, bench, evaluate
from regraft.evaluation.perplexity import SLICE, Candidate, measure
from regraft.io.units import parse_lengths
from regraft.mixers.remix import Remix
from regraft.mixers.window import Window
from regraft.modeling.layer_kinds import attention_of, state_bytes
from regraft.report import html, plots, tables


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def test_perplexity_and_kl_equal_the_plain_computation():
    teacher, student = tiny("llama", seed=0)[1], tiny("llama", seed=3)[1]
    ids, sizes = tokens(3, SLICE + 40), torch.tensor([700, 800, 900])
    scores = measure(
        {"student": Candidate(student), "teacher": Candidate(teacher)}, ids, sizes, "teacher"
    )
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (teacher, student))
    nll = -q.gather(2, ids[:, 1:, None]).mean()
    row = scores["student"].json()
    assert row["perplexity"] == pytest.approx(float(nll.exp()), rel=1e-4)
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert row["tokens"] == 3 * (SLICE + 39) and row["windows"] == 3
    assert row["bits_per_byte"] == pytest.approx(
        float(nll) * row["tokens"] / 2400 / math.log(2), rel=1e-4
    )
    assert row["byte_perplexity"] == pytest.approx(2 ** row["bits_per_byte"])
    assert scores["teacher"].json()["kl"] is None


def test_a_model_has_no_divergence_from_itself():
    model = tiny("qwen3")[1]
    scores = measure(
        {"t": Candidate(model), "s": Candidate(model)}, tokens(1, 32), torch.tensor([90]), "t"
    )
    assert scores["s"].json()["kl"] == 0.0


def test_progress_counts_every_forward():
    seen = []
    model = tiny("llama")[1]
    rows = {"a": Candidate(model), "b": Candidate(model)}
    measure(
        rows, tokens(3, 8), torch.ones(3), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(number, 6) for number in range(1, 7)]


@pytest.mark.parametrize("shape", [(0, 16), (2, 1)])
def test_nothing_to_predict_is_refused(shape):
    with pytest.raises(RegraftError, match="nothing to predict"):
        measure({}, torch.zeros(shape, dtype=torch.long), torch.ones(shape[0]))


def test_weights_that_are_not_finite_are_refused():
    model = tiny("llama")[1]
    model.get_output_embeddings().weight.data[5, 0] = math.nan
    with pytest.raises(RegraftError, match="likelihood is nan"):
        measure({"m": Candidate(model)}, tokens(1, 8), torch.ones(1))


def test_table_has_every_baseline_in_order(source, linearized, text):
    table = evaluate.evaluate(str(linearized), str(source), str(text), 4, 64, scratch=str(source))
    assert list(table["baselines"]) == list(baselines.ROWS)
    for name, row in table["baselines"].items():
        assert row["perplexity"] > 1 and row["windows"] == 4
        assert (row["kl"] is None) == (name == baselines.TEACHER)
    assert table["baselines"][baselines.SCRATCH]["kl"] == 0.0, "here the teacher itself"
    before = table["baselines"][baselines.UNTRAINED]
    assert table["perplexity"] == pytest.approx(before["perplexity"], rel=1e-6), (
        "an untrained model is its own baseline"
    )


def test_a_gate_at_the_window_end_is_the_window(source, linearized):
    model = modeling.load(linearized)
    off = baselines.model_candidates(model)[baselines.NO_LINEAR]
    window = modeling.materialize(
        Remix("window", keep="0", window=16, sinks=2)(Checkpoint.open(source))
    )
    rows = {"off": off, "window": Candidate(window)}
    scores = measure(rows, tokens(2, 64), torch.ones(2))
    assert scores["off"].nll == pytest.approx(scores["window"].nll, rel=1e-5)


@pytest.mark.parametrize(
    "mixer, width",
    [("gated_deltanet", 16), ("gated_deltanet", 64), ("retnet", 64), ("supra", 0), ("window", 16)],
)
def test_windows_that_need_no_training_hold_the_state_of_the_model(source, mixer, width):
    checkpoint = Checkpoint.open(source)
    remix = Remix(mixer, keep="0", window=width, sinks=2 if width else 0)
    found = baselines.variants(checkpoint, remix)[baselines.WINDOW_KEPT]
    assert found is not None

    def numbers(remix: Remix) -> int:
        sizes = state_bytes(remix(checkpoint), 10**6)
        return sum(size for kind, size in sizes.items() if kind != "softmax") // 4

    own, windows = numbers(remix), numbers(found)
    layers = checkpoint.layers - 1
    sizes = [
        Window.state_size(attention_of(checkpoint, 0), {"name": "window", "window": width})
        for width in (1, 2)
    ]
    token = layers * (sizes[1] - sizes[0])
    if found.window == baselines.WINDOW and not width:
        assert own < windows, "narrower than 64 it would be no opponent"
    else:
        assert own - token < windows <= own, "to a token"


def test_window_everywhere_needs_text_longer_than_the_window(source, linearized, text):
    short = evaluate.evaluate(str(linearized), str(source), str(text), 2, 16)["baselines"]
    assert short[baselines.WINDOW_ALL]["kl"] == pytest.approx(0, abs=1e-6), (
        "16 tokens fit into a window of 16"
    )
    long = evaluate.evaluate(str(linearized), str(source), str(text), 2, 64)["baselines"]
    assert long[baselines.WINDOW_ALL]["kl"] > 1e-4


def test_a_plain_model_has_no_baselines_of_its_own(source, text):
    table = evaluate.evaluate(str(source), None, str(text), 2, 32)
    assert table["baselines"] == {} and table["kl"] is None


def test_default_text_is_the_held_out_documentation(source):
    windows = evaluate.evaluation_windows(None, modeling.load_tokenizer(source), 3, 1024)
    assert windows.input_ids.shape == (3, 1024)


def test_windows_begin_with_bos_where_a_mixer_is_made_for_that(source, text, tmp_path):
    tokens = modeling.load_tokenizer(source)
    plain, begun = (
        evaluate.evaluation_windows(str(text), tokens, 3, 32, bos) for bos in (False, True)
    )
    assert (begun.input_ids[:, 0] == tokens.bos_token_id).all()
    assert torch.equal(begun.input_ids[:, 1:], plain.input_ids[:, 1:])
    assert torch.equal(begun.bytes, plain.bytes)

    Remix("sink_window", "0", window=8)(Checkpoint.open(source)).save(tmp_path / "sinks")
    given = (str(source), str(text), 2, 32)
    asked = evaluate.evaluate(str(source), None, *given[1:], bos=True)["perplexity"]
    found = evaluate.evaluate(str(tmp_path / "sinks"), *given)["baselines"]
    assert found[baselines.TEACHER]["perplexity"] == pytest.approx(asked)
    assert evaluate.evaluate(*given[:1], None, *given[1:])["perplexity"] != pytest.approx(asked)


@pytest.mark.parametrize(
    ("text", "counts"), [("1k,4k", [1024, 4096]), ("512", [512]), ("16K,7", [16384, 7])]
)
def test_lengths_are_read(text, counts):
    assert parse_lengths(text) == counts


@pytest.mark.parametrize("text", ["", "1q", "0", "-1k", "1k,,2k", "k"])
def test_wrong_lengths_are_named(text):
    with pytest.raises(RegraftError, match="is no length"):
        parse_lengths(text)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_bench_rows_and_constant_state(source, linearized):
    batch = 3
    rows = bench.bench(
        {"teacher": str(source), "student": str(linearized)}, [64, 256], steps=2, batch=batch
    )
    assert (
        rows["teacher"][0]["state_bytes"]
        == batch * bench.measure(str(source), 64, 1)["state_bytes"]
    )
    for name in ("teacher", "student"):
        for row in rows[name]:
            assert row["batch"] == batch
            assert row["decode_tok_s"] > 0 and row["prefill_tok_s"] > 0
            assert row["peak_bytes"] >= row["load_bytes"] > 0
            assert row["state_bytes"] == row["converted_bytes"] + row["kept_bytes"]
    small, large = rows["student"]
    assert small["converted_bytes"] == large["converted_bytes"] > 0
    assert large["kept_bytes"] == 4 * small["kept_bytes"]
    assert rows["teacher"][1]["state_bytes"] == 4 * rows["teacher"][0]["state_bytes"]


def test_a_filled_cache_is_as_large_as_a_read_one(source, linearized):
    for path in map(str, (source, linearized)):
        filled, read = (bench.measure(path, 100, 2, 3, prefill) for prefill in (False, True))
        for key in ("length", "batch", "state_bytes", "converted_bytes", "kept_bytes"):
            assert filled[key] == read[key]
        assert filled["prefill_tok_s"] is None and filled["decode_tok_s"] > 0


def test_what_does_not_fit_is_a_row_of_its_own(source, linearized, monkeypatch):
    """The state is forecast as it is measured, nothing is started, and tables and plots leave the
    cells open.
    """
    models = {"teacher": str(source), "student": str(linearized)}
    measured = {name: bench.measure(path, 100, 1, 3) for name, path in models.items()}
    monkeypatch.setattr(bench, "available_memory", lambda: (1000, "free"))
    monkeypatch.setattr(bench, "run_worker", None)
    rows = bench.bench(models, [100], batch=3)
    for name, (row,) in rows.items():
        assert row["decode_tok_s"] is row["prefill_tok_s"] is row["peak_bytes"] is None
        for key in ("length", "batch", "state_bytes", "converted_bytes", "kept_bytes"):
            assert row[key] == pytest.approx(measured[name][key], rel=0.02), (
                name,
                key,
            )  # but for small marks
    assert plots.plot_speed(rows).startswith(b"<?xml") and tables.speed_table(rows).row_count == 2
    assert len(html.speed_table(rows).rows) == len(html.memory_table(rows).rows) == 1


def test_a_failing_bench_says_why(tmp_path):
    with pytest.raises(RegraftError, match=r"bench of .* at 8 tokens failed: .*no model at"):
        bench.run_worker(str(tmp_path / "nothing"), 8, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_bench_times_a_draft_and_its_source(source, linearized, capsys):
    words = ["bench", linearized, "--against", source, "--lengths", "40,300", "--steps", 3]
    found = as_json(capsys, *words, "--verify")
    assert [row["length"] for row in found["verified"]] == [40, 300]
    for row in found["verified"]:
        assert row["tokens"] == 12 and row["decode_tok_s"] > 0 and row["prefill_tok_s"] > 0
        assert row["state_bytes"] == row["converted_bytes"] + row["kept_bytes"]
        given = sum(block["accepted"] + 1 for block in row["blocks"])
        assert 11 <= given <= 12
    for more, what in (
        (["--batch", 2], "--batch 2"),
        (["--skip-prefill"], "leave out --skip-prefill"),
    ):
        assert what in refused(capsys, *words, "--verify", *more)
    assert "--against None" in refused(capsys, "bench", linearized, "--verify")


def test_acceptance_by_position():
    numbers = ((3, 3), (2, 0), (4, 1))
    blocks = [{"drafted": drafted, "accepted": accepted} for drafted, accepted in numbers]
    found = tables.acceptance_by_position(blocks)
    assert found == [(2, 3), (1, 2), (1, 1), (0, 0)]
    row = {"length": 64, "tokens": 7, "blocks": blocks}
    assert [column.header for column in tables.acceptance_table([row]).columns][4] == "accepted"
