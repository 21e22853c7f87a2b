"""Which tokens a session's states stand for, so that a prompt that goes on from them is not read again."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import StateError
from ..session import Session


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
    _answer: list[int] = field(default_factory=list[int])

    def add(self, token: int) -> None:
        """Notes a generated token; the states hold everything before it.

        Raises:
            StateError: A later turn has begun.
        """
        if self._memory.turn is not self:
            raise StateError("another answer has begun", hint="read this one to its end first, or use two generators")
        self._memory.tokens = [*self._prompt, *self._answer]
        self._answer.append(token)


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

    def reset(self) -> None:
        """Forgets everything."""
        self.tokens, self.turn = [], None
        self._session.reset()

    def room(self, tokens: int) -> int:
        """How many tokens can be generated after a prompt of so many before the context is full; at least 1."""
        limit = self._session.program.manifest.token_limit
        return max(limit - tokens + 1, 1) if limit is not None else 1 << 62

    def begin(self, ids: list[int]) -> Turn:
        """Starts a turn where the states fit the beginning of a prompt; at least its last token is left to feed."""
        held = self._session.position
        fits = held == len(self.tokens) and held < len(ids) and ids[:held] == self.tokens
        if not fits:
            self.reset()
        self.turn = Turn(self._session, held if fits else 0, self, ids)
        return self.turn
