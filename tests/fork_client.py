"""Stands in for a process of the fork server (fork_server.py): passes on streams and signals, and ends as it does.

python -IS tests/fork_client.py SOCKET ARGUMENT...
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def main():
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(sys.argv[1])
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _frame: server.sendall(bytes([number])))
        folder = os.getcwd()  # noqa: PTH109  pathlib takes longer to import than all this
        process = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": folder}
        request = json.dumps(process).encode()
        socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(request)
        answer = server.recv(4)
    code = int.from_bytes(answer, "big", signed=True) if answer else -signal.SIGKILL
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
