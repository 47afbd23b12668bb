"""The command line called in this process: its exit code, its output, the one line of a refusal."""

from __future__ import annotations

import json

from regraft.cli import main as cli


def run_main(capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def refused(capsys, *words: object) -> str:
    """The one line of a refusal; checks the rest of the contract."""
    code, out, err = run_main(capsys, *words)
    assert code == 2 and out == "", (code, out)
    lines = err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("regraft: "), err
    return lines[0]


def as_json(capsys, *words: object) -> dict:
    code, out, _ = run_main(capsys, *words, "--json")
    assert code == 0
    return json.loads(out)
