"""Asks a fork server to be an interpreter, passes signals on and ends as that does.

Run: python -I -S fork_client.py SOCKET group|own [-u] -m MODULE WORDS .. (or -c CODE, or FILE)

`group` puts it into this process's group, whose signals it gets; with `own` it has a group of its
own, and the signals that this process gets are sent to it. A SIGKILL reaches it too: the server
ends it when this process is gone.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

address, mode, *words = sys.argv[1:]
own = mode == "own"
while words[0] == "-u":
    words.pop(0)
kind = {"-m": "module", "-c": "code"}.get(words[0], "file")
if kind != "file":
    words.pop(0)
request = {
    "kind": kind,
    "program": words[0],
    "words": words[1:],
    "cwd": os.getcwd(),
    "env": dict(os.environ),
    "whole_env": own,
    "group": 0 if own else os.getpgrp(),
    "mode": mode,
}
process, early = 0, []


def forward(number: int, frame: object) -> None:
    if process:
        os.kill(process, number)
    else:
        early.append(number)


for number in FORWARDED if own else ():
    signal.signal(number, forward)
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
    line.connect(address)
    socket.send_fds(line, [json.dumps(request).encode() + b"\n"], (1, 2))
    reader = line.makefile("rb")
    process = json.loads(reader.readline())["pid"]
    for number in early:
        os.kill(process, number)
    code = os.waitstatus_to_exitcode(json.loads(reader.readline())["status"])
if own and code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code & 0xFF)
