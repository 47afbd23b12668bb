"""Quantised GGUF files: q8_0 by the package gguf, q4_k_m by llama.cpp."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ...errors import RegraftError

KINDS = ("q8_0", "q4_k_m")
TOOL = "llama-quantize"
Q4_K_M = 15  # llama.cpp's number of the mixture


def check_kind(kind: str) -> None:
    """RegraftError for a quantisation that does not exist, or whose tool is not installed."""
    if kind not in KINDS:
        raise RegraftError(f"unknown quantisation '{kind:.40}': use one of {', '.join(KINDS)}")
    if kind == "q4_k_m" and find_tool() is None:
        raise RegraftError(
            f"{kind} is quantised by llama.cpp, which is not installed: pip install"
            f" 'regraft[serve]', or put {TOOL} on the PATH; q8_0 needs neither"
        )


def find_tool() -> Any:
    """llama.cpp's quantiser: the library llama_cpp, the path of its program, or None."""
    try:
        import llama_cpp
    except (ImportError, OSError):  # not installed, or built for another machine
        return shutil.which(TOOL)
    return llama_cpp


def quantize_k(source: Path, file: Path) -> None:
    """Quantise a GGUF file to q4_k_m; RegraftError when llama.cpp fails."""
    tool = find_tool()
    if isinstance(tool, str):
        run = [tool, str(source), str(file), "Q4_K_M"]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        failed = done.returncode
    else:
        # It would print a line or two for each tensor.
        silent = tool.llama_log_callback(lambda level, text, data: None)
        tool.llama_log_set(silent, None)
        settings = tool.llama_model_quantize_default_params()
        settings.ftype = Q4_K_M
        failed = tool.llama_model_quantize(
            str(source).encode(), str(file).encode(), ctypes.byref(settings)
        )
        tool.llama_log_set(importlib.import_module("llama_cpp._logger").llama_log_callback, None)
    if failed or not file.is_file():
        raise RegraftError(f"llama.cpp cannot quantise '{source.name}' (code {failed}): use q8_0")
