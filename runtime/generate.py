"""Greedy generation, the simplest loop over a session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .arrays import token_ids
from .device import HostArray
from .errors import InputError, StateError
from .session import Session

_INFINITY = 0x7C00
"""The bits of an f16 that is infinite; NaN have larger ones."""


def token_input(session: Session) -> str:
    """Name of the input that takes the token ids.

    Raises:
        InputError: The model has no such input, or several.
    """
    names = [spec.name for spec in session.program.inputs if spec.role == "tokens"]
    if len(names) != 1:
        raise InputError("no single input for token ids", got=", ".join(names) or "none")
    return names[0]


def greedy(session: Session, ids: ArrayLike, count: int) -> Iterator[int | tuple[int, ...]]:
    """Generates tokens, each the one with the largest logit (the first of equals).

    The session keeps what was generated, but for the last token, which has not been fed back.

    Args:
        session: Where to go on from; reset it for a fresh sequence.
        ids: Prompt, [T] or [B, T], at least one token.
        count: Number of tokens to generate.

    Yields:
        The next token id; a tuple of B ids where the session has more than one row.

    Raises:
        InputError: An empty prompt, or a model without token ids and logits.
        StateError: The context is full, or the logits are NaN.
    """
    name = token_input(session)
    spec = next(spec for spec in session.program.inputs if spec.name == name)
    outputs = [spec.name for spec in session.program.outputs if spec.role == "logits"]
    if len(outputs) != 1:
        raise InputError("no single output of logits", got=", ".join(outputs) or "none")
    feed = token_ids(spec, ids)
    if feed.size == 0 or feed.ndim != 2:
        raise InputError("the prompt must have tokens", where=name, got=list(feed.shape), expected="[T] or [B, T]")
    for _ in range(count):
        logits = session.run({name: feed}, logits="last")[outputs[0]]
        feed = _largest(logits).astype(feed.dtype)
        tokens = [int(token) for token in feed[:, 0]]
        yield tokens[0] if len(tokens) == 1 else tuple(tokens)


def index_of_largest(logits: HostArray) -> int:
    """Index of the largest element of a vector, as numpy's `argmax` finds it: the first of equals, or the first NaN.

    NumPy takes f16 one by one, 0.2 ms for 32,000; the bits of numbers order like integers, and those are compared
    many at a time.
    """
    if logits.dtype != np.float16 or not logits.size:
        return int(logits.argmax())
    bits = np.ascontiguousarray(logits).view(np.int16)
    keys = bits ^ ((bits >> 15) & 0x7FFF)
    best = int(keys.argmax())
    if keys[best] == 0 or keys[best] > _INFINITY or keys.min() < ~_INFINITY:  # two zeros are equal; or there are NaN
        return int(logits.argmax())
    return best


def _largest(logits: HostArray) -> HostArray:
    """Index of the largest logit of each row, [B, 1, V] -> [B, 1]."""
    rows = logits[:, -1, :]
    best = np.array([index_of_largest(row) for row in rows])
    chosen: Sequence[Any] = [row[index] for row, index in zip(rows, best, strict=True)]
    if any(value != value for value in chosen):
        raise StateError("the logits are NaN", hint="reset the session and check the inputs")
    return best[:, None]
