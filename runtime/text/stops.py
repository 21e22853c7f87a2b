"""Texts that end an answer: found wherever tokens break them up, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import InputError


class StopTexts:
    """Lets text through piece by piece until one of the texts comes.

    Args:
        texts: What ends the answer; none: everything is let through at once.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        if "" in texts:
            raise InputError("an empty text would stop at once", where="stop")
        self._texts = texts
        self._held = ""
        self.found = False
        """Whether one of them came; nothing is let through after it."""

    def push(self, piece: str) -> str:
        """Adds a piece; returns what is certain to come before any of the texts."""
        held = self._held + piece
        places = [place for text in self._texts if (place := held.find(text)) >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        kept = max((self._started(held, text) for text in self._texts), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _started(held: str, text: str) -> int:
        """How many characters at the end may be the beginning of the text."""
        return next((n for n in range(min(len(text) - 1, len(held)), 0, -1) if held.endswith(text[:n])), 0)
