"""Ending a stage early without losing its work: a signal sets a flag, and ranks act on it together."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes seconds to import, and a signal may come at once
    from hfprune_dist.distributed.world import World


class Interrupted(BaseException):
    """Raised when all ranks have saved and leave together. Not an error, so no ``except Exception`` may stop it."""


class Interruption:
    """A request to end this process early: the first ``signal`` that has arrived, None before that. Unless it listens
    for one, nothing is exchanged between ranks.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._listening = False

    def listen(self, *signals: int) -> None:
        """Treat these signals as the request; all ranks of a stage must do so, or none."""
        self._listening = True
        for number in signals:
            signal.signal(number, self._note)

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to end; collective, so every rank must call it at the same point."""
        return self._listening and any(world.all_gather(self.signal is not None))

    def stop_if_agreed(self, world: World) -> None:
        """Raise ``Interrupted`` on all ranks together if any was asked to end; call it where nothing would be lost."""
        if self.agreed(world):
            raise Interrupted

    def _note(self, number: int, _frame: FrameType | None) -> None:
        # A handler runs between any two instructions: anything but a flag could meet a half-done collective.
        self.signal = self.signal or number
