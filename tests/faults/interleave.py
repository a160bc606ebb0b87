"""Several actors in one process, of which one at a time advances to its next file-system operation, in drawn order."""

import io
import itertools
import os
import threading
from contextlib import contextmanager
from unittest import mock

NAMES = ("stat", "rename", "replace", "link", "unlink", "mkdir", "rmdir", "scandir", "listdir")
OPERATIONS = [(os, name) for name in NAMES]
OPERATIONS.append((io, "open"))


class Actor(threading.Thread):
    """Runs an action up to the next file-system operation whenever it is told to continue."""

    def __init__(self, action):
        super().__init__(daemon=True)
        self.result = self.error = None
        self._action = action
        self._may_go_on, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self.ended = False

    def run(self):
        self._may_go_on.acquire()
        try:
            self.result = self._action()
        except BaseException as error:
            self.error = error
        self.ended = True
        self._waits.release()

    def pause(self):
        self._waits.release()
        self._may_go_on.acquire()

    def go_on(self):
        self._may_go_on.release()
        self._waits.acquire()


def interleave(actions, choices):
    """The results of actions run together; ``choices`` say who continues next, and then the others take turns."""
    actors = [Actor(action) for action in actions]
    with _pausing():
        for actor in actors:
            actor.start()
        for turn in itertools.chain(choices, itertools.count()):
            alive = [actor for actor in actors if not actor.ended]
            if not alive:
                break
            alive[turn % len(alive)].go_on()
    for actor in actors:
        if actor.error is not None:
            raise actor.error
    return [actor.result for actor in actors]


@contextmanager
def _pausing():
    with mock.patch.object(os, "fsync"):
        patches = [mock.patch.object(module, name, _paused(getattr(module, name))) for module, name in OPERATIONS]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _paused(original):
    def wrapper(*args, **kwargs):
        if isinstance(actor := threading.current_thread(), Actor):
            actor.pause()
        return original(*args, **kwargs)

    return wrapper
