"""Generation, the simplest loop over a session: a step, a choice, and the choice is the next step's input."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import token_ids
from ..device import HostArray
from ..errors import InputError
from ..manifest import InputSpec
from ..session import Session, advance, follow, settle
from .sampling import Sampler, Sampling, index_of_largest, nan_logits


def token_input(session: Session) -> str:
    """Name of the input that takes the token ids.

    Raises:
        InputError: The model has no such input, or several.
    """
    names = [spec.name for spec in session.program.inputs if spec.role == "tokens"]
    if len(names) != 1:
        raise InputError("no single input for token ids", got=", ".join(names) or "none")
    return names[0]


def greedy(session: Session, ids: ArrayLike, count: int) -> Iterator[int]:
    """Generates tokens of one row, each the one with the largest logit (the first of equals).

    The session keeps what was generated, but for the last token, which has not been fed back.

    Args:
        session: Where to go on from; reset it for a fresh sequence.
        ids: Prompt, [T] or [1, T], at least one token.
        count: Number of tokens to generate.

    Yields:
        The next token id.

    Raises:
        InputError: An empty prompt, several rows, or a model without token ids and logits.
        StateError: The context is full, or the logits are NaN.
    """
    return generate(session, ids, count)


def greedy_rows(session: Session, ids: ArrayLike, count: int) -> Iterator[tuple[int, ...]]:
    """`greedy` for B rows of equal length at once.

    Args:
        session: Where to go on from.
        ids: Prompts, [B, T], at least one token each.
        count: Number of tokens to generate for each row.

    Yields:
        The next token id of every row.

    Raises:
        InputError: An empty prompt, or a model without token ids and logits.
        StateError: The context is full, or the logits are NaN.
    """
    spec, output = _ends(session)
    feed = _prompt(spec, ids)
    try:
        for turn in range(count):
            if turn:
                best = _greedy_step(session, feed, turn + 1 < count)
            else:
                best = _largest(session.run({spec.name: feed}, logits="last")[output])
            feed = best.astype(feed.dtype)
            yield tuple(int(token) for token in feed[:, 0])
    finally:
        settle(session)


def generate(
    session: Session,
    ids: ArrayLike,
    count: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    seen: Collection[int] = (),
) -> Iterator[int]:
    """Generates tokens of one row until one of them stops it.

    The session keeps what was generated, but for the last token, which has not been fed back.

    Args:
        session: Where to go on from; reset it for a fresh sequence.
        ids: Prompt, [T] or [1, T], at least one token.
        count: Most tokens to generate.
        sampling: How a token is chosen; None: the largest logit.
        stop: Tokens after which there is nothing more to say, such as the model's end of text; the one that is chosen
            is the last that is yielded.
        seen: Tokens that the session has had before this prompt, for the repetition penalty.

    Yields:
        The next token id.

    Raises:
        InputError: An empty prompt, several rows, or a model without token ids and logits.
        StateError: The context is full, or the logits are NaN.
    """
    spec, output = _ends(session)
    feed = _prompt(spec, ids)
    if feed.shape[0] != 1:
        hint = "greedy_rows generates for several"
        raise InputError("one row is generated", where=spec.name, got=list(feed.shape), expected="[T]", hint=hint)
    sampler = Sampler(sampling or Sampling(), [*seen, *(int(token) for token in feed[0])])
    try:
        for turn in range(count):
            if turn == 0:
                token = sampler.choose(session.run({spec.name: feed}, logits="last")[output][0, -1])
            elif sampler.is_quick:
                token = int(_greedy_step(session, feed, turn + 1 < count)[0, 0])
            else:  # the program's other sessions go on while it chooses
                token = sampler.choose(advance(session, feed, np.copy)[0, -1])
            feed = np.full((1, 1), token, feed.dtype)
            yield token
            if token in stop:
                return
    finally:
        settle(session)


def _greedy_step(session: Session, feed: HostArray, more: bool) -> HostArray:
    """The next token of every row, [B, 1]: chosen by the module where it can, else here."""
    tokens = follow(session, feed, more)
    if tokens is None:
        return advance(session, feed, _largest)
    if tokens.min() < 0:
        raise nan_logits()
    return tokens


def _ends(session: Session) -> tuple[InputSpec, str]:
    """The input of the token ids and the name of the logits."""
    name = token_input(session)
    outputs = [spec.name for spec in session.program.outputs if spec.role == "logits"]
    if len(outputs) != 1:
        raise InputError("no single output of logits", got=", ".join(outputs) or "none")
    return next(spec for spec in session.program.inputs if spec.name == name), outputs[0]


def _prompt(spec: InputSpec, ids: ArrayLike) -> HostArray:
    feed = token_ids(spec, ids)
    if feed.size == 0 or feed.ndim != 2:
        raise InputError("the prompt must have tokens", where=spec.name, got=list(feed.shape), expected="[T] or [B, T]")
    return feed


def _largest(logits: HostArray) -> HostArray:
    """Index of the largest logit of each row, [B, 1, V] -> [B, 1]."""
    rows = logits[:, -1, :]
    best = np.array([index_of_largest(row) for row in rows])
    if any(row[index] != row[index] for row, index in zip(rows, best, strict=True)):
        raise nan_logits()
    return best[:, None]
