"""Names and texts from outside do nothing to a terminal, a page or a picture: every verb shows them
escaped, and nothing in them is markup.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.cli import run_main
from helpers.tiny import save_model, write_text
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from regraft.cli.main import main
from regraft.compare.report import escape_markdown
from regraft.errors import NOT_PRINTABLE, first_line, printable
from regraft.io.streams import GuardedStream, PrintableStream
from regraft.progress import PlainConsole, Ticker
from regraft.report import html, plots, tables

NAMES = {
    "markup": r"a[/foo][bold]b[link=x]:smile:$\frac{",
    "escapes": "c\x1b[31m\x1b]0;x\x07\rd\u202e\x9b2J\te",
    "newline": "f\ng",
    "no UTF-8": os.fsdecode(b"h\xff\xfei"),
    "long": "j" * 200,
}
FAST = ["markup", "escapes", "no UTF-8"]


def check_output(name: str, code: int, out: str, err: str) -> None:
    """The command is done or refuses, the name is shown, and no control byte comes through."""
    text = out + err
    assert code in (0, 2), (code, text)
    assert not NOT_PRINTABLE.search(text.replace("\n", "")), repr(text)
    # An error is one line, in which a newline of a name is a blank.
    shown = {printable(name), printable(name.replace("\n", " "))}
    assert any(word in text for word in shown), (name, text)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_model(folder / "model", layers=2)
    write_text(folder / "text.txt")
    return folder


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in FAST else pytest.mark.slow, id=kind) for kind in NAMES],
)
def test_hostile_names_are_shown_as_they_are(
    kind: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = NAMES[kind]
    source, text = tmp_path / f"s{name}", tmp_path / f"t{name}.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(files / "model", source)
    shutil.copy(files / "text.txt", text)
    grown, linear, trained = (tmp_path / f"{letter}{name}" for letter in "glr")
    stage = ["--data", text, "--stage", "next", "--tokens", 128, "--length", 64]

    for words in (
        ["plan", f"{source}-missing"],
        ["grow", source, grown, "--ffn", 80],
        ["linearize", source, linear, "--keep", "0", "--window", 8],
        ["linearize", source, linear],  # exists
        ["train", source, trained, *stage],
        ["train", source, trained, *stage],  # is finished
        ["eval", source, "--data", f"{text}-missing"],
        ["run", tmp_path / f"{name}.yaml", tmp_path / "out"],
        ["generate", f"{source}-missing", name],
        ["bench", f"{source}-missing"],
        ["check", source, f"{linear}-missing"],
    ):
        check_output(name, *run_main(capsys, *words))
    assert all((folder / "config.json").exists() for folder in (grown, linear, trained)) or (
        kind == "no UTF-8"  # a library that reads the tokenizer refuses it
    )


def test_text_of_a_model_keeps_its_lines_and_nothing_else(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regraft.modeling import generate

    def stream(model, tokenizer, prompt, tokens, temperature, seed, chat, tell, _) -> object:
        for piece in ("one\n", "\ttwo\x1b", "[2J\x07"):
            tell(piece)
        return generate.Generation("", 1, 1, 0, 0)

    monkeypatch.setattr(generate, "generate", stream)
    code, out, _ = run_main(capsys, "generate", files / "model", "x")
    assert (code, out) == (0, "one\n\ttwo\\x1b[2J\\x07\n")


@given(st.text())
def test_printable_text_is_what_it_was(text: str) -> None:
    shown = printable(text)
    assert not NOT_PRINTABLE.search(shown)
    assert NOT_PRINTABLE.search(text) or shown == text
    assert printable(shown) == shown


def test_plain_text_of_any_script_stays() -> None:
    for text in ("naïve 模型 مدل \u200c मॉडल 🙂", "a[b] :c: $d$ \\n"):
        assert printable(text) == text


def test_a_console_reads_no_markup() -> None:
    stream = io.StringIO()
    console = PlainConsole(stream)
    name = NAMES["markup"]
    console.print(name, soft_wrap=True)
    console.print(Text("\x1b[2Jfrom a library"))
    console.print(tables.build_table(name, ["head", name], [["x\x1b[1m", name]]))
    told = stream.getvalue()
    assert told.count(name) == 4 and "\x1b" not in told


def test_a_bar_on_a_terminal_escapes_names() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    stream = PrintableStream(GuardedStream(terminal, raises=False))
    with Ticker(stream=stream) as ticker:  # type: ignore[arg-type]
        ticker.start("reading [/x]\x1b]0;title\x07")
        ticker.update(0.5, "[bold]loss\x9b1m")
        ticker.bar.refresh()
    told = terminal.getvalue()
    assert "\x1b]0" not in told and "\x07" not in told and "\x9b" not in told
    assert "[/x]\\x1b" in told


def test_characters_that_an_encoding_lacks_are_escapes() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = GuardedStream(raw, raises=True)
    stream.write("— done\n")
    stream.flush()
    assert raw.buffer.getvalue() == b"\\u2014 done\n"


@pytest.mark.parametrize("name", [*NAMES.values(), "<script>alert(1)</script>", "_x", "$a$ b$"])
def test_pages_and_pictures_show_names_as_text(name: str) -> None:
    row = {"perplexity": 2.0, "kl": 0.1, "windows": 1, "tokens": 9}
    speed = {"length": 64, "batch": 1, "decode_tok_s": 2.0, "prefill_tok_s": 3.0}
    speed |= dict.fromkeys(("state_bytes", "converted_bytes", "kept_bytes", "peak_bytes"), 7)
    cells = [{"from": 0, "to": 8, "perplexity": 2.0, "stderr": 0.1}]
    curve = {"curve": {"flops": [1.0, 2.0], "loss": [3.0, 2.0]}}
    numbers = {
        "eval": row | {"baselines": {name: row}},
        "bench": {name: [speed]},
        "recipe": {"source": name},
        "samples": [{"prompt": name, "teacher": name}],
    }
    page = html.render_page(numbers, [{"stage": 0, "kind": name, "tokens": 1, "loss": 2.0}])
    assert "<script>" not in page

    pictures = [base64.b64decode(found) for found in re.findall(r"base64,([\w+/=]+)", page)]
    pictures.append(plots.plot_positions({name: {"positions": cells}}))
    pictures.append(plots.plot_curves({name: {**curve, "seeds": {"0": curve}}}, "", "flops", "x"))
    for picture in pictures:
        xml.etree.ElementTree.fromstring(picture)
    cell = escape_markdown(f"{name}|x")
    assert "\n" not in cell and "<" not in cell and "\\|x" in cell


def test_a_name_that_is_not_utf8_survives_in_json(tmp_path: Path) -> None:
    from regraft.io.files import read_json, write_json

    value = {"name": NAMES["no UTF-8"], "more": "naïve"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "naïve" in (tmp_path / "x.json").read_text(encoding="utf-8")


def broken_pipe() -> int:
    """A descriptor whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full device")
def test_success_is_the_whole_output(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_onto(target: object, *words: object) -> tuple[int, str]:
        capsys.readouterr()
        with open(target, "w") as stream, monkeypatch.context() as patch:  # type: ignore[call-overload]
            patch.setattr(sys, "stdout", stream)
            code = main([str(word) for word in words])
        return code, capsys.readouterr().err

    out = tmp_path / "grown"
    grow = ("grow", files / "model", out, "--ffn", 80)
    code, err = run_onto("/dev/full", "plan", files / "model")
    assert code == 2 and "standard output (No space left" in err
    code, err = run_onto("/dev/full", *grow)
    assert code == 0 and (out / "config.json").exists() and "is written; its summary" in err
    # JSON that was asked for is a part of the result.
    assert run_onto("/dev/full", *grow, "--overwrite", "--json")[0] == 2

    # A reader that has gone needs no word.
    assert run_onto(broken_pipe(), "plan", files / "model") == (141, "")
    assert run_onto(broken_pipe(), "generate", files / "model", "x", "--tokens", 2)[0] == 141
    shutil.rmtree(out)
    assert run_onto(broken_pipe(), *grow)[0] == 0 and (out / "config.json").exists()


def test_work_goes_on_when_nobody_reads_what_it_says(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(broken_pipe(), "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["grow", str(files / "model"), str(tmp_path / "out"), "--ffn", "80"]) == 0
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("--version", 0, ""),
        ("--version >/dev/full", 2, "standard output (No space"),
        ("--help >/dev/full", 2, ""),
        ("--version >&-", 2, "standard output (it is closed)"),
        ("plann 2>/dev/full", 2, ""),
        ("--version <&- 2>&-", 0, ""),
        ("plan <&- >&- 2>&-", 2, ""),
    ],
)
def test_exit_codes_without_streams(command: str, code: int, says: str) -> None:
    line = f"exec {sys.executable} -m regraft {command}"
    done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code and says in done.stderr, done.stderr


def test_files_get_no_number_of_a_closed_stream() -> None:
    program = (
        "from regraft.io.streams import open_missing_descriptors as act; act();"
        "import os; raise SystemExit(os.open('/dev/null', os.O_RDONLY) < 3)"
    )
    line = f'exec {sys.executable} -c "{program}" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", line], cwd=ROOT).returncode == 0


def test_the_first_line_has_what_it_announces() -> None:
    assert (
        first_line(ValueError("invalid:\n\n  layers is 3\nmore"))
        == "ValueError: invalid: layers is 3"
    )
    assert first_line(ValueError("one\ntwo")) == "ValueError: one"
    assert first_line(ValueError()) == "ValueError"
