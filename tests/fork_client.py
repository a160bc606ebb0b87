"""Stands in for a process of the fork server (fork_server.py): passes on its streams and signals, and ends as it does.

python -IS tests/fork_client.py SOCKET SCRIPT ARGUMENT...
"""

import contextlib
import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def main():
    address, *command = sys.argv[1:]
    environment = {**os.environ, "HFPRUNE_FORK_SERVER": address}
    folder = os.getcwd()  # noqa: PTH109  pathlib takes longer to import than all this
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([environment, folder, *command]).encode() + b"\n")
    answers = server.makefile("r")
    pid = int(answers.readline())

    def forward(number, _frame):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, number)

    for number in FORWARDED:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    code = int(answers.readline() or -signal.SIGKILL)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
