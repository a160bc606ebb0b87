"""Stands in for a process of the fork server (fork_server.py): passes on streams and signals, and ends as it does.

python -IS tests/fork_client.py SOCKET SCRIPT ARGUMENT...
"""

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
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        for number in FORWARDED:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda number, _frame: server.sendall(bytes([number])))
        request = json.dumps(["fork_server:become", [environment, *command], 1, environment, folder]).encode()
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(len(request).to_bytes(4, "big") + request)
        answer = b""
        while not answer.endswith(b"\n") and (more := server.recv(1 << 10)):
            answer += more
    code = json.loads(answer)[0][1] if answer else -signal.SIGKILL
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
