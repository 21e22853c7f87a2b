"""What a generation feeds: token ids or their embeddings, and positions of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike

from ..arrays import check_bounds, token_ids
from ..binding import Sizes, axis_of, positions
from ..device import HostArray
from ..errors import InputError, require
from ..manifest import InputSpec
from ..session import Session

Embed = ArrayLike | Callable[[HostArray], Any]
"""A table [V, D], or a function from token ids [B, T] to embeddings [B, T, D]."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def token_input(session: Session) -> str:
    """Name of the input that takes the token ids.

    Raises:
        InputError: The model has no such input, or several.
    """
    names = [spec.name for spec in session.program.inputs if spec.role == "tokens"]
    if len(names) != 1:
        raise InputError("no single input for token ids", got=", ".join(names) or "none")
    return names[0]


class Feeder:
    """Makes the inputs of the calls of one generation.

    Args:
        session: Where it goes on.
        embed: For a model that takes embeddings.
        prompt: Further inputs of the prompt's call.

    Raises:
        InputError: A model of neither ids nor embeddings, or `embed` missing, or given for nothing.
    """

    def __init__(self, session: Session, embed: Embed | None = None, prompt: Mapping[str, Any] | None = None) -> None:
        require(session, Session, "session", "program.session()")
        m = self._manifest = session.program.manifest
        self._prompt = dict(prompt or {})
        self._embed = embed
        found = next((spec for spec in m.inputs if spec.role == "tokens"), None)
        self.ids = found or InputSpec("prompt", "int64", ("B", "T"), "tokens")
        """The input of the ids; where the model has none, what they would be."""
        self._name = self.ids.name
        if found is None:
            floats = [spec for spec in m.inputs if spec.dtype in _FLOATS and len(spec.shape) == 3]
            names = [spec.name for spec in floats if axis_of(m, spec.shape, "tokens") == 1]
            if len(names) != 1:
                raise InputError("no single input for token ids", got=", ".join(names) or "none")
            self._name = names[0]
            if embed is None:
                hint = "pass embed: the table [V, D], or a function from ids [B, T] to embeddings [B, T, D]"
                raise InputError("the model takes embeddings", where=self._name, hint=hint)
        else:
            token_input(session)
            if embed is not None:
                raise InputError("the model takes token ids", where="embed", expected="None")
        spec = next((spec for spec in m.inputs if spec.role == "position_ids"), None)
        given = None if spec is None else self._prompt.get(spec.name)
        self._positions = spec
        self._next = None if given is None else int(np.max(given)) + 1

    @property
    def is_plain(self) -> bool:
        """Whether a step takes a token id and nothing else."""
        return self._embed is None and self._next is None

    def first(self, ids: HostArray) -> dict[str, Any]:
        """The inputs of the prompt's call; what the caller gave for it counts, embeddings too."""
        return {**({} if self._name in self._prompt else self._tokens(ids)), **self._prompt}

    def step(self, ids: HostArray) -> dict[str, Any]:
        """The inputs of the next step; its positions go on from the largest of the prompt, if those were given."""
        feed = self._tokens(ids)
        if self._next is not None and self._positions is not None:
            sizes = Sizes(self._manifest, batch=ids.shape[0], tokens=1)
            feed[self._positions.name] = positions(self._manifest, self._positions, sizes, self._next, None)
            self._next += 1
        return feed

    def _tokens(self, ids: HostArray) -> dict[str, Any]:
        if self._embed is None:
            return {self._name: ids}
        if callable(self._embed):
            return {self._name: cast(Any, self._embed)(ids)}
        table: HostArray = np.asarray(self._embed)
        if table.ndim != 2:
            raise InputError("not a table", where="embed", got=list(table.shape), expected="[V, D]")
        check_bounds(InputSpec("prompt", "int64", ("B", "T"), "tokens", (0, len(table) - 1)), ids)
        return {self._name: table[ids]}


def prompt_ids(feeder: Feeder, ids: ArrayLike) -> HostArray:
    """A prompt as [B, T].

    Raises:
        InputError: It has no tokens, or they are none.
    """
    feed = token_ids(feeder.ids, ids)
    if feed.size == 0 or feed.ndim != 2:
        got, expected = list(feed.shape), "[T] or [B, T]"
        raise InputError("the prompt must have tokens", where=feeder.ids.name, got=got, expected=expected)
    return feed
