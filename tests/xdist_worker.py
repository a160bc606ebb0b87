"""A worker of pytest-xdist as a process of the fork server (fork_server.py): runs what execnet gives ``python -c``."""

import sys

if __name__ == "__main__":
    exec(sys.argv[-1])
