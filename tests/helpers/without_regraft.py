"""A process that loads saved models by the code beside them, where regraft cannot be imported.

Run: python without_regraft.py FOLDER. FOLDER holds `cases.json`, which says how each model is loaded,
and `expected.pt`, its logits. What went wrong, by name, goes to
`failed.json`.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers.models.llama.modeling_llama  # imports most, so that the forks need not

FOLDER = Path(sys.argv[1])
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())
EXPECTED: dict[str, torch.Tensor] = torch.load(FOLDER / "expected.pt")
IDS = torch.arange(3, 33).unsqueeze(0)
# Models whose code differs, so that each has a copy of its own.
COPIES = ("first", "second", "other host")
failed: dict[str, str] = {}


def attempt(name: str, act: Callable[..., Any], *arguments: Any) -> Any:
    """What `act` returns; None, and an entry in `failed`, when it raises."""
    try:
        return act(*arguments)
    except Exception:
        failed[name] = traceback.format_exc(limit=-3)


def load(name: str, folder: Path | None = None, **options: Any) -> Any:
    case = CASES[name]
    auto = getattr(transformers, case["auto"])
    options = {"trust_remote_code": True, "dtype": torch.float32, **case["options"], **options}
    return auto.from_pretrained(folder or FOLDER / case["folder"], **options).eval()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    error = float((found - wanted).abs().max() / wanted.abs().max())
    assert error < 1e-5, error


@torch.no_grad()
def check(name: str, model: Any, caches: bool = True) -> None:
    """Logits are those expected; a model that writes does so with every kind of cache."""
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    close(model(IDS).logits, EXPECTED[name])
    if not model.can_generate() or not caches:
        return

    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(IDS, use_cache=False, **greedy)
    for options in ({}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(IDS, **greedy, **options), wanted), options
    cache = transformers.DynamicCache(config=model.config)
    cache.activate_past_recording()
    for piece in (IDS[:, :20], IDS[:, 20:25]):
        model(piece, cache=cache, use_cache=True)
    cache.crop(-5)
    close(model(IDS[:, 20:], cache=cache, use_cache=True).logits, EXPECTED[name][:, 20:])


def check_again(name: str, model: Any) -> None:
    """What was loaded by remote code is saved with its code, copied and pickled."""
    folder = FOLDER / "again" / name
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["auto_map"], "no auto_map"
    check(name, load(name, folder))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check(name, other, caches=False)


# Imports, in an order: after them the stock auto classes find regraft's own class.
AUTO = "from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer"
MODELING = "import regraft.modeling"
ALONE = """
import sys, regraft
from transformers import CONFIG_MAPPING
assert "regraft" not in CONFIG_MAPPING and "regraft.modeling" not in sys.modules
"""
ORDERS = (
    (AUTO, MODELING),
    (MODELING, AUTO),
    (ALONE, AUTO, MODELING),
    (AUTO, "from regraft.modeling.loading import slots"),
    (ALONE, "import regraft; regraft.load"),
    (AUTO, ALONE, "import regraft; regraft.flops"),
    (MODELING, AUTO, "import importlib; importlib.reload(sys.modules['regraft.modeling'])"),
)


def check_order(lines: tuple[str, ...]) -> None:
    for line in lines:
        exec(line, {"sys": sys})
    from regraft.modeling import RegraftForCausalLM

    model = load("first", trust_remote_code=False)
    assert isinstance(model, RegraftForCausalLM)
    close(model(IDS).logits.detach(), EXPECTED["first"])


def check_order_in_a_fork(lines: tuple[str, ...]) -> None:
    if (child := os.fork()) == 0:
        try:
            check_order(lines)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, "see stderr"


def main() -> None:
    torch.set_num_threads(1)
    for lines in ORDERS:
        attempt(str(lines), check_order_in_a_fork, lines)

    sys.modules["regraft"] = None  # type: ignore[assignment]  # an import fails
    models: dict[str, Any] = {}
    for name in CASES:
        models[name] = attempt(f"load {name}", load, name)
        # Those before it are as they were.
        for other in COPIES if name in COPIES else (name,):
            if models.get(other) is not None:
                attempt(f"{other} after {name}", check, other, models[other], name in COPIES)
    for name in ("first", "classifier", "images"):
        attempt(f"again {name}", check_again, name, models[name])

    if "jaxtyping" in sys.modules:
        failed["imports"] = "the code beside a model has imported jaxtyping"
    # Beside regraft, imported late: both are right, and regraft's own class is used from now on.
    del sys.modules["regraft"]
    attempt("regraft late", check_order, (MODELING,))
    attempt("first after regraft", check, "first", models["first"])
    (FOLDER / "failed.json").write_text(json.dumps(failed))


main()
