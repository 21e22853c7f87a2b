"""Steps that were begun or done before anybody knows whether they will be wanted.

Where the module chooses the token, the device needs no answer of the host to go on: the next step reads what the one
before it chose. A session commits a step when its token is known; the one behind it is then already on its way, or, on
a CPU, done in the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .device import HostArray
from .held import Held
from .step import Step


@dataclass(eq=False, slots=True)
class Ahead:
    """A step under way.

    Attributes:
        base: What the session held before it.
        held: What it holds when it is done and wanted.
        step: Its memory; nobody else's until it is done.
        source: The step that chooses its tokens, which must be kept as long; None: the host gave them.
        ids: Its tokens, once the host knows them.
        draw: How its token is drawn; None: the largest logits.
        wait: Waits until it is done.
    """

    base: Held
    held: Held
    step: Step
    source: Step | None
    ids: HostArray | None
    draw: bytes | None
    wait: Callable[[], None]

    def is_next(self, now: Held, ids: HostArray, draw: bytes | None) -> bool:
        """Whether it is what appending these tokens, and choosing so, would be."""
        return self.draw == draw and self.base is now and self.ids is not None and np.array_equal(self.ids, ids)


@dataclass(eq=False, slots=True)
class Series:
    """Steps that were done in one call, whose tokens are taken one by one.

    Attributes:
        base: What the session holds until all of them are taken.
        held: What it holds then; None: that was given up, and what is taken is to be done again.
        tokens: Of each row, what was appended first, and what each step chose.
        draws: How each token was drawn; None: the largest logits.
        taken: How many steps' tokens were taken; the session's position counts them.
    """

    base: Held
    held: Held | None
    tokens: list[list[int]]
    draws: Sequence[bytes] | None
    taken: int = 0

    def is_next(self, now: Held, tokens: list[int], draw: bytes | None) -> bool:
        """Whether what is appended next, and how its token is drawn, is what was done."""
        done = self.taken < len(self.tokens) - 1 and self.held is not None and self.base is now
        if not done or self.tokens[self.taken] != tokens:
            return False
        return draw is None if self.draws is None else self.draws[self.taken] == draw
