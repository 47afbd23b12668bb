"""LiGO: with maps set by hand it is every operator it generalises; what it keeps exact; fitting,
and folding.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import ARCHITECTURES, GROWABLE, inputs, save_model, tiny, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft import modeling
from regraft.checks import outputs as parity
from regraft.cli.main import main as cli
from regraft.core import axes, lineage
from regraft.core.checkpoint import Checkpoint
from regraft.data.images import Images
from regraft.data.rows import Packed
from regraft.errors import RegraftError
from regraft.growth.ligo_maps import AxisMap
from regraft.growth.ligo_options import Ligo
from regraft.growth.sizes_to_steps import Growth
from regraft.growth.steps.deepen import Deepen
from regraft.growth.steps.ligo import Learned
from regraft.growth.steps.transplant import Transplant
from regraft.growth.steps.widen import Widen
from regraft.train.fit_ligo import LigoTrainer, fit_maps
from regraft.train.objectives import compute_loss
from regraft.train.output import RUN
from regraft.train.stage import Stage

RMS = ("mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral")
STILL = {"start": "pad", "blur": 0.0}


def saved(folder: Path, family: str, **keys: Any) -> Checkpoint:
    tiny(family, **keys)[1].save_pretrained(folder / "source")
    return Checkpoint.open(folder / "source")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    code = cli(list(words))
    said = capsys.readouterr()
    return code, said.out, said.err


def furthest(left: Checkpoint, right: Checkpoint) -> float:
    """Largest difference of two checkpoints' tensors relative to the tensor's largest entry."""
    assert left.names == right.names and left.config == right.config
    worst = 0.0
    for key, lazy in left.tensors.items():
        ours, theirs = lazy.read(), right.tensors[key].read()
        assert ours.shape == theirs.shape, key
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-9)))
    return worst


def logits(checkpoint: Checkpoint, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return parity.compute_outputs(modeling.materialize(checkpoint), given)["logits"]


def shaken(learned: Learned, source: Checkpoint, size: float = 1.0, only: str = "rows") -> Learned:
    """The same growth with random maps."""
    generator = torch.Generator().manual_seed(3)
    state = learned.build_grower(source).state_dict()
    maps = {
        k: torch.randn(v.shape, generator=generator) * size if only in k else v
        for k, v in state.items()
    }
    return replace(learned, maps=maps)


@pytest.mark.parametrize("how", ["stack", "interpolate"])
@pytest.mark.parametrize("family", GROWABLE)
def test_by_hand_it_is_stackbert_and_interpolation(family: str, how: str, tmp_path: Path) -> None:
    source = saved(tmp_path, family)
    ours = Learned(layers=5, method=Ligo(depth=how, **STILL))(source)
    assert furthest(ours, Deepen(5, how)(source)) < 1e-6


@pytest.mark.parametrize("family", GROWABLE)
def test_by_hand_it_is_net2net(family: str, tmp_path: Path) -> None:
    source = saved(
        tmp_path, family, **({} if family in ARCHITECTURES else {"tie_word_embeddings": False})
    )
    sizes: dict[str, Any] = {"hidden": 2 * source.sizes["hidden"], "ffn": 2 * source.sizes["ffn"]}
    ours = Learned(**sizes, method=Ligo(start="duplicate"))(source)
    assert furthest(ours, Widen(**sizes, how="duplicate", noise=0.0)(source)) < 1e-6


def test_by_hand_it_is_zero_padding(tmp_path: Path) -> None:
    source = saved(tmp_path, "mistral")
    ours = Learned(hidden=48, ffn=60, heads=18, kv_heads=6, method=Ligo(**STILL))(source)
    padded = Widen(hidden=48, ffn=60, heads=18, kv_heads=6)(source)
    for key, lazy in ours.tensors.items():
        value, theirs, old = lazy.read(), padded.tensors[key].read(), source.tensors[key]
        block = tuple(slice(0, size) for size in old.shape)
        assert torch.allclose(value[block], theirs[block], rtol=1e-6), key
        value[block] = 0.0
        assert not value.any() or (
            lazy.shape != old.shape and set(value.unique().tolist()) == {0.0, 1.0}
        ), key


@pytest.mark.parametrize("family", GROWABLE)
def test_by_hand_it_is_a_direct_copy(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path, family)
    sizes: dict[str, Any] = {
        "hidden": 2 * source.sizes["hidden"],
        "ffn": 2 * source.sizes["ffn"],
        "layers": 5,
    }
    ours = Learned(**sizes, method=Ligo(start="copy"))(source)
    assert furthest(ours, Transplant(**sizes)(source)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "phi3", "bert", "vit"])
def test_a_live_start_is_the_operator_itself(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path, family)
    sizes: dict[str, Any] = {"hidden": 2 * source.sizes["hidden"], "ffn": 2 * source.sizes["ffn"]}
    ours = Learned(**sizes, layers=5, method=Ligo(live=True, **STILL))(source)
    assert furthest(ours, Deepen(5, "stack")(Widen(**sizes, how="pad", noise=0.0)(source))) < 1e-6


def written(space: AxisMap) -> torch.Tensor:
    return space()[0].detach()


def test_the_papers_formula_on_bert(tmp_path: Path) -> None:
    """Algorithm 1 of the paper, literally, with maps and coefficients at random."""
    source = saved(tmp_path, "bert", dim=8, heads=2)
    learned = Learned(hidden=24, ffn=64, heads=3, layers=5, method=Ligo(heads="dense", blur=0.5))
    learned = shaken(shaken(learned, source, only="rows"), source, only="mixing")
    grower, target = learned.build_grower(source), learned(source)
    b = {name: written(space) for name, space in grower.spaces.items()}  # type: ignore[arg-type]
    w = {name: value.detach() for name, value in grower.mixing.items()}
    ratio = (24 / 16) ** 0.5  # of the norms' mean square, which the gains make up for
    table = [("attn.q", "q", "hidden"), ("attn.k", "k", "hidden"), ("attn.v", "v", "hidden"), ("attn.o", "hidden", "v"),
             ("mlp.up", "ffn", "hidden"), ("mlp.down", "hidden", "ffn")]  # fmt: skip
    for i in range(5):
        for role, out, into in table:
            mixed = {
                end: sum(
                    w[role.replace(".", "_")][i, j] * source[f"{role}.{end}", j].read()
                    for j in range(3)
                )
                for end in ("weight", "bias")
            }
            assert torch.allclose(
                target[f"{role}.weight", i].read(), b[out] @ mixed["weight"] @ b[into].T, atol=1e-4
            )
            assert torch.allclose(
                target[f"{role}.bias", i].read(), b[out] @ mixed["bias"], atol=1e-4
            )
        for role in ("norm.attn_post", "norm.mlp_post"):
            mixed_gain = sum(
                w[role.replace(".", "_")][i, j] * source[f"{role}.weight", j].read()
                for j in range(3)
            )
            assert torch.allclose(
                target[f"{role}.weight", i].read(), b["hidden"] @ mixed_gain / ratio, atol=1e-4
            )
    embedding = source.tensors["embed.weight", None].read()
    assert torch.allclose(
        target.tensors["embed.weight", None].read(), embedding @ b["hidden"].T, atol=1e-4
    )


@pytest.mark.parametrize("family", RMS)
def test_orthogonal_maps_are_exact_for_every_b(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path, family, tie_word_embeddings=False)
    method = Ligo(reads="orthogonal", depth="llama_pro", **STILL)
    learned = shaken(Learned(hidden=64, ffn=72, layers=5, method=method), source)
    learned(source).save(tmp_path / "grown")
    given = inputs(tiny(family)[0])
    before, after = logits(source, given), logits(Checkpoint.open(tmp_path / "grown"), given)
    assert float((after - before).abs().max() / before.abs().max()) < 2e-5


@pytest.mark.parametrize("family", RMS)
def test_the_inverse_is_exact_where_columns_are_orthogonal(family: str, tmp_path: Path) -> None:
    source = saved(tmp_path, family, tie_word_embeddings=False)
    hidden = source.sizes["hidden"]
    learned = Learned(hidden=2 * hidden, method=Ligo(reads="inverse", **STILL))
    rotation = (
        0.7
        * torch.linalg.qr(torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(1)))[
            0
        ]
    )
    state = learned.build_grower(source).state_dict() | {"spaces.hidden.rows": rotation}
    given = inputs(tiny(family)[0])
    before, after = logits(source, given), logits(replace(learned, maps=state)(source), given)
    assert float((after - before).abs().max() / before.abs().max()) < 2e-5


def rms(x: torch.Tensor) -> torch.Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 3.0), st.integers(9, 30))
def test_the_inverse_keeps_directions_and_bounds_lengths(seed: int, size: float, new: int) -> None:
    """Whatever C is, a norm's output read through A is the source's, times a number within B's
    singular values.
    """
    generator = torch.Generator().manual_seed(seed)
    space = AxisMap(
        axes.pad(8, new, "reads"), Ligo(reads="inverse", **STILL), generator, linear=True
    )
    space.keeps_scale = True
    space.rows.data = size * torch.randn(space.rows.shape, generator=generator)
    b, a = (one.detach().double() for one in space())
    x = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    assert torch.allclose(a.T @ b, torch.eye(8, dtype=torch.float64), atol=1e-4)
    through = rms(x @ b.T) @ a * (8 / new) ** 0.5
    times = (through * rms(x)).mean(-1, keepdim=True)
    assert torch.allclose(through, times * rms(x), atol=1e-3)
    values = torch.linalg.svdvals(b)
    assert bool((times >= 0.999 / values[0]).all() and (times <= 1.001 / values[-1]).all())


def rows_for(family: str, count: int = 6, length: int = 16) -> Packed | Images:
    if family in ("vit", "dinov2"):
        generator = torch.Generator().manual_seed(0)
        return Images(torch.randn(count, 3, 15, 15, generator=generator), torch.arange(count) % 7)
    ids = tokens(count, length)
    packed = Packed(
        ids, torch.arange(length).expand_as(ids).contiguous(), torch.zeros(count, dtype=torch.long)
    )
    return replace(packed, mask=4) if family in ARCHITECTURES else packed


def stage_for(family: str, batch: int = 4) -> Stage:
    kind: Any = (
        "image" if family in ("vit", "dinov2") else "mask" if family in ARCHITECTURES else "next"
    )
    return Stage(kind, 1000, 16, batch, precision="float32")


STEPS = 5
FITTED = [
    (family, {})
    for family in ("llama", "gpt2", "gpt_neox", "gemma2", "olmo2", "bert", "roberta", "vit")
]
FITTED += [
    ("qwen3", {"reads": "inverse"}),
    ("mistral", {"reads": "orthogonal"}),
    ("bert", {"heads": "dense"}),
]
FITTED += [
    ("phi3", {"free": "all"}),
    ("gpt2", {"reads": "inverse", "start": "lemon"}),
    ("vit", {"start": "tile"}),
]
FITTED += [
    ("qwen2", {"reads": "inverse", "start": "pad", "live": True, "blur": 0.0}),
    ("gpt2", {"start": "random"}),
]
FITTED += [("bert", {"start": "copy"}), ("llama", {"start": "copy", "reads": "inverse"})]
FITTED += [
    ("mixtral", {}),
    ("mixtral", {"reads": "inverse", "start": "pad", "live": True, "blur": 0.0}),
]


@pytest.mark.parametrize(("family", "options"), FITTED)
def test_fitting_learns_and_folds_into_what_it_learned(
    family: str, options: dict, tmp_path: Path
) -> None:
    source = saved(
        tmp_path, family, **({"tie_word_embeddings": False} if options.get("reads") else {})
    )
    growth = Growth(
        hidden=2 * source.sizes["hidden"], ffn=2 * source.sizes["ffn"], layers=5, width_init="ligo"
    )
    method, stage, rows = Ligo(steps=STEPS, lr=1e-2, **options), stage_for(family), rows_for(family)
    losses: list[float] = []
    learned = fit_maps(
        source,
        growth,
        method,
        stage,
        rows,
        progress=lambda step, steps, row: losses.append(row["loss"]),
    )
    target = learned(source)
    fitting = LigoTrainer(target, learned.build_grower(source), method)
    fitting.grow_weights()
    target.save(tmp_path / "grown")
    given = inputs(tiny(family)[0])
    with torch.no_grad():
        functional = parity.compute_outputs(fitting.model, given)["logits"]
    folded = logits(Checkpoint.open(tmp_path / "grown"), given)
    assert float((functional - folded).abs().max() / folded.abs().max()) <= 1e-6
    before, after = (
        compute_loss(
            modeling.materialize(one(source)),
            stage.kind,
            rows,
            generator=torch.Generator().manual_seed(9),
        ).item()  # type: ignore[arg-type]
        for one in (replace(learned, maps={}), learned)
    )
    assert len(losses) == STEPS and after < before
    assert (
        learned.cost["steps"] == STEPS
        and learned.cost["flops"] > 0
        and 0 < learned.cost["overhead"]
    )


class Killed(Exception):
    """Stands for a kill: nothing runs after it."""


@pytest.mark.parametrize(
    ("family", "options"), [("llama", {"live": True, **STILL}), ("bert", {}), ("mixtral", {})]
)
def test_a_killed_fitting_goes_on_with_the_same_losses(
    family: str, options: dict, tmp_path: Path
) -> None:
    source = saved(tmp_path, family)
    growth = Growth(hidden=2 * source.sizes["hidden"], layers=5, width_init="ligo")
    method, stage, rows, out = (
        Ligo(steps=6, **options),
        stage_for(family),
        rows_for(family),
        tmp_path / "fitting",
    )

    def until(last: int, losses: dict[int, float], **keys: Any) -> Learned:
        def note(step: int, steps: int, row: dict[str, float]) -> None:
            losses[step] = row["loss"]
            if step == last:
                raise Killed

        return fit_maps(source, growth, method, stage, rows, progress=note, **keys)

    whole: dict[int, float] = {}
    learned = until(0, whole)
    first: dict[int, float] = {}
    with pytest.raises(Killed):
        until(4, first, out=out, save_seconds=0.0)
    again: dict[int, float] = {}
    resumed = until(0, again, out=out)
    assert list(again) == [4, 5, 6] and whole == first | again
    assert all(torch.equal(value, resumed.maps[name]) for name, value in learned.maps.items())
    assert {**learned.cost, "seconds": 0} == {**resumed.cost, "seconds": 0} and resumed.cost[
        "seconds"
    ] > 0
    nothing: dict[int, float] = {}
    finished = until(0, nothing, out=out)
    assert not nothing and all(
        torch.equal(value, finished.maps[name]) for name, value in learned.maps.items()
    )
    with pytest.raises(RegraftError, match="holds a run with other settings"):
        fit_maps(source, growth, replace(method, lr=1e-3), stage, rows, out=out)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
def test_grow_goes_on_with_its_fitting_after_a_signal(tmp_path: Path) -> None:
    given = str(save_model(tmp_path / "source"))
    (tmp_path / "text.txt").write_text(
        "\n\n\n".join(f"growing goes on from step {i}" for i in range(200))
    )
    options = json.dumps({"steps": 12, "batch": 4, "length": 16})
    words = [
        "--hidden",
        "72",
        "--width-init",
        "ligo",
        "--data",
        str(tmp_path / "text.txt"),
        "--fit",
        options,
    ]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli(["grow", given, str(whole), *words]) == 0
    command = [sys.executable, "-m", "regraft", "grow", given, str(broken), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    maps, deadline = tmp_path / ".broken.regraft-fitting", time.monotonic() + 300
    while not (maps / RUN).is_dir():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143 and "to resume" in said and not broken.exists()
    assert list(maps.glob(f"{RUN}/stage-0-step-*"))
    assert cli(["grow", given, str(broken), *words]) == 0
    assert not maps.exists()
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("family", "to"), [("llama", "mistral"), ("gpt_neox", "phi")])
def test_maps_are_fitted_behind_a_bridge(family: str, to: str, tmp_path: Path) -> None:
    source = saved(tmp_path, family)
    growth = Growth(
        hidden=source.sizes["hidden"] + 7, layers=5, width_init="ligo", bridge=True
    )  # no multiple of the heads
    losses: list[float] = []
    method = Ligo(steps=8, reads="inverse", **STILL)
    learned = fit_maps(
        source,
        growth,
        method,
        stage_for(family),
        rows_for(family),
        progress=lambda *at: losses.append(at[2]["loss"]),
    )
    growth(source, learned).save(tmp_path / "grown")
    grown = Checkpoint.open(tmp_path / "grown")
    assert (
        grown.config["model_type"] == to
        and grown.layers == 5
        and grown.sizes["hidden"] == growth.hidden
    )
    assert [step["step"] for step in grown.history] == ["Bridge", "Learned"] and len(losses) == 8
    before, after = (
        compute_loss(
            modeling.materialize(one),
            "next",
            rows_for(family),
            generator=torch.Generator().manual_seed(9),
        ).item()
        for one in (growth(source, replace(learned, maps={})), grown)
    )
    assert after < before


def test_micro_batches_learn_what_the_whole_batch_does(tmp_path: Path) -> None:
    source, rows, stage = saved(tmp_path, "llama"), rows_for("llama"), stage_for("llama")
    growth, method = Growth(hidden=72, layers=4, width_init="ligo"), Ligo(steps=3)
    whole, parts = (fit_maps(source, growth, method, stage, rows, micro=micro) for micro in (4, 1))
    for name, value in whole.maps.items():
        assert torch.allclose(value, parts.maps[name], atol=2e-4), name
    assert whole.cost["overhead"] == parts.cost["overhead"]


def test_large_maps_are_mixed_a_layer_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path, "gpt_neox")
    learned = Learned(hidden=144, layers=5, method=Ligo(blur=0.5))
    whole = {key: lazy.read() for key, lazy in learned(source).tensors.items()}
    monkeypatch.setattr("regraft.growth.layer_mixing.MAX_STACKED_ENTRIES", 0)
    for key, lazy in learned(source).tensors.items():
        assert torch.allclose(lazy.read(), whole[key], rtol=1e-5, atol=1e-6), key


def test_no_steps_keep_the_start(tmp_path: Path) -> None:
    source, growth = saved(tmp_path, "llama"), Growth(hidden=72, layers=4, width_init="ligo")
    learned = fit_maps(source, growth, Ligo(steps=0), stage_for("llama"), rows_for("llama"))
    assert furthest(learned(source), growth(source)) == 0.0 and learned.cost["flops"] == 0


@pytest.mark.parametrize(
    ("family", "architecture"), [("bert", "BertModel"), ("llama", None), ("vit", None)]
)
def test_the_command_line_grows_checks_and_says_that_it_is_not_exact(
    family: str, architecture: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path, family, architecture=architecture)
    given, out = str(source.path), str(tmp_path / "out")
    sizes = ["--hidden", str(2 * source.sizes["hidden"]), "--layers", "5"]
    code, said, _ = run(
        capsys, "grow", given, out, *sizes, "--width-init", "ligo", "--fit", '{"steps": 0}'
    )
    assert code == 0 and "Not exact: outputs move" in said
    code, said, _ = run(capsys, "check", given, out, "--json")
    assert code == 0 and json.loads(said)["exact"] is False
    assert lineage.read_lineage(Path(out))["steps"][-1]["arguments"]["method"]["steps"] == 0


def test_the_command_line_fits_behind_a_bridge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = save_model(tmp_path / "source"), tmp_path / "out"
    (tmp_path / "text.txt").write_text(
        "\n\n\n".join(f"a bridge carries maps {i} times" for i in range(60))
    )
    hidden = Checkpoint.open(given).sizes["hidden"] + 7
    words = [
        "--hidden",
        str(hidden),
        "--bridge",
        "--width-init",
        "ligo",
        "--data",
        str(tmp_path / "text.txt"),
    ]
    fitting = '{"steps": 2, "batch": 4, "length": 16}'
    code, said, _ = run(capsys, "grow", str(given), str(out), *words, "--fit", fitting, "--json")
    assert (
        code == 0 and json.loads(said)["step0"] and not (tmp_path / ".out.regraft-fitting").exists()
    )
    code, said, _ = run(capsys, "check", str(given), str(out), "--json")
    assert code == 0 and json.loads(said)["exact"] is False
    assert [step["step"] for step in lineage.read_lineage(out)["steps"]] == ["Bridge", "Learned"]


WRONG = [
    (["--width-init", "ligo"], "give --data PATH"),
    (["--width-init", "ligo", "--fit", '{"stepz": 3}'], "unknown --fit 'stepz'"),
    (
        ["--width-init", "pad", "--data", "x.txt"],
        "--data and --fit are for --width-init ligo, not pad",
    ),
    (["--width-init", "ligo", "--data", "nowhere.txt"], "no text at 'nowhere.txt'"),
    (["--width-init", "ligo", "--data", "text.txt", "--fit", '{"reads": "odd"}'], "odd"),
    (["--width-init", "ligo", "--data", "text.txt", "--fit", '{"steps": "many"}'], "many"),
]


@pytest.mark.parametrize(("flags", "words"), WRONG)
def test_wrong_use_is_one_line(
    flags: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = str(save_model(tmp_path / "source"))
    (tmp_path / "text.txt").write_text("a few words\n" * 20)
    monkeypatch.chdir(tmp_path)
    code, _, said = run(capsys, "grow", given, str(tmp_path / "out"), "--hidden", "72", *flags)
    assert {file.name for file in tmp_path.iterdir()} == {"source", "text.txt"}
    last = said.splitlines()[-1]
    assert code == 2 and words in last and last.startswith("regraft: ") and "Traceback" not in said


def test_a_new_row_begins_as_an_average(tmp_path: Path) -> None:
    grower = Learned(hidden=72, method=Ligo()).build_grower(saved(tmp_path, "llama"))
    b = written(grower.spaces["hidden"])  # type: ignore[arg-type]
    assert (
        torch.equal(b[:36], torch.eye(36))
        and torch.allclose(b.sum(1), torch.ones(72))
        and bool((b >= 0).all())
    )


def test_a_class_that_interleaves_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, plain = saved(tmp_path, "mixtral"), modeling.to_checkpoint_names

    def turned(model: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.flip(0) for name, value in plain(model, values).items()}

    monkeypatch.setattr(modeling, "to_checkpoint_names", turned)
    with pytest.raises(RegraftError, match="in pieces of a larger tensor"):
        fit_maps(source, Growth(ffn=64), Ligo(), stage_for("llama"), rows_for("llama"))


BAD: list[tuple[str, str, Callable[[Checkpoint], Any]]] = [
    ("llama", "smaller than the source's", lambda s: Learned(hidden=18)(s)),
    ("llama", "less than the source's", lambda s: Learned(layers=2)(s)),
    ("llama", "rotary positions of llama keep apart", lambda s: Learned(heads=18, method=Ligo(heads="dense"))(s)),
    ("gpt2", "orthogonal maps need root-mean-square", lambda s: Learned(ffn=60, method=Ligo(reads="orthogonal"))(s)),
    ("llama", "orthogonal maps need", lambda s: Learned(ffn=60, method=Ligo(reads="orthogonal"))(s)),
    ("bert", "idle layers of bert", lambda s: Learned(layers=5, method=Ligo(depth="identity"))(s)),
    ("llama", "no start 'aki'", lambda s: Ligo(start="aki")),
    ("llama", "no depth 'deep'", lambda s: Ligo(depth="deep")),
    ("llama", "no free entries to keep live", lambda s: Ligo(live=True)),
    ("llama", "at least 0", lambda s: Ligo(steps=-1)),
    ("llama", "nothing to grow", lambda s: fit_maps(s, Growth(), Ligo(), stage_for("llama"), rows_for("llama"))),
    ("llama", "has no head for 'image'", lambda s: fit_maps(s, Growth(ffn=60), Ligo(), stage_for("vit"), rows_for("vit"))),
    ("vit", "was given", lambda s: fit_maps(s, Growth(ffn=60), Ligo(), stage_for("vit"), rows_for("llama"))),
    ("llama", "was given", lambda s: fit_maps(s, Growth(ffn=60), Ligo(), stage_for("llama"), rows_for("vit"))),
]  # fmt: skip


@pytest.mark.parametrize(("family", "words", "act"), BAD)
def test_refusals(
    family: str, words: str, act: Callable[[Checkpoint], Any], tmp_path: Path
) -> None:
    tied = {"tie_word_embeddings": True} if family == "llama" else {}
    source = saved(tmp_path, family, **tied)
    with pytest.raises(RegraftError, match=words):
        act(source)
