"""Speculative decoding: a draft guesses, one call of the model verifies several tokens, what was wrong is taken back.

A block of the model's smallest prefill entry point is fed: tokens that are certain, then guessed ones. Its logits tell
how many guesses are what would have been chosen; the choice behind the last of them is certain too. Where all of the
block was right, the session keeps it. Else it is taken back, and what is certain of it is fed again with the next one,
which takes no longer for it: states are never those of a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from itertools import islice

import numpy as np

from ..calling import keep_one_call
from ..device import HostArray
from ..errors import InputError, LinattnError, StateError
from ..manifest import Manifest
from ..program import Program
from ..session import Session
from .sampling import Sampler

Draft = Callable[[Sequence[int], int], Sequence[int]]
"""Given all tokens so far and a number, that many tokens that may follow, or fewer."""

_OPEN_BLOCK = 8
"""Tokens of a block where the module takes any number."""

_GUESSES = 16
"""Most tokens that a model guesses at once; its session keeps the states before each."""

Generate = Callable[[Session, Sequence[int], int], Iterator[int]]


class Speculation:
    """The steps of one row, verified in blocks.

    Args:
        session: Where to go on from, after the prompt.
        tokens: All tokens of the sequence, the last of them chosen and not fed.
        sampler: How tokens are chosen.
        draft: Guesses.
    """

    def __init__(self, session: Session, tokens: Sequence[int], sampler: Sampler, draft: Draft) -> None:
        manifest = session.program.manifest
        self._session, self._sampler, self._draft = session, sampler, draft
        self._tokens = list(tokens)
        self._certain = [self._tokens[-1]]  # not in the states yet, in which there are `position` tokens
        self._position: int = session.position
        self._first = self._position - len(self._tokens) + 1  # where its tokens begin
        self._block = block_of(manifest)
        self._limit = manifest.token_limit
        self._before = self._position  # the last block
        self._unseen = 0  # of its tokens
        self._name = next(spec.name for spec in manifest.inputs if spec.role == "tokens")
        self._dtype = next(spec.dtype for spec in manifest.inputs if spec.role == "tokens")
        self._logits = next(spec.name for spec in manifest.outputs if spec.role == "logits")

    def run(self, count: int, stop: Collection[int]) -> Iterator[int]:
        """Generates tokens; at the end, however it comes, the session holds all that were yielded but the last.

        Args:
            count: Most tokens.
            stop: Tokens after which there is nothing more to say.

        Raises:
            StateError: The session was used in between, the context is full, or the logits are NaN.
        """
        with keep_one_call(self._session):
            try:
                while count > 0:
                    new = self._verify(count, stop)
                    count -= len(new)
                    self._unseen = len(new)
                    for token in new:
                        self._unseen -= 1
                        yield token
                    if new[-1] in stop:
                        return
            finally:
                self._forget_unseen()
                self._catch_up()

    def _verify(self, count: int, stop: Collection[int]) -> list[int]:
        """The tokens that one more block makes certain."""
        session, certain = self._session, self._certain
        if session.position != self._position:
            raise StateError("the session was used while a draft is verified", hint="end the generation first")
        self._before = self._position
        room = self._limit is None or self._position + self._block <= self._limit
        free = self._block - len(certain) if room else 0
        guessed = list(islice(self._draft(self._tokens, free), free)) if free else []
        filled = [*certain, *guessed]
        if room:
            filled += filled[-1:] * (self._block - len(filled))
        try:
            rows = session.run({self._name: np.array([filled], self._dtype)})[self._logits][0]
            new = self._choose(rows[len(certain) - 1 :], guessed, count, stop)
            if len(certain) + len(new) - 1 == len(filled):
                self._position, self._certain = session.position, new[-1:]
            else:
                session.rollback(len(filled))
                self._certain = [*certain, *new]
        except BaseException:
            if session.position != self._position:
                session.rollback(session.position - self._position)
            raise
        self._tokens += new
        return new

    def _choose(self, rows: HostArray, guessed: Sequence[int], count: int, stop: Collection[int]) -> list[int]:
        """What follows the certain tokens: guesses as long as they are right, and the first choice that is another."""
        new: list[int] = []
        for row, guess in zip(rows, [*guessed, None], strict=False):
            new.append(self._sampler.choose(row))
            if new[-1] != guess or new[-1] in stop or len(new) == count:
                break
        return new

    def _forget_unseen(self) -> None:
        """Takes back what is right and was not yielded when the generation ended."""
        unseen, self._unseen = self._unseen, 0
        if unseen and self._session.position == self._position:
            self._session.rollback(self._position - self._before)
            self._tokens, self._position = self._tokens[:-unseen], self._before
            self._certain = self._tokens[self._position - self._first :]

    def _catch_up(self) -> None:
        """Feeds what is certain, but for the last token."""
        behind, self._certain = self._certain[:-1], self._certain[-1:]
        if behind and self._session.position == self._position:
            with suppress(LinattnError):  # the error that ended it says more
                self._session.run({self._name: np.array([behind], self._dtype)}, logits="last")
            self._position = self._session.position


def block_of(manifest: Manifest) -> int:
    """How many tokens one call verifies.

    Raises:
        InputError: There is no call of several tokens.
    """
    sizes = [entry.tokens for entry in manifest.entry_points if entry.tokens is not None and entry.tokens > 1]
    if sizes:
        return min(sizes)
    if any(entry.tokens is None for entry in manifest.entry_points):
        return _OPEN_BLOCK
    hint = "compile it with --prefill-blocks 8"
    raise InputError("no call verifies several tokens", where="draft", got=manifest.model_name, hint=hint)


def drafted_by(program: Program, generate: Generate) -> Draft:
    """The greedy tokens of a smaller model of the same vocabulary, whose states never keep a guess either."""
    session = program.session(batch=1 if program.manifest.batch is None else None, window=_GUESSES)
    held: list[int] = []

    def draft(tokens: Sequence[int], count: int) -> list[int]:
        nonlocal held
        if held != list(tokens[: len(held)]):
            session.reset()
            held = []
        new, limit = tokens[len(held) :], program.manifest.token_limit
        count = min(count, _GUESSES)
        if limit is not None:
            count = min(count, limit - len(tokens) + 1)
        if count < 1 or not new:
            return []
        guessed = list(generate(session, new, count))
        session.rollback(len(guessed) - 1)
        held = list(tokens)
        return guessed

    return draft
