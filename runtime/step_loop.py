"""Several steps in one call of the module, which feeds each with the token that the last one chose.

For CPUs, where what Python does for a token costs more than it seems: the weights leave nothing of it in the caches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .device import DeviceArray, HostArray
from .errors import TargetError
from .held import Held
from .module import Module
from .step import DRAW_SETTINGS, Step

MOST_STEPS = 16
"""Of a call; more save nothing that could be measured."""
MOST_STOPS = 32
"""Tokens that end a call early; behind a further one it goes on in vain."""
_ALIGNED = 64
_GREATEST = (1 << 31) - 1


def row_bytes(size: int) -> int:
    """Of a row of tokens or settings: kernels count on where their memory begins."""
    return -(-size // _ALIGNED) * _ALIGNED


class StepLoop:
    """What is prepared for the calls of one batch size of a program; it is used with the program's lock.

    Args:
        module: The loaded module.
        symbol: Its function, see `steps` in README.md.
        step: The step that it repeats, in whose memory inputs and outputs are.
        rows: B.
    """

    def __init__(self, module: Module, symbol: str, step: Step, rows: int) -> None:
        self._module, self._symbol, self.step, self.rows = module, symbol, step, rows
        device, ids = module.device, step.ids_dtype
        size = row_bytes(rows * ids.itemsize)
        self._tokens = device.host_buffer([MOST_STEPS + 1, size], "uint8")
        self._stops = device.host_buffer([MOST_STOPS], "int32")
        self._draws: DeviceArray | None = None
        stops, view = device.host_view(self._stops), device.host_view(self._tokens)
        assert stops is not None, "only on CPUs"
        assert view is not None
        view.fill(0)
        self._stop_view: HostArray = stops
        self._cells: memoryview = view.view(ids).reshape(-1).data  # numpy's assignments have code of their own
        self._row = size // ids.itemsize
        self._stopped_by: Sequence[int] | None = None
        self._drawn_by: list[bytes] = []
        self._memory = [self._tokens, self._stops]
        if step.draws:
            width = 4 * DRAW_SETTINGS * rows
            self._draws = device.host_buffer([MOST_STEPS, row_bytes(width)], "uint8")
            draws = device.host_view(self._draws)
            assert draws is not None
            draws.fill(0)
            self._draw_view: HostArray = draws[:, :width]
            self._memory.append(self._draws)
        step.start_positions()

    @property
    def nbytes(self) -> int:
        """Of what it has beside the step."""
        return sum(array.nbytes for array in self._memory)

    def most(self, position: int) -> int:
        """How many steps a call may have from a position on: as the context has room, by workers or all without."""
        return max(min(MOST_STEPS, self.step.steps_alike(position)), 0)

    def run(
        self,
        tokens: Sequence[int],
        now: Held,
        first: list[DeviceArray],
        second: list[DeviceArray],
        count: int,
        draws: Sequence[bytes] | None,
        stops: Sequence[int],
    ) -> tuple[list[list[int]], list[DeviceArray]]:
        """Appends a token to every row, then what was chosen, so many times or until one of `stops` or none is chosen.

        Args:
            tokens: One of each row, checked.
            now: The states before, which stay; rows of its caches from its position on are written.
            first: Memory for the moving states.
            second: Likewise: they are in the first after one step, three and so on, else in the second.
            count: How many steps, up to `most`.
            draws: How each token is drawn, 8 f32 for all rows; None: the largest logits.
            stops: Tokens that end it, of one row.

        Returns:
            What each step chose for the rows, and where the moving states are.

        Raises:
            TargetError: The call failed on the device.
        """
        cells, row, rows = self._cells, self._row, range(self.rows)
        for i in rows:
            cells[i] = tokens[i]
        self._draw_by(count, draws)
        known = self._stop_by(stops)
        views = self.step.start_loop(now, [*first, *second])
        views += [self._tokens.ref, *([] if self._draws is None else [self._draws.ref]), self._stops.ref]
        numbers = now.position, count, known
        alone = self.step.is_alone(now.position)
        done = self._module.call_loop(self._symbol, self.step.symbol, views, numbers, alone)
        if not 1 <= done <= count:
            raise TargetError("wrong number of steps", where=self._symbol, got=done, expected=f"1 to {count}")
        self.step.end_loop(now.position + done)
        chosen = [[cells[place + i] for i in rows] for place in range(row, row * (done + 1), row)]
        return chosen, first if done % 2 else second

    def _draw_by(self, count: int, draws: Sequence[bytes] | None) -> None:
        if self._draws is not None:
            wanted = [bytes(4 * DRAW_SETTINGS)] * count if draws is None else list(draws)
            if wanted != self._drawn_by[:count]:
                self._drawn_by = []
                for view, settings in zip(self._draw_view, wanted, strict=False):
                    view[:] = np.frombuffer(settings * self.rows, np.uint8)
                self._drawn_by = wanted

    def _stop_by(self, stops: Sequence[int]) -> int:
        if stops is not self._stopped_by:
            self._stopped_by = None
            known = [token for token in stops if 0 <= token <= _GREATEST][:MOST_STOPS]
            self._stop_view[: len(known)] = known
            self._stop_count, self._stopped_by = len(known), stops
        return self._stop_count
