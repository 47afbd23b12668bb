"""Which model types of transformers regraft can take: every decoder in tiny form, as inferred.

    python benchmarks/reach.py            every decoder that transformers has
    python benchmarks/reach.py granite olmo3
    python benchmarks/reach.py --page docs/reach.md

A row says which axes of a type are proven to grow (Deepen and Widen against the logits of the stock
class) and whether its attention can be linearized. Types with a written table are left out. A line under the row says why something is closed. About a second a type on one core.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
COLUMNS = ("depth", "hidden", "ffn", "kv", "group", "dim", "attention")
SHOWN = {"depth": "layers", "hidden": "hidden", "ffn": "ffn", "kv": "key/value heads",
         "group": "queries per head", "dim": "head dim", "attention": "linearize"}  # fmt: skip
LIMIT = 60  # seconds of processor time a type
# Where the class has no default, or one without softmax attention.
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 8, "num_hidden_layers": 24},
}


def list_decoders() -> list[str]:
    """The model types with a decoder alone: no encoders, none with several parts."""
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from regraft.core.anatomy import list_families

    others = {
        *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    return [
        name
        for name in sorted({*auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES} - others - {*list_families()})
        if "text_config" not in (getattr(CONFIG_MAPPING[name], "sub_configs", None) or {})
    ]


def try_type(family: str) -> tuple[list[str], dict[str, str]]:
    """(open columns, reasons of the others) of a type."""
    from regraft.errors import RegraftError, first_line
    from regraft.families.inference.inferred import find_table

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        closed = find_table({"model_type": family} | SETTINGS.get(family, {})).closed
    except RegraftError as error:
        return [], {"refused": str(error)}
    except Exception as error:  # a bug of regraft
        return [], {"BUG": first_line(error)}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return [name for name in COLUMNS if name not in closed], dict(closed)


def try_all(families: list[str]) -> dict[str, tuple[list[str], dict[str, str]]]:
    """What `try_type` gives for every type, printed as it is found."""
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["REGRAFT_CACHE"] = cache
        for family in families:
            start = time.process_time()
            works, closed = found[family] = try_type(family)
            seconds = time.process_time() - start
            row = " ".join(f"{name if name in works else '-':<9}" for name in COLUMNS)
            print(f"{family:<28} {row} {seconds:4.1f} s", flush=True)
            for why, names in group_reasons(closed).items():
                print(f"    {', '.join(names)}: {why}", flush=True)
    return found


def group_reasons(closed: dict[str, str]) -> dict[str, list[str]]:
    """Reason -> the columns that it closes, both in the order of the table."""
    groups: dict[str, list[str]] = {}
    for name in (*COLUMNS, *sorted(closed.keys() - {*COLUMNS})):
        if name in closed:
            groups.setdefault(closed[name], []).append(name)
    return groups


def count(found: dict[str, tuple[list[str], dict[str, str]]]) -> str:
    """How many types each column works for."""
    counts: Counter[str] = Counter()
    for works, _ in found.values():
        counts.update(works)
        counts["layers and ffn"] += {"depth", "ffn"} <= set(works)
        counts["layers, ffn and hidden"] += {"depth", "ffn", "hidden"} <= set(works)
    return f"{len(found)} types: " + ", ".join(f"{key} {n}" for key, n in counts.items())


def write_page(found: dict[str, tuple[list[str], dict[str, str]]], file: str) -> None:
    """The results as a page."""
    import transformers

    heads = [SHOWN[name] for name in COLUMNS]
    lines = [
        "# Types without a table",
        "",
        f"What `python benchmarks/reach.py --page {file}` found with transformers"
        f" {transformers.__version__}: the table of each type is",
        "[inferred](guides/any_family.md) and every column proven on a tiny model with the class's"
        " own default settings,",
        f"with kinds of layers from `SETTINGS` where these say little ({', '.join(SETTINGS)}).",
        "Another config of the same type may open more or less; `regraft anatomy SOURCE` says.",
        "",
        count(found) + ".",
        "",
        "| type | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for family, (works, _) in found.items():
        cells = ("yes" if name in works else "" for name in COLUMNS)
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    lines += ["", "## Why columns are closed", ""]
    for family, (_, closed) in found.items():
        for why, names in group_reasons(closed).items():
            what = ", ".join(SHOWN.get(name, name) for name in names)
            lines.append(f"- {family}, {what}: {why.replace('|', '/').replace('<', '&lt;')}")
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Print a row for each type, then how many types each column works for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="all decoders without a table if none is given")
    parser.add_argument("--page", help="write the results to this file too")
    given = parser.parse_args()
    found = try_all(given.types or list_decoders())
    print(f"\n{count(found)}")
    if given.page:
        write_page(found, given.page)


if __name__ == "__main__":
    main()
