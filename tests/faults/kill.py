"""Death at a chosen file-system operation: the points between which a crash can leave different files behind."""

import errno
import itertools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

OPERATIONS = ("fsync", "rename", "replace", "link", "unlink", "mkdir", "rmdir")


def arm(kill_at, match, operations=OPERATIONS, condition=lambda: True):
    """From now on, count operations on paths that contain ``match`` and die before the ``kill_at``-th."""
    count = countdown(kill_at)
    before(match, lambda: condition() and count(), operations)


def arm_reductions(kill_at):
    """From now on, die before the ``kill_at``-th all-reduce, while the other ranks wait in it."""
    import torch.distributed

    count, original = countdown(kill_at), torch.distributed.all_reduce

    def wrapper(*args, **kwargs):
        count()
        return original(*args, **kwargs)

    torch.distributed.all_reduce = wrapper


def countdown(kill_at):
    """Return a function whose ``kill_at``-th call is this process's last."""
    calls = itertools.count(1)

    def count():
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def refuse(match, condition):
    """From now on, no file may be replaced whose path contains ``match``, as long as a condition holds."""

    def deny():
        if condition():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), match)

    before(match, deny)


def slow_down(match, seconds, while_exists, condition):
    """Sleep before each replacement of a file whose path contains ``match``, on a condition; on while a file exists."""

    def sleep():
        if condition():
            time.sleep(seconds)
            while while_exists and Path(while_exists).exists():
                time.sleep(seconds)

    before(match, sleep)


def before(match, action, operations=("rename", "replace")):
    """Wrap functions of ``os``: do something before each call with a path that contains ``match``."""

    def wrapped(name, original):
        def wrapper(target, *args, **kwargs):
            path = str(Path(f"/proc/self/fd/{target}").readlink()) if name == "fsync" else str(target)
            if match in path:
                action()
            return original(target, *args, **kwargs)

        return wrapper

    for name in operations:
        setattr(os, name, wrapped(name, getattr(os, name)))


def die_in_fork(action, kill_at, store, operations=OPERATIONS):
    """Run ``action`` in a forked child that dies at its ``kill_at``-th operation; return whether it died."""
    child = os.fork()
    if child == 0:
        try:
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(1)  # the parent's thread pool did not survive the fork
            arm(kill_at, str(store), operations)
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def deaths_during(action, folder, copies):
    """Run ``action`` here, and copy ``folder`` as a death before each of its operations would leave it.

    A killed process loses nothing but its memory, so a copy is what its death leaves. Operations that find the same
    files as those before them, such as the fsyncs of one write, share a copy, because no later run can tell them
    apart.

    Returns:
        The copies, in ``copies``, in order; the last one is what the complete run leaves.
    """
    states, originals = [], {name: getattr(os, name) for name in OPERATIONS}

    def copy():
        if not states or _files_in(folder) != _files_in(states[-1]):
            states.append(shutil.copytree(folder, copies / str(len(states)), symlinks=True))

    try:
        before(str(folder), copy, OPERATIONS)
        action()
    finally:
        for name, original in originals.items():
            setattr(os, name, original)
    copy()
    return states


def _files_in(folder):
    """Return path below the folder -> content, which is None for a folder."""
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
