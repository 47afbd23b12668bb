"""Nothing from a recipe, model, text, cache or checkpoint is imported, called or unpickled."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.cli import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.compare import recipe as comparison
from regraft.errors import RegraftError
from regraft.io.typed import CLASS_KEYS
from regraft.io.yaml_loader import MAX_DEPTH, MAX_VALUES, parse_yaml
from regraft.recipes import schema

MODULE = "regraft_never_imported"
RECIPE: dict[str, Any] = {
    "source": "model",
    "train": [{"path": "text.txt"}],
    "remix": {"mixer": "gla", "options": {}, "scores": {}},
    "stages": [{"kind": "distil", "tokens": 4096, "lit": {"window": 5}}],
    "measure": {"tasks": []},
}
COMPARISON: dict[str, Any] = {
    "task": "next",
    "source": {"model_type": "llama"},
    "others": {"big": {"hidden_size": 8}},
    "pretrain": {"tokens": 4096},
    "train": {"tokens": 4096},
    "target": {"layers": 4},
    "arms": [
        {"name": "plain", "scratch": True},
        {"name": "grown", "grow": {}, "legs": [{"layers": "bottom:1", "share": 0.1}]},
        {"name": "learned", "ligo": {"steps": 3}},
        {"name": "linear", "linear": {"options": {}, "scores": {}, "stages": [{"lit": {}}]}},
    ],
}
LOADERS = {"run": (schema.load, RECIPE), "compare": (comparison.load, COMPARISON)}


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once the module MODULE, or a class or function of it, was used."""
    folder, sprung = tmp_path / "trap", tmp_path / "sprung"
    folder.mkdir()
    code = f"open({str(sprung)!r}, 'a').write('x')\n"
    (folder / f"{MODULE}.py").write_text(
        f"{code}class Evil:\n    def __init__(self, *a, **k): {code}def run(*a, **k): {code}"
    )
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    return sprung


def mappings(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of all mappings in plain data, and of the values in them."""
    found = [place] if place else []
    rows: Any = ()
    if isinstance(value, dict):
        rows = value.items()
    elif isinstance(value, list):
        rows = enumerate(value)
    for key, part in rows:
        found += mappings(part, (*place, key))
    return found


def put(fields: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of plain data with one value replaced."""
    copy = json.loads(json.dumps(fields))
    target = copy
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    return copy


ATTACKS = [
    {"class_path": f"{MODULE}.Evil", "init_args": {"x": 1}},
    {"class_path": f"{MODULE}.run"},
    {"class_path": f"{MODULE}.Evil", "dict_kwargs": {"x": 1}},
    {"__path__": f"{MODULE}.Evil", "class_path": f"{MODULE}.Evil"},
    {"deep": [{"er": {"class_path": f"{MODULE}.Evil"}}]},
]


@pytest.mark.parametrize("verb", LOADERS)
@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_a_recipe_names_no_class_anywhere(
    verb: str, attack: dict[str, Any], tmp_path: Path, trap: Path
) -> None:
    load, fields = LOADERS[verb]
    file = tmp_path / "recipe.yaml"
    for place in mappings(fields):
        file.write_text(yaml.safe_dump(put(fields, place, attack)))
        with pytest.raises(RegraftError, match="would name code to run"):
            load(str(file), {})

        # The same as an override, as text in YAML, and as a bare dotted path of a class.
        file.write_text(yaml.safe_dump(fields))
        with pytest.raises(RegraftError):
            load(str(file), {".".join(map(str, place)): json.dumps(attack)})
        for text in (json.dumps(attack), f"{MODULE}.Evil"):
            file.write_text(yaml.safe_dump(put(fields, place, text)))
            try:
                load(str(file), {})
            except RegraftError as error:
                assert "\n" not in str(error)
    assert not trap.exists() and MODULE not in sys.modules


def test_flags_name_no_class(tmp_path: Path, trap: Path, capsys: Any) -> None:
    for attack in ATTACKS:
        for verb, flag in [
            ("linearize", "--options"),
            ("grow", "--fit"),
            ("train", "--stage-options"),
            ("plan", "--options"),
        ]:
            words = [tmp_path] if verb == "plan" else [tmp_path, tmp_path / "out"]
            line = refused(capsys, verb, *words, flag, json.dumps(attack))
            assert "would name code to run" in line
    assert not trap.exists() and MODULE not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        f"source: !!python/object/apply:{MODULE}.run []",
        f"source: !!python/name:{MODULE}.Evil ''",
        f"source: !!python/module:{MODULE} ''",
        f"!!python/object/new:{MODULE}.Evil {{}}",
        "source: !!binary aGVsbG8=",
        "source: !!set {a, b}",
        "source: !!timestamp 2020-01-01",
        "train: !!omap [a: 1]",
        "source: !custom x",
        "? [a, b]\n: 1",
        "a: [",
        "a: *b",
        "\x00",
        "a: 1: 2",
    ],
)
def test_yaml_holds_plain_values_only(text: str, tmp_path: Path, trap: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    for load, _ in LOADERS.values():
        with pytest.raises(RegraftError) as caught:
            load(str(file), {})
        assert "\n" not in str(caught.value)
    assert not trap.exists() and MODULE not in sys.modules


def laughs(levels: int) -> str:
    """Nested aliases: 10 to the power of `levels` values."""
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        rows.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(rows)


BOMBS = {
    "laughs": laughs(12),
    "merged": "a: &a {x: 1}\n" + "\n".join(f"b{i}: &a {{<<: [*a, *a, *a, *a]}}" for i in range(40)),
    "itself": "a: &a [*a]",
    "deep": "[" * 5000 + "]" * 5000,
    "deep aliases": "a0: &a0 [x]\n"
    + "\n".join(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 3 * MAX_DEPTH)),
    "many": "- x\n" * (MAX_VALUES + 1),
    "large": "#" * 2_000_000,
    "digits": "a: " + "9" * 500_000,
    "sexagesimal": "a: 1" + ":59" * 200_000,
    "sexagesimal point": "a: 1" + ":59" * 200_000 + ".0",
    "hexadecimal": "a: 0x" + "f" * 500_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(BOMBS[name])
    with pytest.raises(RegraftError) as caught:
        schema.load(str(file), {})
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_bombs_in_flags_and_overrides_are_refused(tmp_path: Path, capsys: Any) -> None:
    bomb = "{" + laughs(12).replace("\n", ", ") + "}"
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    assert "aliases" in refused(capsys, "run", file, tmp_path / "out", "--remix.options", bomb)
    for flag in ("--options", "--mixer", "--window"):
        assert "aliases" in refused(capsys, "linearize", "m", tmp_path / "out", flag, bomb)


def test_aliases_and_merges_of_honest_recipes_stay() -> None:
    text = "a: &a {lr_new: 1e-3, x: .5}\nb: {<<: *a, x: 2}\nc: [*a, *a]\nd: 2020-01-01\ne: 0x10"
    a = {"lr_new": 1e-3, "x": 0.5}
    assert parse_yaml(text, "it") == {
        "a": a,
        "b": {"lr_new": 1e-3, "x": 2},
        "c": [a, a],
        "d": "2020-01-01",
        "e": 16,
    }


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))),
    lambda part: st.lists(part, max_size=4)
    | st.dictionaries(
        st.text("abcdef_", min_size=1).filter(lambda key: key not in CLASS_KEYS), part, max_size=4
    ),
    max_leaves=20,
)  # fmt: skip


@settings(deadline=None)
@given(value=PLAIN)
def test_plain_values_survive_yaml_and_json(value: Any) -> None:
    for text in (yaml.safe_dump(value, allow_unicode=True), json.dumps(value, ensure_ascii=False)):
        assert parse_yaml(text, "it") == value


@settings(deadline=None, max_examples=150)
@given(
    verb=st.sampled_from(sorted(LOADERS)), data=st.data(), value=PLAIN | st.just([{"tokens": "x"}])
)
def test_any_value_anywhere_is_taken_or_refused_in_one_line(
    verb: str, data: st.DataObject, value: Any
) -> None:
    build, fields = (
        (schema.build, RECIPE)
        if verb == "run"
        else (lambda fields: schema.build(fields, "it", comparison.Comparison), COMPARISON)
    )
    place = data.draw(st.sampled_from(mappings(fields)))
    try:
        build(put(fields, place, value))
    except RegraftError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link to fifo"])
def test_a_recipe_is_a_regular_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    if kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        os.mkfifo(tmp_path / "pipe" if "link" in kind else file)
        if "link" in kind:
            file.symlink_to(tmp_path / "pipe")
    for load, _ in LOADERS.values():
        with pytest.raises(RegraftError, match="give a regular file"):
            load(str(file), {})
