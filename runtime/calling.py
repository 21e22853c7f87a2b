"""What a call of a session does: a prompt in its blocks, a step by the short way, a step that the module chooses for.

`Session` is what users see of it; below are the steps of a generation, for the files of the runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from . import binding, held
from .collect import Collector, Wanted
from .device import DeviceArray, HostArray
from .errors import StateError
from .feeds import Call, block_inputs, check_room, prepare
from .held import Held
from .lane import Lane, in_use
from .manifest import EntryPoint
from .serial import Serial
from .step import Step

if TYPE_CHECKING:
    from .session import Session

_Chosen = TypeVar("_Chosen")


class Calling(Serial):
    """The part of a `Session` that calls the module and commits what comes of it, or nothing."""

    _free: list[None]
    _lane: Lane | None
    _cancelled: bool

    def _run(
        self, inputs: Mapping[str, Any], wanted: Wanted, pause: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        m, now, device = self._manifest, self._line[-1], self._engine.device
        plain = wanted.is_plain and now.batch is not None and now.mask is None
        if plain and (ids := self._engine.ids_alone(inputs)) is not None:
            step = self._engine.step(now.batch or 1, ids.shape[-1] if ids.ndim else 0, last=wanted.last)
            if step is not None and step.accepts(ids, now.position):
                return self._step(step, ids, now, step.read)
        call = prepare(m, device, inputs, now.position, now.batch, now.mask)
        collector = Collector(m, device, wanted, call.tokens)
        if call.tokens == 0:
            return collector.nothing({spec.name: self._no_tokens(spec, call.batch) for spec in m.outputs})
        check_room(m, now.position, call.tokens)
        binding.check_indices(m, call.feeds)
        plan = binding.plan_blocks(m, call.tokens)
        if now.batch is None:
            now = held.zeros(m, self._engine.pool, call.batch)
        lease = now.lease.caches.extend(now.lease, now.position + call.tokens)
        try:
            start = Held(now.moving, lease, now.position, call.batch)
            moving = self._run_blocks(plan, call, start, collector, pause)
            results = collector.results()
        except BaseException:
            lease.release()
            raise
        self._commit(Held(moving, lease, now.position + call.tokens, call.batch, call.mask))
        return results

    def _advance(self, ids: HostArray, choose: Callable[[HostArray], _Chosen]) -> _Chosen:
        """Appends a token to every row and chooses by its logits, which are not copied; see `advance`."""
        with self._exclusive():
            now = self._line[-1]
            step = self._engine.step(now.batch) if now.batch is not None and now.mask is None else None
            if step is None or not step.has_room(now.position):
                names = [spec.name for spec in self._manifest.inputs if spec.role == "tokens"]
                logits = next(spec.name for spec in self._manifest.outputs if spec.role == "logits")
                return choose(self._run({names[0]: ids}, Wanted(frozenset([logits]), last=True))[logits])
            step.check(ids)
            with self._engine.exclusive():  # until the logits' memory is the next call's
                return choose(self._step(step, ids, now, step.logits))

    def _append(
        self, step: Step, token: int, read: Callable[[], _Chosen], draw: bytes | None = None, *, opens: bool = False
    ) -> _Chosen | None:
        """`_step` for one row of which nothing is kept for `rollback`, with as little as possible besides; else None.

        None, too, where it `opens` a lane, by which the caller may go.

        States that somebody else holds too are left to them, which a fork's first step pays for with memory of its own.
        Nothing is committed before the last lines but one, which no signal comes between.
        """
        engine, free = self._engine, self._free
        engine.module.check_usable()
        try:
            free.pop()
        except IndexError:
            raise in_use() from None
        try:
            self._cancelled = False
            if self._lane is not None:
                self._lane.close(self._spare)
            if self._ahead is not None:
                self._settle()
            if self._series is not None:
                self._catch_up()
            line, spare = self._line, self._spare
            now = line[-1]
            position, old = now.position, now.lease
            if now.mask is not None or len(line) > 1 or self._window or self._guard:
                return None
            if now.batch != 1 or not step.is_for(token, position):
                return None
            if opens and spare and not now.shared and self._open_lane(now, spare[-1]):
                return None
            caches, is_grown, lease = old.caches, False, None
            try:
                is_grown = caches.grow(old, position)
                lease = old if is_grown else caches.extend(old, position + 1)
                with engine.lock:
                    into = spare.pop() if spare else engine.pool.take_like(now.moving)[0]
                    new = None if is_grown and not now.shared else Held(into, lease, position + 1, 1)
                    if step.draws:
                        step.draw_by(draw)
                    step.append(token, now, lease.caches, into)
                    found = read()
            except BaseException:
                if is_grown:
                    caches.shrink(old, position)
                elif lease is not None:
                    lease.release()
                raise
            before = now.moving
            if new is None:
                now.moving, now.position = into, position + 1
            else:
                self._line, self._lane = [new], None
            if not now.shared:
                spare.append(before)
            return found
        finally:
            free.append(None)

    def _follow(self, ids: HostArray, more: bool, draw: bytes | None, later: bytes | None) -> HostArray | None:
        """Appends a token to every row and returns the next ones, which the module chooses; see `follow`."""
        with self._exclusive(keep_ahead=True):
            now, ahead = self._line[-1], self._ahead
            if ahead is not None and not ahead.is_next(now, ids, draw):
                self._settle()
                ahead = None
            step = ahead.step if ahead is not None else self._chooser(now, draw)
            if step is None:
                return None
            try:
                if not step.has_room(now.position):
                    return None
                step.check(ids)
                if not self._engine.device.has_queue:
                    step.draw_by(draw)
                    return self._step(step, ids, now, lambda _: step.chosen())
            finally:
                if ahead is None:
                    self._engine.give_back(now.batch or 1, step)
            self._ahead = None
            first = ahead if ahead is not None else self._submit(now, ids, draw)
            following = None
            try:
                if more and step.has_room(first.held.position):
                    following = self._submit(first.held, first.step, later)
                first.wait()
                tokens = first.step.chosen()
            except BaseException:
                self._abandon(*([first] if following is None else [first, following]))
                raise
            self._commit(first.held)
            if following is None:
                self._engine.give_back(now.batch or 1, first.step)
            else:
                following.ids = tokens
            if first.source is not None:
                self._engine.give_back(now.batch or 1, first.source)
            self._ahead = following
            return tokens

    def _step(self, step: Step, ids: HostArray, now: Held, read: Callable[[Sequence[DeviceArray]], _Chosen]) -> _Chosen:
        """What `_run` does, for tokens that all is prepared for."""
        end = now.position + step.tokens
        lease = now.lease.caches.extend(now.lease, end)
        try:
            with self._engine.exclusive():
                into = self._next_memory(now)
                outputs, moving = step.call(ids, Held(now.moving, lease, now.position, now.batch), into)
                found = read(outputs)
        except BaseException:
            lease.release()
            raise
        self._commit(Held(moving, lease, end, now.batch))
        return found

    def _run_blocks(
        self,
        plan: list[tuple[EntryPoint, int]],
        call: Call,
        now: Held,
        collector: Collector,
        pause: Callable[[], None] | None,
    ) -> list[DeviceArray]:
        """The new moving states; the collector has the outputs."""
        start, outputs, moving, states = 0, list[DeviceArray](), now.moving, now.arrays(self._manifest)
        for entry, size in plan:
            if start and pause is not None:
                pause()
            if self._cancelled:
                raise StateError("cancelled", hint="the session is as before the call")
            outputs = []  # lets go of the block before, which may be large
            block = block_inputs(self._manifest, call.feeds, now.position, start, size)
            placed = call.placed_block(self._manifest, self._engine.device, block, start, size)
            with self._engine.exclusive():
                memory = self._next_memory(now)
                into = None if memory is None else self._in_order(memory)
                last = not collector.needs_all_logits
                outputs, states = self._engine.call(entry, placed, states, now.position + start, last, into)
                collector.take(outputs, size)
            start += size
            if start > size:
                self._keep_memory(moving)
            moving = memory if memory is not None else self._moving(states)
        return self._compact(moving, outputs)

    def _begin_series(
        self, tokens: list[int], count: int, draws: Callable[[int], bytes] | None, stops: Sequence[int]
    ) -> int:
        """Does up to so many steps; see `Follower`. `_next_of_series` gives their tokens.

        Returns:
            How many were done; 0: no two can be.

        Raises:
            TargetError: The call failed on the device.
        """
        free = self._free
        self._engine.module.check_usable()
        try:
            free.pop()
        except IndexError:
            raise in_use() from None
        try:  # what `_exclusive` does, with less code to be fetched
            self._cancelled = False
            if self._lane is not None:
                self._lane.close(self._spare)
            if self._ahead is not None:
                self._settle()
            if self._series is not None:
                self._catch_up()
            return self._do_series(tokens, count, draws, stops)
        finally:
            free.append(None)

    def _next_of_series(self, tokens: list[int], draw: bytes | None) -> list[int] | None:
        """Commits the next step of a series and returns its tokens; None where appending these is not that."""
        free = self._free
        self._engine.module.check_usable()
        try:
            free.pop()
        except IndexError:
            raise in_use() from None
        try:
            return self._take(tokens, draw)
        finally:
            free.append(None)

    @contextmanager
    def _exclusive(self, keep_ahead: bool = False, *, forget: bool = False) -> Generator[None]:
        self._engine.check_usable()
        try:
            self._free.pop()
        except IndexError:
            raise in_use() from None
        try:
            self._cancelled = False
            if self._lane is not None:
                self._lane.close(self._spare)
            if not keep_ahead and self._ahead is not None:
                self._settle()
            if self._series is not None:
                self._catch_up(forget=forget)
            yield
        finally:
            self._free.append(None)


def advance(session: Session, ids: HostArray, choose: Callable[[HostArray], _Chosen]) -> _Chosen:
    """A step of a generation: appends a token to every row, and what comes next is chosen by the logits.

    Args:
        session: Of a model with one input of token ids and one output of logits.
        ids: [B, 1], of the input's dtype.
        choose: Given the logits, [B, 1, V], which it must not keep. Should it fail, the tokens are there all the same.

    Raises:
        InputError: An index outside the model's tables.
        StateError: The context is full.
        TargetError: The call failed on the device.
    """
    return session._advance(ids, choose)  # pyright: ignore[reportPrivateUsage]


def follow(
    session: Session, ids: HostArray, more: bool, draw: bytes | None = None, later: bytes | None = None
) -> HostArray | None:
    """A step of a generation whose tokens the module chooses.

    Args:
        session: Of a model with one input of token ids and one output of logits.
        ids: [B, 1], of the input's dtype: what is appended to each row.
        more: Another such step is wanted: on a device with a queue it is submitted before this one is done, and
            forgotten where something else comes (`settle`, or whatever the session is asked for).
        draw: How tokens are drawn, 8 f32 for all rows or for each; None: each is the one with the largest logit.
        later: How those of the step behind it will be.

    Returns:
        The next tokens, [B, 1], -1 where the logits are NaN, -2 where none is finite. None where the module does not
        choose so, or there is no room: `advance` does it or says why not.

    Raises:
        InputError: An index outside the model's tables.
        TargetError: The call failed on the device.
    """
    return session._follow(ids, more, draw, later)  # pyright: ignore[reportPrivateUsage]


def settle(session: Session) -> None:
    """Waits for what `follow` has submitted ahead; the session holds what it has committed."""
    session._settle()  # pyright: ignore[reportPrivateUsage]


@contextmanager
def keep_one_call(session: Session) -> Generator[None]:
    """Within it the session's last call can be taken back, whatever its window."""
    if (lane := session._lane) is not None:  # pyright: ignore[reportPrivateUsage]
        lane.close(session._spare)  # pyright: ignore[reportPrivateUsage]
    window = session._window  # pyright: ignore[reportPrivateUsage]
    session._window = max(window, 1)  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        session._window = window  # pyright: ignore[reportPrivateUsage]
