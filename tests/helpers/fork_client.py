"""Asks a fork server to run `-m MODULE WORDS ..` in this process's group and ends as that does.

Run: python -I -S fork_client.py SOCKET -m MODULE WORDS ..
"""

import json
import os
import socket
import sys

address, _, module, *words = sys.argv[1:]
request = {
    "module": module,
    "words": words,
    "cwd": os.getcwd(),
    "env": dict(os.environ),
    "group": os.getpgrp(),
}
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
    line.connect(address)
    socket.send_fds(line, [json.dumps(request).encode() + b"\n"], (1, 2))
    reader = line.makefile("rb")
    reader.readline()  # the process that does it
    status = json.loads(reader.readline())["status"]
os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
