"""A generation's way through steps whose tokens the module chooses, on a CPU: first one by one, then several a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from .engine import engine_of
from .step_loop import MOST_STEPS

if TYPE_CHECKING:
    from .session import Session

LONGEST_SECONDS = 0.1
"""Of a call of several steps, and so how long tokens and a Ctrl-C may keep somebody waiting.

0.1 s is the limit below which an answer feels immediate.
"""


class Follower:
    """Gives the tokens that come next; for one generation.

    Args:
        session: Of a model with one input of token ids and one output of logits.
        settings: How the next token is drawn, or one so many later, 8 f32; None: each has the largest logit.
        stops: Tokens behind which nothing is wanted, of one row.
    """

    def __init__(
        self, session: Session, settings: Callable[[int], bytes] | None = None, stops: Collection[int] = ()
    ) -> None:
        self._session, self._settings, self._stops = session, settings, tuple(stops)
        engine = engine_of(session.program)
        self._step = engine.row_chooser(settings is not None)
        self._many, self._left = (1 if engine.loop(engine.manifest.batch or 1) is not None else 0), 0

    def row(self, token: int, wanted: int) -> int | None:
        """Appends a token to the one row.

        Args:
            token: The last one.
            wanted: How many are, from the next one on.

        Returns:
            The next one, or what `follow` has for none; None: nothing was done, `follow` does it or says why not.

        Raises:
            TargetError: The call failed on the device.
        """
        if (self._left or self._many > 1) and (found := self.rows([token], wanted)) is not None:
            return found[0]
        step, session = self._step, self._session
        if step is None:
            return None
        start = time.perf_counter()
        draw = None if self._settings is None else self._settings(0)
        chosen = session._append(step, token, step.token, draw)  # pyright: ignore[reportPrivateUsage]
        if chosen is not None:
            self.took(1, time.perf_counter() - start)
        return chosen

    def rows(self, tokens: list[int], wanted: int) -> list[int] | None:
        """`row` for a token of every row, by calls of several steps only."""
        session, settings = self._session, self._settings
        if not self._left:
            if min(self._many, wanted) < 2:
                return None
            start = time.perf_counter()
            count = min(self._many, wanted)
            self._left = session._begin_series(tokens, count, settings, self._stops)  # pyright: ignore[reportPrivateUsage]
            if not self._left:
                self._many = 1
                return None
            self.took(self._left, time.perf_counter() - start)
        self._left -= 1
        draw = None if settings is None else settings(0)
        found = session._next_of_series(tokens, draw)  # pyright: ignore[reportPrivateUsage]
        if found is None:  # the session was asked for something else, which it may be again
            self._left = self._many = 0
        return found

    def took(self, steps: int, seconds: float) -> None:
        """Chooses how many steps the next call has: twice as many, as long as they take no longer than is agreed."""
        if self._many:
            self._many = max(1, min(2 * steps, MOST_STEPS, int(LONGEST_SECONDS * steps / max(seconds, 1e-9))))
