"""Says how long an unfinished line has been so: code generation of a large model takes minutes and says nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

_LIVE_SECONDS = 1.0
"""On a terminal: how often the seconds beside the line change."""
_PLAIN_SECONDS = 30
"""Elsewhere: how often they are added to it."""


class Waiting:
    """Shows texts, and beside the last one the seconds since its line began, until there is more."""

    def __init__(self) -> None:
        self._is_open = False
        self._show: Callable[[str], None] = lambda _: None
        self._is_live = False
        self._start = 0.0
        self._told = 0
        self._beside = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def say(self, text: str, show: Callable[[str], None], is_live: bool) -> None:
        """Show a text.

        Args:
            text: Some of a line, or the rest of one.
            show: Shows it.
            is_live: Whether that is a terminal, where what was shown can be written over.
        """
        with self._lock:
            self._wipe()
            if not self._is_open:
                self._start, self._told = time.monotonic(), 0
            # Noted before it is shown: Ctrl-C may come in between, and an empty line is better than half a one.
            self._show, self._is_live, self._is_open = show, is_live, not text.endswith("\n")
            show(text)

    def end(self, how: str) -> None:
        """End the line, if one is unfinished."""
        if self._is_open:
            self.say(f"{how}\n", self._show, self._is_live)

    def beat(self) -> None:
        """Show the seconds, if it is time."""
        with self._lock:
            seconds = int(time.monotonic() - self._start)
            if not self._is_open or self._over.is_set():
                return
            if self._is_live and seconds:
                self._wipe()
                self._beside = len(f"{seconds} s")
                self._show(f"{seconds} s" + "\b" * self._beside)
            elif not self._is_live and seconds // _PLAIN_SECONDS > self._told:
                self._told = seconds // _PLAIN_SECONDS
                self._show(f"{seconds} s ... ")

    def _wipe(self) -> None:
        if self._beside:
            self._show(" " * self._beside + "\b" * self._beside)
            self._beside = 0

    def _count(self) -> None:
        while not self._over.wait(_LIVE_SECONDS):
            self.beat()
