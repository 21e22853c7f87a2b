"""Which tokens a session's states stand for, so that a prompt that goes on from them is not read again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import StateError
from ..session import Session
from ..snapshot import Snapshot

_MARKS = 4


@dataclass
class Turn:
    """One prompt and the tokens that were generated after it.

    Attributes:
        session: It, at the end of the reused tokens.
        reused: How many tokens of the prompt it holds already.
    """

    session: Session
    reused: int
    _memory: Memory
    _prompt: list[int]

    def follow(self, steps: Iterator[int]) -> Iterator[int]:
        """Hands on generated tokens and notes what the states hold by then: everything before the token.

        Raises:
            StateError: A later turn has begun; nothing is computed then, since the session is the later one's.
        """
        last: int | None = None
        while True:
            if self._memory.turn is not self:
                hint = "read this one to its end first, or use two generators"
                raise StateError("another answer has begun", hint=hint)
            token = next(steps, None)
            if token is None:
                return
            if last is None:
                self._memory.tokens = list(self._prompt)
                self._memory.mark(self._prompt)
            else:
                self._memory.tokens.append(last)
            last = token
            yield token


class Memory:
    """A session and the tokens it holds.

    Args:
        session: An empty session of one row.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.tokens: list[int] = []
        """What the states stand for."""
        self.turn: Turn | None = None
        """The turn under way."""
        self._marks: list[tuple[list[int], Snapshot]] = []  # prompts that were read, each the start of the next

    def reset(self) -> None:
        """Forgets everything."""
        self.tokens, self.turn, self._marks = [], None, []
        self._session.reset()

    def room(self, tokens: int) -> int:
        """How many tokens can be generated after a prompt of so many before the context is full; at least 1."""
        limit = self._session.program.manifest.token_limit
        return max(limit - tokens + 1, 1) if limit is not None else 1 << 62

    def mark(self, prompt: list[int]) -> None:
        """Keeps the states as they are now, at the end of a prompt.

        An answer may come back in a conversation otherwise than it was written (other tokens for one text, thoughts
        left out); the prompt before it comes back as it was.
        """
        self._marks = [*self._marks[-_MARKS + 1 :], (prompt, self._session.snapshot())]

    def begin(self, ids: list[int]) -> Turn:
        """Starts a turn from the longest beginning of a prompt that is held; at least its last token is left."""
        self._marks = [mark for mark in self._marks if _begins(ids, mark[0])]
        held = self._session.position
        if held != len(self.tokens) or not _begins(ids, self.tokens):
            if self._marks:
                tokens, snapshot = self._marks[-1]
                self._session.restore(snapshot)
                self.tokens = list(tokens)
            else:
                self.reset()
        self.turn = Turn(self._session, self._session.position, self, ids)
        return self.turn


def _begins(ids: list[int], tokens: list[int]) -> bool:
    return len(tokens) < len(ids) and ids[: len(tokens)] == tokens
