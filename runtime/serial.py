"""Series of steps: done in one call of the module and taken one by one; taken in part, that part is done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .ahead import Series
from .errors import TargetError
from .held import Held, Lease
from .holding import Holding
from .step_loop import StepLoop


class Serial(Holding):
    """The part of a `Session` that does several steps at once; whoever calls has the session and nothing is ahead."""

    def _do_series(
        self, tokens: list[int], count: int, draws: Callable[[int], bytes] | None, stops: Sequence[int]
    ) -> int:
        now = self._line[-1]
        loop = self._engine.loop(now.batch) if now.batch is not None else None
        if loop is None or len(tokens) != loop.rows or now.mask is not None or self._window or self._guard:
            return 0
        count = min(count, loop.most(now.position))
        if count < 2 or (draws is not None and not loop.step.draws) or not all(map(loop.step.is_token, tokens)):
            return 0
        settings = None if draws is None else [draws(turn) for turn in range(count)]
        series = self._call_loop(loop, now, tokens, count, settings, stops)
        self._series = series
        return len(series.tokens) - 1

    def _take(self, tokens: list[int], draw: bytes | None) -> list[int] | None:
        """Commits one more step, in one assignment."""
        series = self._series
        if series is None or not series.is_next(self._line[-1], tokens, draw):
            return None
        place = series.taken + 1
        found = series.tokens[place]
        if place < len(series.tokens) - 1:
            series.taken = place
        else:
            assert series.held is not None
            self._commit(series.held)
            self._series = None
        return found

    def _catch_up(self, *, forget: bool = False) -> None:
        """Holds the states behind the steps that were taken, and no others.

        Of recurrent and conv states only those before and behind the whole series are there: the steps that were taken
        are done once more. A failure leaves that for the next time.

        Args:
            forget: Nobody needs them.

        Raises:
            TargetError: The call failed on the device, or chose other tokens than before.
        """
        series = self._series
        if series is None or self._engine.module.is_foreign:
            return
        base, held, now = series.base, series.held, self._line[-1]
        if held is not None and not base.moving and base is now:
            end = base.position + series.taken
            self._commit(Held([], Lease(held.lease.caches, end), end, base.batch))
        if held is not None:
            series.held = None
            if held.moving is not now.moving:
                self._keep_memory(held.moving)
            held.lease.release()
        if base is self._line[-1] and series.taken and not forget:
            loop = self._engine.loop(base.batch or 1)
            assert loop is not None
            again = self._call_loop(loop, base, series.tokens[0], series.taken, series.draws, ())
            assert again.held is not None
            if again.tokens != series.tokens[: series.taken + 1]:
                again.held.lease.release()
                raise TargetError("steps that were done again chose other tokens", where=self._engine.device.uri)
            self._commit(again.held)
        self._series = None

    def _call_loop(
        self,
        loop: StepLoop,
        base: Held,
        tokens: list[int],
        count: int,
        draws: Sequence[bytes] | None,
        stops: Sequence[int],
    ) -> Series:
        first, second = self._next_memory(base), self._next_memory(base)
        assert first is not None, "only modules that take memory for their results have such functions"
        assert second is not None
        lease = base.lease.caches.extend(base.lease, base.position + count)
        try:
            with self._engine.lock:  # whoever calls has looked whether it is usable
                now = Held(base.moving, lease, base.position, base.batch)
                chosen, moving = loop.run(tokens, now, first, second, count, draws, stops)
        except BaseException:
            lease.release()
            raise
        self._keep_memory(second if moving is first else first)
        end = base.position + len(chosen)
        if len(chosen) < count:
            lease.caches.shrink(lease, end)
        return Series(base, Held(moving, lease, end, base.batch), [tokens, *chosen], draws)
