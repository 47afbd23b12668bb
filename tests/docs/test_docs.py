"""The documentation is true: commands parse, names import, links resolve, diffs apply, the first pages run."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from helpers.tiny import save_model, write_text

import regraft
from regraft.cli.main import main
from regraft.cli.parser import VERBS, build_verb_parser, parse
from regraft.compare.recipe import Comparison
from regraft.recipes import schema

DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for page in DOCS.rglob("*.md") if "tools" not in page.parts)]
)
HISTORY = {DOCS / "log.md", ROOT / "CHANGELOG.md"}  # they say what names were
START = [DOCS / "start" / "linearize.md", DOCS / "start" / "grow.md"]
EXAMPLES = {"family": "vaultgemma", "step": "truncate", "mixer": "elu"}
LAWS = {  # a part of the laws that the pages name, so that a test of them takes seconds
    "family": ["tests/families/test_every_family.py"],
    "step": ["tests/growth/test_truncate.py"],
    "mixer": ["tests/mixers/test_mixers.py", "tests/mixers/test_linear.py"],
}
SMALL = {
    "768": "48",
    "2048": "64",
    "36": "6",
    "24576": "2048",
}  # sizes of the pages on a tiny model
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)
LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")
NOT_SHELL = ("python", "yaml", "diff", "toml", "text")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def fences(page: Path, *languages: str) -> list[str]:
    """Code blocks of some languages."""
    return [body for language, body in FENCE.findall(read(page)) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of every regraft command in a page's code blocks, behind torchrun or srun, too."""
    for language, body in FENCE.findall(read(page)):
        if language in NOT_SHELL:
            continue
        for line in body.replace("\\\n", " ").splitlines():
            if re.match(r"(\S*/)?(regraft|torchrun|srun|python)\s", line) and "regraft" in line:
                words = shlex.split(line, comments=True)
                if "regraft" in words:
                    yield words[words.index("regraft") + 1 :]


def inline_commands(page: Path) -> Iterator[list[str]]:
    """The same in the text, where commands may be parts."""
    text = FENCE.sub("", read(page))
    for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", text):
        code = " ".join(code.split())
        if code.startswith("regraft ") and code.split()[1] in VERBS:
            yield shlex.split(code)[1:]


def slugs(text: str) -> set[str]:
    """Anchors of a page: its headings as the site and GitHub name them, and explicit ones."""
    found = set(re.findall(r'<a id="([^"]+)"', text))
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        plain = re.sub(r"[^\w\s-]", "", plain)
        found |= {re.sub(r"[\s]+", "-", plain), re.sub(r"[-\s]+", "-", plain)}
    return found


@pytest.fixture(scope="module")
def generated() -> set[Path]:
    """Pages that exist only while the site is built."""
    sys.path.insert(0, str(DOCS / "tools"))
    import generate_reference

    return {DOCS / path for path in generate_reference.PAGES}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_ones_that_the_parser_takes(page: Path) -> None:
    for words in commands(page):
        if words[0] in ("--help", "--version") or "--help" in words:
            continue
        verb, arguments = parse(words)
        recipe = {"run": schema.Recipe, "compare": Comparison}.get(verb)
        if recipe is not None:
            known = {field.name for field in dataclasses.fields(recipe)}
            assert {key.split(".")[0] for key in arguments["overrides"]} <= known, words


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=name)
def test_commands_in_the_text_have_flags_that_exist(page: Path) -> None:
    for words in inline_commands(page):
        verb = VERBS[words[0]]
        parser = build_verb_parser(verb)
        known = {flag for action in parser._actions for flag in action.option_strings}
        known = {flag.replace("_", "-") for flag in known}
        said = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert verb.takes_overrides or said <= known, words


def test_there_are_commands_and_each_verb_is_shown() -> None:
    shown = {words[0] for page in PAGES for words in commands(page)}
    assert set(VERBS) - {"demo"} <= shown


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_make_targets_of_pages_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M))
    for language, body in FENCE.findall(read(page)):
        made = re.findall(r"^make ([a-z-]+)", body, re.M) if language not in NOT_SHELL else []
        assert set(made) <= targets
    if page in HISTORY:
        return
    for path in re.findall(
        r"\b((?:benchmarks|tests|regraft|docs)/[\w./-]+\.(?:py|yaml|md))", read(page)
    ):
        written = "".join(fences(page, "diff"))
        assert (ROOT / path).exists() or path in written or "NAME" in path, path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names_in_python_blocks_import(page: Path) -> None:
    for body in fences(page, "python"):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(compile(ast.Module([node], []), name(page), "exec"), {})
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id == "regraft"
            ):
                assert hasattr(regraft, node.attr), f"regraft.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path, generated: set[Path]) -> None:
    text = FENCE.sub("", read(page))
    for link in (one or other for one, other in LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = DOCS in page.parents
        assert target.exists() or (inside and target in generated), link
        assert not inside or not path or DOCS in target.parents, f"{link} leaves the site"
        if anchor and target.suffix == ".md" and target.exists():
            assert anchor in slugs(read(target)), link


def test_docstrings_point_at_lemmas_and_sections_that_exist() -> None:
    pattern = r"docs/concepts/(\w+)\.md(?:,\s+(?:\[?)(L\d+|section \d+))?"
    for file in sorted((ROOT / "regraft").rglob("*.py")):
        for page, place in re.findall(pattern, " ".join(read(file).split())):
            anchors = slugs(read(DOCS / "concepts" / f"{page}.md"))
            assert not place or place.replace(" ", "-") in anchors, (file, page, place)


def test_recipes_shown_are_recipes() -> None:
    shown = fences(DOCS / "guides" / "recipes.md", "yaml")
    assert len(shown) == 2
    for text in shown:
        fields = schema.expand_method(yaml.safe_load(text))
        assert schema.build(fields)


def test_every_extra_is_documented() -> None:
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    text = read(DOCS / "start" / "install.md").split("## Extras")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.M)) == set(project["optional-dependencies"])


def test_pages_are_in_the_navigation_and_lines_are_short(generated: set[Path]) -> None:
    navigation = read(ROOT / "mkdocs.yml").split("\nnav:")[1]
    listed = {DOCS / path for path in re.findall(r"([\w/]+\.md)", navigation)}
    assert listed == {page for page in PAGES if DOCS in page.parents} | generated
    for page in (page for page in PAGES if page.parent != DOCS):
        for line in FENCE.sub("", read(page)).splitlines():
            assert len(line) <= 122 or line.startswith("|"), f"{name(page)}: {line}"


@pytest.mark.parametrize("example", EXAMPLES)
def test_diffs_of_worked_examples_apply(example: str) -> None:
    (diff,) = fences(DOCS / "contributing" / f"{example}.md", "diff")
    checked = subprocess.run(
        ["git", "apply", "--check", "-"], input=diff, text=True, capture_output=True, cwd=ROOT
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
def test_worked_examples_hold_the_laws(tmp_path: Path) -> None:
    """In a copy with all diffs, the package's own laws for what each adds."""
    for folder in ("regraft", "tests"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in ("docs/tools", "benchmarks"):
        (tmp_path / folder).mkdir(parents=True)
    for example in EXAMPLES:
        (diff,) = fences(DOCS / "contributing" / f"{example}.md", "diff")
        subprocess.run(["git", "apply", "-"], input=diff, text=True, check=True, cwd=tmp_path)

    words = ["-v", "-n", "0", "-p", "no:cacheprovider", "-k", " or ".join(EXAMPLES.values())]
    words += [file for files in LAWS.values() for file in files]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    passed = re.findall(r"^(tests/.+) PASSED", ran.stdout, re.M)
    for example, added in EXAMPLES.items():
        laws = [line for line in passed if line.startswith(tuple(LAWS[example]))]
        assert any(added in line for line in laws), example


def shrink(text: str) -> str:
    """A page's code with sizes that suit a tiny model."""
    return re.sub(r"\d+", lambda found: SMALL.get(found[0], found[0]), text)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_interpreter")
@pytest.mark.parametrize("page", START, ids=name)
def test_the_first_pages_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command and every Python block of a page, in order, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "SOURCE")
    write_text(tmp_path / "heldout.txt")
    write_text(tmp_path / "text.txt", documents=40)
    lines = (tmp_path / "text.txt").read_text(encoding="utf-8").split("\n\n\n")
    text = "\n".join(f'{{"text": "{line}"}}' for line in lines)
    (tmp_path / "text.jsonl").write_text(text, encoding="utf-8")

    ran = 0
    for language, body in FENCE.findall(read(page)):
        if language == "python":
            if "save(" in body:  # what the command before it wrote
                shutil.rmtree(tmp_path / "GROWN")
            exec(compile(shrink(body), name(page), "exec"), {})
        elif language == "":
            for words in (shlex.split(line, comments=True) for line in shrink(body).splitlines()):
                assert main(words[1:]) == 0, (words, capsys.readouterr().err)
                ran += 1
    assert ran >= 4


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None,
    reason="needs the extra docs",
)
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr[-3000:]
    assert (tmp_path / "reference" / "cli.html").is_file()
    pages = list(tmp_path.rglob("*.html"))
    fetched = [
        found
        for page in pages
        for found in re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', read(page)
        )
    ]
    assert not fetched, f"pages fetch {set(fetched)} when they are read"
