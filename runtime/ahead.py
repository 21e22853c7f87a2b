"""A step that has been submitted before anybody knows whether it will be wanted.

Where the module chooses the token, the device needs no answer of the host to go on: the next step reads what the one
before it chose. A session commits a step when its token is known; the one behind it is then already on its way.
"""

from __future__ import annotations

from collections.abc import Callable
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
