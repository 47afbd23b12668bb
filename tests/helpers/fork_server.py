"""An interpreter that has imported regraft and forks itself for each command; see `faults.py`.

Run: python -m helpers.fork_server SOCKET
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

# What regraft imports when a verb runs, and what transformers imports when a model is loaded.
LIBRARIES = (
    "jsonargparse",
    "matplotlib.pyplot",
    "safetensors.torch",
    "tokenizers",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "torch.utils.flop_counter",
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.tokenization_utils_tokenizers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "yaml",
)


FIRST = (["grow", "--layers", "3"], ["linearize", "--keep", "0", "--window", "16"])


def import_everything() -> None:
    """Import what commands need, so that forks need not."""
    import torch

    torch.set_num_threads(1)
    import regraft

    names = [module.name for module in pkgutil.walk_packages(regraft.__path__, "regraft.")]
    for name in [*names, *LIBRARIES]:
        if not name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def import_what_a_child_imports(words: list[str]) -> None:
    """Run a command in a fork and import here what it has imported there."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        run_main(words)
        os.write(writer, json.dumps(sorted(sys.modules)).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as stream:
        names = json.load(stream)
    os.waitpid(child, 0)
    for name in names:
        if name not in sys.modules and not name.startswith("__"):
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def warm_up(folder: str) -> None:
    """What is made once in a process and takes long, such as transformers' tables of names. No
    gradients: autograd's threads do not survive a fork.
    """
    from tqdm import tqdm

    from helpers.tiny import save_model

    tqdm.monitor_interval = 0  # no thread
    source = str(save_model(Path(folder) / "source", layers=2))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        with contextlib.redirect_stderr(nowhere):
            for number, words in enumerate(FIRST):
                assert run_main([words[0], source, f"{folder}/{number}", *words[1:]]) == 0


def run_main(words: list[str]) -> int:
    """`regraft WORDS`."""
    from regraft.cli.main import main

    sys.argv = ["regraft", *words]
    return main(words)


def run_request(request: dict[str, Any], files: list[int]) -> int:
    """Become the command of a request; its exit code."""
    os.setpgid(0, request["group"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, *files)):
        os.dup2(file, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    if request.get("whole_env"):
        os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    tempfile.tempdir = None  # TMPDIR may be another one
    sys.executable = request["python"]

    try:
        return run_program(request)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:  # as the interpreter's own last resort
        import traceback

        traceback.print_exc()
        return 1


def run_program(request: dict[str, Any]) -> int:
    """What an interpreter runs for `-m MODULE`, `-c CODE` or a file; without one, regraft."""
    if "kind" not in request:
        return run_main(request["words"])

    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the server ignores it
    program = request["program"]
    sys.argv = [program, *request["words"]]
    if request["kind"] == "module":
        if not hasattr(sys.modules.get(program), "__path__"):
            sys.modules.pop(program, None)  # it runs as if nothing had imported it
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif request["kind"] == "file":
        runpy.run_path(program, run_name="__main__")
    else:
        sys.argv[0] = "-c"
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    return 0


def be_child(request: dict[str, Any], files: list[int]) -> None:
    """Run a request and end as an interpreter does."""
    code = 1
    try:
        code = run_request(request, files)
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def serve(address: str) -> None:
    """Answer requests until standard input ends: a line with the process, and when that has ended
    one with its wait status.
    """
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(address)
    server.listen()
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ, None)
    selector.register(0, selectors.EVENT_READ, "parent")
    print("ready", flush=True)

    while True:
        for key, _ in selector.select():
            if key.data == "parent":
                return
            if key.data is None:
                line, _ = server.accept()
                child = start(line, server)
                watch = os.pidfd_open(child)
                selector.register(watch, selectors.EVENT_READ, (child, line))
                selector.register(line, selectors.EVENT_READ, watch)
            elif isinstance(key.data, int):  # who asked is gone
                with contextlib.suppress(OSError, KeyError, ValueError):  # its process as well
                    selector.unregister(key.fileobj)
                    signal.pidfd_send_signal(key.data, signal.SIGKILL)
            else:
                child, line = key.data
                _, status = os.waitpid(child, 0)
                for watched in (key.fileobj, line):
                    with contextlib.suppress(KeyError):
                        selector.unregister(watched)
                os.close(key.fd)
                with contextlib.suppress(OSError), line:
                    line.sendall(json.dumps({"status": status}).encode() + b"\n")


def start(line: socket.socket, server: socket.socket) -> int:
    """Begin what is asked for on a connection; its process."""
    text, files, *_ = socket.recv_fds(line, 1 << 20, 2)
    while not text.endswith(b"\n"):
        text += line.recv(1 << 20)
    request = json.loads(text)
    python = f"python-{request.get('mode', 'group')}"
    request["python"] = os.path.join(os.path.dirname(server.getsockname()), python)
    child = os.fork()
    if not child:
        server.close()
        line.close()
        be_child(request, files)
    for file in files:
        os.close(file)
    with contextlib.suppress(OSError):
        line.sendall(json.dumps({"pid": child}).encode() + b"\n")
    return child


def main() -> None:
    """Import, then serve."""
    address = sys.argv[1]
    import_everything()
    with tempfile.TemporaryDirectory() as folder:
        import_what_a_child_imports(["plan", folder])
        warm_up(folder)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()
    serve(address)


if __name__ == "__main__":
    main()
