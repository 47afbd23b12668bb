"""llama.cpp beside transformers: logits of whole rows and token by token, and greedy text."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ... import modeling
from ...errors import RegraftError
from .architecture import ENGINE

CELL = 0  # ggml's number of float32, for the cache
TOKENS = 200
BOUND = 1e-4  # of the largest logit
OWN = 2  # times what the stock class itself differs by between a whole row and single tokens
ROUNDED = 5e-3  # where llama.cpp computes a little differently (`fit.find_notes`)


class EngineEquality(TypedDict):
    """How near llama.cpp is to the stock class."""

    engine: str
    tokens: int
    difference: float  # of the logits of a whole row, as a share of the largest
    step_difference: float  # the same, token by token
    argmax: float  # share of positions where both have the same best token
    step_argmax: float  # the same, token by token
    # What the stock class differs by between a whole row and single tokens; None: not needed.
    own_difference: float | None


def import_engine() -> Any:
    """The package llama_cpp; RegraftError when it is missing, or older than the proven release."""
    try:
        import llama_cpp
    except (ImportError, OSError) as error:
        reason = str(error).splitlines()[0][:100]
        raise RegraftError(
            f"--check-engine needs llama-cpp-python {ENGINE} ({reason}): pip install"
            " 'regraft[serve]'"
        ) from error
    found = importlib.metadata.version("llama_cpp_python")
    if [int(part) for part in found.split(".")[:3]] < [int(part) for part in ENGINE.split(".")]:
        raise RegraftError(
            f"--check-engine needs llama-cpp-python {ENGINE}, this is {found}: pip install"
            " 'regraft[serve]'"
        )
    return llama_cpp


def open_engine(file: Path, length: int, batch: int = 64, **options: Any) -> Any:
    """A model of llama.cpp that keeps the logits of every token, with a float32 cache.

    RegraftError when llama.cpp cannot open the file.
    """
    llama_cpp = import_engine()
    settings: dict[str, Any] = {
        "n_ctx": length,
        "n_batch": batch,
        "n_ubatch": batch,
        "logits_all": True,
        "verbose": False,
        "type_k": CELL,
        "type_v": CELL,
        "flash_attn": False,
        "swa_full": False,  # rings, as llama-server keeps them
        **options,
    }
    try:
        return llama_cpp.Llama(str(file), **settings)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise RegraftError(
            f"llama.cpp {ENGINE} cannot open '{file.name}' ({str(error)[:100]}): report this"
        ) from error


def read_logits(engine: Any, ids: list[int], step: int) -> Tensor:
    """Logits (time, vocabulary) of a text, given `step` tokens at a time."""
    engine.reset()
    for begin in range(0, len(ids), step):
        engine.eval(ids[begin : begin + step])
    return torch.from_numpy(engine.scores[: len(ids)].copy())


@torch.no_grad()
def compare_engine(file: Path, stock: PreTrainedModel, ids: Tensor, bound: float) -> EngineEquality:
    """Run llama.cpp beside the stock class on the same ids.

    Args:
        file: in float32.
        stock: the class of transformers, in float32.
        ids: (1, time).
        bound: of the difference, as a share of the largest logit. Where the class itself gives for
            single tokens what it does not give for a whole row, twice that difference is allowed:
            float32 tells no better.

    RegraftError when they differ by more than the bound, or have other best tokens.
    """
    row = ids[0].tolist()
    engine = open_engine(file, len(row) + 8)
    expected = stock(input_ids=ids, use_cache=False).logits[0]
    largest = expected.abs().max()
    at_once, stepwise = read_logits(engine, row, len(row)), read_logits(engine, row, 1)
    engine.close()

    best = expected.argmax(-1)
    found: EngineEquality = {
        "engine": f"llama.cpp (llama-cpp-python {ENGINE})",
        "tokens": len(row),
        "difference": float((at_once - expected).abs().max() / largest),
        "step_difference": float((stepwise - expected).abs().max() / largest),
        "argmax": share_of_best(expected, at_once, best),
        "step_argmax": share_of_best(expected, stepwise, best),
        "own_difference": None,
    }
    worst = max(found["difference"], found["step_difference"])
    if worst > bound:
        own = (step_logits(stock, ids) - expected).abs().max() / largest
        found["own_difference"] = float(own)
        bound = max(bound, OWN * float(own))
    near = worst <= bound  # False for NaN
    if not (near and found["argmax"] == found["step_argmax"] == 1):
        raise RegraftError(
            f"llama.cpp and {type(stock).__name__} differ on {len(row)} tokens: logits by"
            f" {found['difference']:.1e} of the largest (token by token"
            f" {found['step_difference']:.1e}), best token equal in {found['argmax']:.1%}:"
            " nothing was published, report this"
        )
    return found


def step_logits(stock: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits (time, vocabulary) of the stock class, given a token at a time.

    Args:
        stock: a causal language model.
        ids: (1, time).
    """
    rows, cache = [], None
    for token in ids.split(1, dim=1):
        out = stock(token, **modeling.cache_kwargs(cache), use_cache=True)
        rows.append(out.logits[0, 0])
        cache = modeling.cache_of(out)
    return torch.stack(rows)


def share_of_best(expected: Tensor, found: Tensor, best: Tensor) -> float:
    """Share of positions whose best token is also the other's, or as good but for rounding."""
    chosen = expected.gather(-1, found.argmax(-1, keepdim=True)).squeeze(-1)
    top = expected.gather(-1, best[:, None]).squeeze(-1)
    tie = (top - chosen) <= 1e-4 * expected.abs().max()
    return float(tie.float().mean())
