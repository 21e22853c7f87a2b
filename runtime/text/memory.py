"""Which tokens a session's states stand for, so that a prompt that goes on from them is not read again."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..errors import StateError
from ..generation.feeding import Embed, Feeder
from ..session import Session
from ..snapshot import Snapshot

_WORTH = 32
"""So many tokens must two prompts have in common, beyond what is held, for a mark where they part."""


@dataclass
class Turn:
    """One prompt and the tokens that were generated after it.

    Attributes:
        session: It, at the end of the tokens that it holds.
        start: How many tokens of the prompt it holds by now.
        reused: How many of them had been read before this turn.
    """

    session: Session
    start: int
    reused: int
    _memory: Memory
    _prompt: list[int]

    def follow(self, steps: Generator[int]) -> Generator[int]:
        """Hands on generated tokens and notes what the states hold by then: everything before the token.

        Raises:
            StateError: A later turn has begun; nothing is computed then, since the session is the later one's.
        """
        last: int | None = None
        try:
            while True:
                if self._memory.turn is not self:
                    hint = "read this one to its end first, or use two generators"
                    raise StateError("another answer has begun", hint=hint)
                token = next(steps, None)
                if token is None:
                    return
                if last is None:
                    self._memory.tokens = list(self._prompt)
                    self._memory.mark()
                else:
                    self._memory.tokens.append(last)
                last = token
                yield token
        finally:
            steps.close()  # so that the states are those of what was handed on
            if last is not None and self._memory.turn is self:
                with suppress(StateError):  # the program is closed
                    self._memory.mark()


class Marks:
    """States at the ends of prompts and answers, where another prompt may go on; threads may share them.

    Args:
        most: So many; of more the one goes that was not used for the longest time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: list[tuple[list[int], Snapshot]] = []
        self._lock = threading.Lock()

    def add(self, tokens: list[int], snapshot: Snapshot) -> None:
        """Keeps what a session held after these tokens."""
        with self._lock:
            others = [mark for mark in self._found if mark[0] != tokens]
            self._found = [*others[-self._most + 1 :], (tokens, snapshot)]

    def longest(self, ids: list[int]) -> tuple[list[int], Snapshot] | None:
        """The longest beginning of a prompt that there is; it counts as used."""
        with self._lock:
            fitting = [mark for mark in self._found if _begins(ids, mark[0])]
            best = max(fitting, key=lambda mark: len(mark[0]), default=None)
            if best is not None:
                self._found.remove(best)
                self._found.append(best)
            return best

    def common(self, ids: Sequence[int]) -> int:
        """How many tokens a prompt begins with that another one began with too."""
        with self._lock:
            return max((_common(ids, tokens) for tokens, _ in self._found), default=0)

    def clear(self) -> None:
        """Forgets them all."""
        with self._lock:
            self._found = []


class Memory:
    """A session and the tokens it holds.

    Args:
        session: An empty session of one row.
        marks: Where prompts may go on, its own or shared.
        embed: For a model that takes embeddings.
    """

    def __init__(self, session: Session, marks: Marks, embed: Embed | None = None) -> None:
        self._session = session
        self.tokens: list[int] = []
        """What the states stand for."""
        self.turn: Turn | None = None
        """The turn under way."""
        self._marks = marks
        self._embed = embed

    def fork(self) -> Memory:
        """Another one of the same marks, which holds nothing yet."""
        session = self._session
        return Memory(session.program.session(batch=session.batch), self._marks, self._embed)

    def reset(self) -> None:
        """Forgets everything, the marks too."""
        self._marks.clear()
        self._start_over()

    def _start_over(self) -> None:
        self.tokens, self.turn = [], None
        self._session.reset()

    def room(self, tokens: int) -> int:
        """How many tokens can be generated after a prompt of so many before the context is full; at least 1."""
        limit = self._session.program.manifest.token_limit
        return max(limit - tokens + 1, 1) if limit is not None else 1 << 62

    def mark(self) -> None:
        """Keeps the states as they are now.

        An answer may come back in a conversation otherwise than it was written (other tokens for one text, thoughts
        left out); the prompt before it comes back as it was.
        """
        self._marks.add(list(self.tokens), self._session.snapshot())

    def begin(self, ids: list[int]) -> Turn:
        """Starts a turn from the longest beginning of a prompt that is held; at least its last token is left.

        Where another prompt went on otherwise, such as after the same instructions, the states are marked there.
        """
        best = self._marks.longest(ids)
        is_held = self._session.position == len(self.tokens) and _begins(ids, self.tokens)
        if best is not None and not (is_held and len(self.tokens) >= len(best[0])):
            self._session.restore(best[1])
            self.tokens = list(best[0])
        elif not is_held:
            self._start_over()
        reused = self._session.position
        shared = min(self._marks.common(ids), len(ids) - 1)
        if shared >= reused + _WORTH:
            feeder = Feeder(self._session, self._embed)
            self._session.run(feeder.first(np.array([ids[reused:shared]])), outputs=[])
            self.tokens = ids[:shared]
            self.mark()
        self.turn = Turn(self._session, self._session.position, reused, self, ids)
        return self.turn


def _common(ids: Sequence[int], tokens: Sequence[int]) -> int:
    return next(
        (i for i, (one, other) in enumerate(zip(ids, tokens, strict=False)) if one != other), min(len(ids), len(tokens))
    )


def _begins(ids: list[int], tokens: list[int]) -> bool:
    return len(tokens) < len(ids) and ids[: len(tokens)] == tokens
