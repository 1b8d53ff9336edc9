"""``python -I -S ask.py SOCKET RANKS PROGRAM [ARGUMENT …]``: let `forked.py` run a program, and end as it does."""

import json
import os
import signal
import socket
import sys


def ask(path, ranks, *command):
    """Be the client: let a program run, and end as it does."""
    request = {"command": command, "ranks": int(ranks), "folder": os.getcwd(), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: connection.send(bytes([number])))
        try:
            connection.connect(path)
            socket.send_fds(connection, [b"3"], [0, 1, 2])
            connection.sendall(json.dumps(request).encode() + b"\n")
            answer = connection.makefile().readline()
        except OSError as error:
            with open(f"{path}.txt") as said:
                sys.exit(f"{error}: {said.read()}")
    if not answer:
        sys.exit("the process that started this program is gone")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    if (code := int(answer)) < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    ask(*sys.argv[1:])
