"""Laws of benchmarks, recall and perplexity by position: against independent sums, on stubs that
recall or cannot.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.tiny import byte_tokenizer, save_model
from torch import nn

from regraft import modeling
from regraft.core.checkpoint import Checkpoint
from regraft.errors import RegraftError
from regraft.evaluation import baselines, chunked, evaluate, positions, recall, tasks
from regraft.evaluation import lm_eval as harness
from regraft.evaluation.perplexity import Candidate
from regraft.evaluation.suite import Suite, add_differences
from regraft.mixers.remix import Remix
from regraft.report import html, plots, tables

WORDS = "the cat sat on a mat while dogs ran past naïve old men".split()
FILLER = ["some filler text that goes on for a while and never says anything at all; " * 20]


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


def lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of every form; a text holds U+2028, which ends no line."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)

    def choice(count: int) -> dict:
        return {
            "query": sentence(draw, 5) + "\u2028" + sentence(draw, 2),
            "choices": [sentence(draw, draw.randint(1, 6)) for _ in range(count)],
            "gold": draw.randrange(count),
        }

    lines(folder / "hellaswag" / "hellaswag_val.jsonl", [choice(4) for _ in range(12)])
    lines(folder / "arc_easy.jsonl", [choice(draw.choice((3, 4, 5))) for _ in range(9)])
    pairs = [
        {
            "context_options": [sentence(draw, 4), sentence(draw, 5)],
            "continuation": sentence(draw, 3),
            "gold": i % 2,
        }
        for i in range(8)
    ]
    lines(folder / "winogrande" / "winogrande.jsonl", pairs)
    lines(
        folder / "lambada.jsonl",
        [{"context": sentence(draw, 6), "continuation": draw.choice(WORDS)} for _ in range(6)],
    )
    lines(
        folder / "blimp.jsonl",
        [{"good": sentence(draw, 4), "bad": sentence(draw, 4)} for _ in range(6)],
    )
    mmlu = [
        {
            "subject": name,
            "question": sentence(draw, 4),
            "choices": [f"{name} {i}" for i in range(4)],
            "gold": i % 4,
        }
        for name in ("abstract_algebra", "virology")
        for i in range(6)
    ]
    lines(folder / "mmlu" / "test.jsonl", mmlu[::2])
    lines(folder / "mmlu" / "dev.jsonl", mmlu[1::2])
    return folder


@torch.no_grad()
def likelihood(model, tokenizer, context: str, words: str) -> tuple[float, bool]:
    """Independent of the harness: log p(words | context) and whether greedy text says them, one row
    at a time.
    """
    first = tokenizer(context).input_ids if context else [tokenizer.bos_token_id]
    both = torch.tensor([first + tokenizer(words).input_ids])
    log_p = model(both, use_cache=False).logits[0].log_softmax(-1)[len(first) - 1 : -1]
    said = both[0, len(first) :]
    return log_p.gather(1, said[:, None]).sum().item(), bool((log_p.argmax(-1) == said).all())


def expected(model, tokenizer, questions) -> dict[str, float]:
    """acc, acc_norm by characters, and perplexity of single answers, by hand."""
    right, normal, sums = [], [], []
    for q in questions:
        pairs = [(context, choice) for context in q.contexts for choice in q.choices]
        found = [likelihood(model, tokenizer, context, " " + choice) for context, choice in pairs]
        scores = [score for score, _ in found]
        if len(pairs) == 1:
            right.append(found[0][1])
            sums.append(scores[0])
        else:
            right.append(scores.index(max(scores)) == q.gold)
            each = [score / len(choice) for score, (_, choice) in zip(scores, pairs, strict=True)]
            normal.append(each.index(max(each)) == q.gold)
    return {
        "acc": sum(right) / len(right),
        "acc_norm": sum(normal) / len(normal) if normal else None,
        "perplexity": math.exp(-sum(sums) / len(sums)) if sums else None,
    }


NAMES = ("hellaswag", "arc_easy", "winogrande", "lambada", "blimp", "mmlu", "mmlu_cloze")


def test_scores_are_those_of_an_independent_sum(data, linearized):
    model, tokenizer = modeling.load(linearized), modeling.load_tokenizer(linearized)
    found = evaluate.evaluate_tasks(model, tokenizer, NAMES, data, batch=3)
    for name in NAMES:
        questions, row = tasks.questions(name, data), found["tasks"][name]
        hand = expected(model, tokenizer, questions)
        assert row["n"] == len(questions) and row["acc"] == pytest.approx(hand["acc"])
        for key in ("acc_norm", "perplexity"):
            if row[key] is not None:
                assert row[key] == pytest.approx(hand[key], rel=1e-3)
        value = row[row["metric"]]
        assert row["stderr"] == pytest.approx(math.sqrt(value * (1 - value) / (row["n"] - 1)))
        assert row["above_chance"] == pytest.approx((value - row["chance"]) / (1 - row["chance"]))
    assert found["average"] == pytest.approx(
        sum(r[r["metric"]] for r in found["tasks"].values()) / len(NAMES)
    )
    assert found["tasks"]["hellaswag"]["metric"] == "acc_norm"
    assert found["tasks"]["lambada"]["perplexity"] > 1 and found["tasks"]["lambada"]["chance"] == 0


def test_batches_do_not_change_scores(data, linearized):
    model, tokenizer = modeling.load(linearized), modeling.load_tokenizer(linearized)
    one, many = (
        evaluate.evaluate_tasks(model, tokenizer, NAMES, data, batch=batch) for batch in (1, 7)
    )
    for name in NAMES:
        assert one["tasks"][name].pop("each") == many["tasks"][name].pop("each")
        assert one["tasks"][name] == pytest.approx(many["tasks"][name])


def test_chance_counts_the_choices_of_every_question(data):
    questions = tasks.questions("arc_easy", data)
    assert {len(q.choices) for q in questions} == {3, 4, 5}
    assert all(q.chance == 1 / len(q.choices) for q in questions)
    assert all(q.chance == 0.5 for q in tasks.questions("winogrande", data))


def test_a_limit_is_spread_over_the_file(data):
    subjects = [q.contexts[0] for q in tasks.questions("mmlu", data, limit=2)]
    assert "about abstract algebra." in subjects[0] and "about virology." in subjects[1]
    assert len(tasks.questions("mmlu", data, limit=1000)) == 6


def test_examples_come_before_the_question(data):
    shown = tasks.questions("mmlu", data, shots=2)[-1].contexts[0]
    head, *parts = shown.split("\n\n")
    assert head.endswith("about virology.") and len(parts) == 3
    assert all(part[-1] in "ABCD" for part in parts[:-1]) and parts[-1].endswith("\nAnswer:")
    for name, shots, reason in (
        ("mmlu", 4, "3 examples for"),
        ("hellaswag", 1, "no file of examples"),
    ):
        with pytest.raises(RegraftError, match=reason):
            tasks.questions(name, data, shots=shots)


HARNESS = {
    "piqa/piqa.yaml": (
        "piqa",
        {"goal": "Cut a lime?", "sol1": "Use a knife.", "sol2": "Use a spoon."},
    ),
    "arc/arc_easy.yaml": (
        "arc_easy",
        {"question": "Which is hot?", "choices": {"text": ["sun", "ice"]}},
    ),
    "super_glue/boolq/default.yaml": (
        "boolq",
        {"passage": "Ice floats.", "question": "does ice float"},
    ),
    "mmlu/default/_default_template_yaml": (
        "mmlu",
        {"question": " Is it? ", "choices": ["a", "b", "c", "d"]},
    ),
    "mmlu/continuation/_continuation_template_yaml": (
        "mmlu_cloze",
        {"question": "Is it?", "choices": ["a", "b"]},
    ),
    "lambada/lambada_openai.yaml": ("lambada", {"text": "I gave him the book"}),
}
LINES = {
    "piqa": {
        "query": "Question: Cut a lime?\n",
        "choices": ["Use a knife.", "Use a spoon."],
        "gold": 0,
    },
    "arc_easy": {"query": "Question: Which is hot?", "choices": ["sun", "ice"], "gold": 0},
    "boolq": {
        "query": "Passage: Ice floats.\nQuestion: does ice float?",
        "choices": ["no", "yes"],
        "gold": 1,
    },
    "mmlu": {"subject": "x", "question": " Is it? ", "choices": ["a", "b", "c", "d"], "gold": 1},
    "mmlu_cloze": {"subject": "x", "question": "Is it?", "choices": ["a", "b"], "gold": 1},
    "lambada": {"context": "I gave him the", "continuation": "book"},
}


@pytest.mark.parametrize("file", sorted(HARNESS))
def test_contexts_are_the_harness_s_own(file):
    """The text that lm-evaluation-harness's bundled definition makes of the original line."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.utils import apply_template

    name, row = HARNESS[file]

    class Loader(yaml.SafeLoader):
        pass

    text = (Path(lm_eval.__file__).parent / "tasks" / file).read_text(encoding="utf-8")
    template = yaml.load(text, Loader)["doc_to_text"]
    assert tasks.TASKS[name].ask(LINES[name]).contexts == (apply_template(template, row),)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no question"),
        (
            '{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": "a", "cho',
            "line 2 is not JSON.*cut short",
        ),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "line 1 has no field 'choices'"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "line 1 has no field 'choices'"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "gold is 2, but there are 2"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "no field 'gold'"),
        ('{"choices": ["b", "c"], "gold": 0}', "no field 'query' that is a string"),
        ("[]", "no field 'query'"),
    ],
)
def test_bad_files_are_named(tmp_path, text, reason):
    (tmp_path / "copa.jsonl").write_text(text)
    with pytest.raises(RegraftError, match=reason):
        tasks.questions("copa", tmp_path)


def test_wrong_requests_are_named(tmp_path, source, data):
    tokenizer = modeling.load_tokenizer(source)
    for options, reason in (
        ({"names": ["helaswag"]}, "did you mean hellaswag.*there are hellaswag, piqa.*passkey"),
        ({"names": ["piqa"]}, "--task-data DIR"),
        (
            {"names": ["piqa"], "folder": tmp_path},
            r"looked for .*piqa\.jsonl and .*piqa/piqa\.jsonl",
        ),
        ({"names": ["hellaswag"], "folder": data, "limit": 0}, "--limit 0"),
        ({"names": ["passkey"], "limit": 0}, "--limit 0"),
        ({"names": ["passkey"], "lengths": [30]}, "30 tokens is too short"),
        ({"names": ["passkey"], "batch": 0}, "--batch 0"),
    ):
        with pytest.raises(RegraftError, match=reason):
            Suite(tokenizer, filler=FILLER, **options)


class Copying(nn.Module):
    """Says what followed the longest earlier repeat of its last tokens, seen through a window of
    `size` tokens.
    """

    def __init__(self, vocab: int, size: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(vocab))
        self.size = size

    def forward(self, input_ids, use_cache=True, logits_to_keep=0, **given):
        before = given.get(modeling.CACHE) or [[] for _ in input_ids]
        seen = [old + new for old, new in zip(before, input_ids.tolist(), strict=True)]
        logits = torch.zeros(*input_ids.shape, len(self.weight))
        for row, ids in enumerate(seen):
            for place in range(input_ids.shape[1]):
                if not logits_to_keep or place >= input_ids.shape[1] - logits_to_keep:
                    past = ids[: len(ids) - input_ids.shape[1] + place + 1][
                        -self.size if self.size else 0 :
                    ]
                    logits[row, place, self.following(past)] = 10.0
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], **modeling.cache_kwargs(seen))

    @staticmethod
    def following(past: list[int]) -> int:
        def match(end: int) -> int:
            return next((n for n in range(end) if past[end - 1 - n] != past[-1 - n]), end)

        best = max(range(1, len(past)), key=match, default=0)
        return past[best] if best else 0


@pytest.mark.parametrize("kind", sorted(recall.KINDS))
def test_a_model_that_copies_recalls_everything_and_a_window_nothing(kind):
    tokenizer = byte_tokenizer()
    probe = recall.build_probe(kind, tokenizer, FILLER, 900, 6)
    assert probe.context.shape == (6, 900)
    full = recall.score(Copying(len(tokenizer)), probe, batch=4)
    assert (full["acc"], full["exact"], full["rank"], full["n"]) == (1.0, 1.0, 1.0, 6)
    short = recall.score(Copying(len(tokenizer), size=48), probe)
    assert short["acc"] <= 0.5 and short["exact"] <= 0.4 and short["rank"] > 2


def test_ties_count_against_the_model():
    tokenizer = byte_tokenizer()

    class Silent(Copying):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            return SimpleNamespace(
                logits=out.logits * 0, **modeling.cache_kwargs(modeling.cache_of(out))
            )

    found = recall.score(
        Silent(len(tokenizer)), recall.build_probe("passkey", tokenizer, FILLER, 400, 3)
    )
    assert found["acc"] == 0.0 and found["rank"] == recall.CHOICES


@pytest.mark.parametrize("kind", sorted(recall.KINDS))
def test_recall_through_the_cache_is_recall_without_it(kind, linearized):
    """Rank and greedy answers from one pass over the whole text, no cache, against the batched
    steps.
    """
    model, tokenizer = modeling.load(linearized), modeling.load_tokenizer(linearized)
    probe = recall.build_probe(kind, tokenizer, FILLER, 450, 2)
    probe = recall.RecallProbe(probe.context, probe.rounds[:2])
    first, greedy = [], []
    for item, context in enumerate(probe.context):
        for asked in probe.rounds:
            context = torch.cat([context, asked.query[item]])
            sums = []
            for ids in asked.candidates[item]:
                with torch.no_grad():
                    log_p = (
                        model(torch.cat([context, ids])[None], use_cache=False)
                        .logits[0]
                        .log_softmax(-1)
                    )
                log_p = log_p[len(context) - 1 : -1]
                sums.append(log_p.gather(1, ids[:, None]).sum().item())
                if len(sums) == 1:
                    greedy.append(bool((log_p.argmax(-1) == ids).all()))
            first.append(max(sums) == sums[0])
            context = torch.cat([context, asked.candidates[item, 0]])
    found = recall.score(model, probe, batch=2)
    assert found["acc"] == pytest.approx(sum(first) / len(first))
    assert found["exact"] == pytest.approx(sum(greedy) / len(greedy))


def test_probes_are_the_same_for_the_same_seed():
    one, same, other = (
        recall.build_probe("needle", byte_tokenizer(), FILLER, 700, 3, seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.context, same.context) and not torch.equal(one.context, other.context)


def test_reading_in_chunks_is_reading_at_once(linearized, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 7)
    model = modeling.load(linearized)
    ids = torch.randint(3, 250, (2, 40))
    parts = torch.cat([logits for logits, _ in chunked.forward_in_chunks(model, ids)], 1)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    assert torch.allclose(parts, whole, atol=2e-5)
    assert torch.allclose(chunked.last_logits(model, ids)[0], whole[:, -1], atol=2e-5)


def test_buckets_double_and_perplexities_are_means(source, monkeypatch):
    assert positions.buckets(200) == [(0, 64), (64, 128), (128, 200)]
    assert positions.buckets(40) == [(0, 40)]
    monkeypatch.setattr(chunked, "CHUNK", 50)
    model, rows = modeling.load(source), torch.randint(3, 250, (3, 130))
    with torch.no_grad():
        log_p = model(rows, use_cache=False).logits[:, :-1].log_softmax(-1)
    nll = -log_p.gather(2, rows[:, 1:, None])[..., 0]
    found = positions.perplexity_by_position(model, rows)
    assert [cell["tokens"] for cell in found] == [3 * 63, 3 * 64, 3 * 2]
    for cell, part in zip(found, (nll[:, :63], nll[:, 63:127], nll[:, 127:]), strict=True):
        assert cell["perplexity"] == pytest.approx(math.exp(part.mean()), rel=1e-4)


def test_every_baseline_beside_every_number(source, linearized, data):
    suite = evaluate.build_suite(
        str(linearized),
        ["winogrande", "passkey"],
        folder=data,
        lengths=[250],
        limit=3,
        windows=(2, 100),
    )
    heard = []
    scratch = str(source)
    table = evaluate.benchmark(
        str(linearized), suite, str(source), scratch, lambda share, words: heard.append(share)
    )
    assert list(table["baselines"]) == list(baselines.ROWS)
    teacher = table["baselines"][baselines.TEACHER]
    assert {**teacher, "of_teacher": 1} == {
        **table["baselines"][baselines.SCRATCH],
        "of_teacher": 1,
    }
    for row in table["baselines"].values():
        apart(row, row["tasks"]["winogrande"], table["tasks"]["winogrande"])
        apart(None, row["recall"]["passkey"]["250"], table["recall"]["passkey"]["250"])
    for row in (table, *table["baselines"].values()):
        assert set(row["tasks"]) == {"winogrande"} and set(row["recall"]["passkey"]) == {"250"}
        assert [cell["to"] for cell in row["positions"]] == [64, 100]
        task = row["tasks"]["winogrande"]
        above = teacher["tasks"]["winogrande"]["above_chance"]
        assert task["of_teacher"] == (
            pytest.approx(task["above_chance"] / above) if above > 0 else None
        )
    assert heard == sorted(heard) and heard[0] == 0 and 1 - 1 / len(heard) <= heard[-1] < 1
    assert json.loads(json.dumps(table)) == table


def apart(row: dict | None, theirs: dict, mine: dict) -> None:
    """A lead is the mean of the questions' differences, with the error of that mean."""
    differences = [a - b for a, b in zip(mine["each"], theirs["each"], strict=True)]
    found = theirs["difference"]
    assert found["mean"] == pytest.approx(
        mine[mine.get("metric", "acc")] - theirs[theirs.get("metric", "acc")]
    )
    assert found["stderr"] == pytest.approx(
        statistics.stdev(differences) / math.sqrt(len(differences))
    )
    if row is not None:  # one task alone: its lead is the average's
        assert row["difference"] == pytest.approx(found)


def test_a_lead_is_paired_question_by_question():
    def row(**each: list[int]) -> dict:
        return {"tasks": {name: {"each": list(right)} for name, right in each.items()}}

    draw = random.Random(0)
    weak = [draw.randrange(2) for _ in range(400)]
    strong = [
        right or number % 20 == 0 for number, right in enumerate(weak)
    ]  # never worse, on a twentieth better
    found = add_differences(row(a=weak, b=weak), row(a=strong, b=weak))
    gained = sum(strong) - sum(weak)
    lead = found["tasks"]["a"]["difference"]
    assert lead["mean"] == pytest.approx(gained / 400) and lead["stderr"] < 0.5 * math.sqrt(
        0.5 / 400
    )
    assert found["tasks"]["b"]["difference"] == {"mean": 0.0, "stderr": 0.0}
    assert found["difference"]["mean"] == pytest.approx(lead["mean"] / 2)
    assert found["difference"]["stderr"] == pytest.approx(lead["stderr"] / 2)
    assert add_differences(row(a=[1]), row(a=[0]))["difference"] == {"mean": -1.0, "stderr": None}


def test_the_same_baseline_is_measured_once(source, tmp_path):
    Remix(mixer="window", keep="none", window=16, sinks=2)(Checkpoint.open(source)).save(
        tmp_path / "window"
    )
    seen = []

    def suite(candidate: Candidate, tell) -> dict:
        seen.append(candidate)
        return {}

    evaluate.benchmark(str(tmp_path / "window"), suite, str(source))
    assert len(seen) == 3, "the teacher, the window in every layer for three rows, the model"


def test_scratch_must_read_the_same_tokens(linearized, tmp_path):
    from helpers.tiny import tiny

    tiny("llama", vocab=77)[1].save_pretrained(tmp_path / "other")
    with pytest.raises(RegraftError, match="77 tokens where the model has 259"):
        evaluate.benchmark(str(linearized), lambda *_: {}, None, str(tmp_path / "other"))


def test_learned_positions_end(tmp_path):
    gpt2 = save_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(RegraftError, match="positions: 100000 tokens are too many"):
        evaluate.build_suite(str(gpt2), ["passkey"], lengths=[100_000])


def test_a_missing_harness_is_named_with_its_command(source, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.models.huggingface", raising=False)
    with pytest.raises(RegraftError, match=r"pip install 'regraft\[eval\]'"):
        Suite(modeling.load_tokenizer(source), ["lambada"], data)


def test_tables_hold_every_row(source, linearized, data, capsys):
    from rich.console import Console

    suite = evaluate.build_suite(
        str(linearized), [*NAMES, "mqar"], folder=data, lengths=[250], limit=2, windows=(1, 70)
    )
    table = evaluate.benchmark(str(linearized), suite)
    tables.print_evaluation(table, Console(width=80))
    shown = capsys.readouterr().out
    assert "…" not in shown and shown.count("questions") > 1, (
        "columns are cut into tables, not cut off"
    )
    for word in (
        *NAMES,
        "average",
        "250 tokens",
        "64-70",
        baselines.NO_LINEAR,
        "chance",
        "lead",
        "+0.0 ± 0.0",
    ):
        assert word in shown
    assert plots.plot_positions(html.eval_rows(table)).lstrip().startswith(b"<?xml")


def test_contexts_read_once_score_as_the_harness_scores_whole_rows(linearized):
    """Shared contexts and answers from the cache against HFLM's own full forward passes."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, draw = (
        modeling.load(linearized),
        modeling.load_tokenizer(linearized),
        random.Random(1),
    )
    texts = [sentence(draw, words) for words in (3, 3, 9, 9, 20)]
    requests = [
        SimpleNamespace(args=(text, " " + sentence(draw, draw.randint(1, 4)))) for text in texts * 3
    ]
    requests += [SimpleNamespace(args=("", "the cat")), SimpleNamespace(args=(texts[0], " a"))]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=4)
    ours = harness.language_model(Candidate(model), tokenizer, batch=4)
    for (mine, greedy), (theirs, said) in zip(
        ours.loglikelihood(requests), plain.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert mine == pytest.approx(theirs, rel=1e-4) and greedy == said
    assert ours.cut == 0
    ours._max_length = 30
    assert ours.loglikelihood(requests)[4][0] != pytest.approx(
        plain.loglikelihood(requests, True)[4][0], rel=1e-4
    )
    assert ours.cut == sum(len(r.args[0] + r.args[1]) > 31 for r in requests)
