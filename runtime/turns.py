"""Whose turn it is among calls that were submitted: one after the other, a block at a time."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A line of threads of which the first may go on; for worker threads only, since no Ctrl-C comes to them."""

    def __init__(self) -> None:
        self._line: deque[int] = deque()
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        """Waits at the end of the line."""
        with self._changed:
            self._line.append(threading.get_ident())
            self._wait()

    def __exit__(self, *exception: object) -> None:
        """Leaves it."""
        with self._changed:
            self._line.popleft()
            self._changed.notify_all()

    def pause(self) -> None:
        """Lets the others go first."""
        with self._changed:
            self._line.rotate(-1)
            self._changed.notify_all()
            self._wait()

    def _wait(self) -> None:
        me = threading.get_ident()
        self._changed.wait_for(lambda: self._line[0] == me)
