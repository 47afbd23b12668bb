"""Which model types of transformers regraft can take: every decoder in tiny form, as inferred.

    python benchmarks/reach.py            every decoder that transformers has
    python benchmarks/reach.py granite olmo3

A row says which axes of a type are proven to grow (Deepen and Widen against the logits of the stock
class) and whether its attention can be linearized. Types with a written table are left out. A line under the row says why something is closed. About a second a type on one core.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections import Counter
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
COLUMNS = ("depth", "hidden", "ffn", "kv", "group", "dim", "attention")
LIMIT = 60  # seconds of processor time a type


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
        closed = find_table({"model_type": family}).closed
    except RegraftError as error:
        return [], {"refused": str(error)}
    except Exception as error:  # a bug of regraft
        return [], {"BUG": first_line(error)}
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return [name for name in COLUMNS if name not in closed], dict(closed)


def main(families: list[str]) -> None:
    """Print a row for each type, then how many types each column works for."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["REGRAFT_CACHE"] = cache
        for family in families:
            start = time.process_time()
            works, closed = try_type(family)
            counts.update(works)
            counts["layers and ffn"] += {"depth", "ffn"} <= set(works)
            counts["layers, ffn and hidden"] += {"depth", "ffn", "hidden"} <= set(works)
            seconds = time.process_time() - start
            row = " ".join(f"{name if name in works else '-':<9}" for name in COLUMNS)
            print(f"{family:<28} {row} {seconds:4.1f} s", flush=True)
            for why in dict.fromkeys(closed.values()):
                names = [name for name, reason in closed.items() if reason == why]
                print(f"    {', '.join(names)}: {why}", flush=True)
    print(f"\n{len(families)} types:", ", ".join(f"{k} {n}" for k, n in counts.items()))


if __name__ == "__main__":
    main(sys.argv[1:] or list_decoders())
