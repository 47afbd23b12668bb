"""A server that speaks as much of the hub's API as a client needs to read and to push a model, and
an interpreter that runs commands against it: the client reads its settings once, on import.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Repository:
    """A model on the server.

    Attributes:
        revisions: branch, tag or commit -> folder.
        token: that reading it needs; empty: none.
        gated: whether a request for it says that it is gated.
        status: with which every request is answered, 0 for none.
        cut: file -> bytes after which its next downloads end, one after the other; None: whole.
        wrong: files whose content is not what its hash says.
    """

    revisions: dict[str, Path]
    token: str = ""
    gated: bool = False
    status: int = 0
    cut: dict[str, list[int | None]] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)


class HubServer:
    """Serves models on a port of this machine. Used as a context.

    Attributes:
        models: by name, ORG/MODEL.
        sent: bytes of content that were sent, by file.
        ranges: the Range headers of requests, by file.
        pushed: files that were pushed, by model and name.
        created: what was asked for each new model.
    """

    def __init__(self, empty: Path) -> None:
        """Serve nothing yet; `empty` is the folder of models that are made here."""
        self.empty = empty
        self.models: dict[str, Repository] = {}
        self.sent: Counter[str] = Counter()
        self.ranges: dict[str, list[str]] = {}
        self.pushed: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(Answers):
            server_state = hub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)

    def __enter__(self) -> HubServer:
        self.thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def forget(self) -> None:
        """Count anew."""
        self.sent.clear()
        self.ranges.clear()


def commit_of(folder: Path) -> str:
    """The commit of a revision's folder."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


def is_large(name: str) -> bool:
    """Whether a file is kept by its sha256, as weights are."""
    return name.endswith((".safetensors", ".bin", ".gguf"))


def hash_of(data: bytes, name: str) -> str:
    """The hash that the hub gives for a file."""
    if is_large(name):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Answers(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    server_state: HubServer

    def log_message(self, *words: Any) -> None:
        """Nothing."""

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        """An error as the hub gives it."""
        body = json.dumps({"error": message or code}).encode()
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(body, status, {name: value for name, value in headers.items() if value})

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """An answer with a body."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any) -> None:
        """An answer of JSON."""
        self.answer(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def read_body(self) -> bytes:
        """The body of a request."""
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def find(self, name: str, revision: str) -> tuple[Repository, Path] | None:
        """(model, folder) of a request; None when it has been refused."""
        known = self.server_state.models.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if known and known.status:
            self.refuse(known.status)
        elif known and known.gated and given != known.token:
            self.refuse(403, "GatedRepo", f"Access to model {name} is restricted.")
        elif known and given and given != known.token and known.token:
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif known is None or (known.token and given != known.token):
            self.refuse(401, "RepoNotFound", "Repository not found")
        else:
            folders = {**known.revisions} | {commit_of(f): f for f in known.revisions.values()}
            if revision in folders:
                return known, folders[revision]
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def do_HEAD(self) -> None:
        """The headers of a file."""
        self.do_GET()

    def do_GET(self) -> None:
        """A model's list of files, or a file."""
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            name, kind, revision = match.groups()
            if found := self.find(name, revision or "main"):
                self.json(self.list_files(name, found[1], kind == "tree"))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self.find(match[1], match[2]):
                self.send_file(*found, match[3])
        else:
            self.refuse(404, "", f"nothing at {path}")

    def list_files(self, name: str, folder: Path, tree: bool) -> Any:
        """What the hub says of a model's files."""
        rows = []
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            data, path = file.read_bytes(), file.relative_to(folder).as_posix()
            digest = hash_of(data, path)
            row: dict[str, Any] = {"size": len(data)}
            row |= {"path": path, "type": "file", "oid": digest} if tree else {"rfilename": path}
            if is_large(path):
                row["lfs"] = {"sha256": digest, "oid": digest, "size": len(data), "pointerSize": 1}
            rows.append(row)
        return rows if tree else {"id": name, "sha": commit_of(folder), "siblings": rows}

    def send_file(self, model: Repository, folder: Path, name: str) -> None:
        """A file or a range of it; in the middle of it the connection may end."""
        state, file = self.server_state, folder / name
        if not file.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        data = file.read_bytes()
        headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{hash_of(data, name)}"'}
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(data))}
        if self.command == "HEAD":
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            return
        if name in model.wrong:
            data = bytes([data[0] ^ 1]) + data[1:-1] + bytes([data[-1] ^ 1])
        status, asked = 200, self.headers.get("Range")
        if asked:
            state.ranges.setdefault(name, []).append(asked)
            begin, _, last = asked.removeprefix("bytes=").partition("-")
            stop = min(int(last) + 1 if last else len(data), len(data))
            headers["Content-Range"] = f"bytes {begin}-{stop - 1}/{len(data)}"
            status, data = 206, data[int(begin) : stop]
        cuts = model.cut.get(name)
        cut = cuts.pop(0) if cuts else None
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        part = data if cut is None else data[:cut]
        state.sent[name] += len(part)
        with contextlib.suppress(OSError):
            self.wfile.write(part)
        self.close_connection = cut is not None

    def do_PUT(self) -> None:
        """A large file that is pushed."""
        self.server_state.objects[self.path.rpartition("/")[2]] = self.read_body()
        self.answer(b"")

    def do_POST(self) -> None:
        """A step of pushing a model."""
        state, body = self.server_state, self.read_body()
        path = self.path.partition("?")[0]
        if not self.headers.get("Authorization"):
            self.refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            state.created.append(asked)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            state.models.setdefault(name, Repository({"main": state.empty}))
            self.json({"url": f"{state.url}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.json({"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{state.url}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self.json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(match[1], body)
        else:
            self.refuse(404, "", f"nothing at {path}")

    def commit(self, name: str, body: bytes) -> None:
        """Take the files of a commit."""
        import base64

        state = self.server_state
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                state.pushed.setdefault(name, {})[value["path"]] = content
            elif line["key"] == "lfsFile":
                state.pushed.setdefault(name, {})[value["path"]] = state.objects[value["oid"]]
        url = f"{state.url}/{name}/commit/1"
        self.json({"commitUrl": url, "commitOid": "1" * 40, "pullRequestUrl": None})


class Client:
    """An interpreter that has imported regraft and runs each command in a fork. Used as a context.

    Args:
        url: of the server.
        folder: for the client's cache.
    """

    def __init__(self, url: str, folder: Path):
        self.cache = folder / "hub"
        settings = {
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_VERBOSITY": "error",
            "REGRAFT_CACHE": str(folder / "regraft"),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helpers.hub"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **settings},
            cwd=Path(__file__).parents[1],
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *failure: object) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, *words: object, offline: bool = False, token: str = "") -> tuple[int, str, str]:
        """Exit code, standard output and standard error of a command."""
        asked = {"words": [str(word) for word in words], "offline": offline, "token": token}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        code, out, err = json.loads(self.process.stdout.readline())
        return code, out, err

    def forget(self) -> None:
        """Empty the cache."""
        shutil.rmtree(self.cache, ignore_errors=True)


def run_words(asked: dict[str, Any], answer: int) -> None:
    """Run a command in this process, which ends with it; the answer goes into a file."""
    from huggingface_hub import constants

    from regraft.cli.main import main

    constants.HF_HUB_OFFLINE = asked["offline"]
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # a cut download keeps whole chunks
    os.environ["HF_TOKEN"] = asked["token"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(asked["words"])
    with open(answer, "w") as stream:
        json.dump([code, out.getvalue(), err.getvalue()], stream)


def serve_commands() -> None:
    """Run the commands that standard input names, each in a fork."""
    import torch

    torch.set_num_threads(1)
    import huggingface_hub.hf_api
    import transformers.models.llama.modeling_llama  # noqa: F401

    import regraft.cli.grow
    import regraft.core.checkpoint
    import regraft.growth.sizes_to_steps
    import regraft.modeling
    import regraft.plan.plan  # noqa: F401

    assert huggingface_hub.hf_api
    for line in sys.stdin:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                run_words(json.loads(line), writer)
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader) as stream:
            text = stream.read()
        os.waitpid(child, 0)
        print(text or '[-1, "", "it has ended without an answer"]', flush=True)


if __name__ == "__main__":
    serve_commands()
