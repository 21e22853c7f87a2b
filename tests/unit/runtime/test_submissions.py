"""What each call on a device's queue waits for there, and what is waited for where one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from linattn.runtime.device import Device
from linattn.runtime.submissions import Submissions


class Fence:
    """Of a semaphore's number and a value."""

    def __init__(self, semaphore: int, value: int, waited: list[tuple[int, int]]) -> None:
        self.ref, self._waited = (semaphore, value), waited

    def wait(self) -> None:
        self._waited.append(self.ref)


class Semaphore:
    """The first of a device is number 0."""

    def __init__(self, number: int) -> None:
        self.number, self.reached = number, 0

    def query(self) -> int:
        return self.reached


class Queue:
    """A device; it is its own `hal_device`."""

    def __init__(self) -> None:
        self.hal_device, self.waited, self.semaphores = self, list[tuple[int, int]](), list[Semaphore]()

    def enter(self) -> None:
        """Nothing is to be done."""

    def create_semaphore(self, value: int) -> Semaphore:
        assert value == 0
        self.semaphores.append(Semaphore(len(self.semaphores)))
        return self.semaphores[-1]

    def fence(self, semaphore: Semaphore, value: int) -> Fence:
        return Fence(semaphore.number, value, self.waited)


class Arguments(list[tuple[int, int]]):
    """Of a call."""

    push_ref = list[tuple[int, int]].append


def fail() -> None:
    raise RuntimeError("the device is gone")


def fences(submissions: Submissions, in_order: bool, call: Callable[[], None] = lambda: None) -> Arguments:
    """What a call waits for, and what it signals: a semaphore and its value each."""
    packed = Arguments()
    submissions.submit(packed, call, in_order)
    return packed


AT_ONCE = (1, 0)
"""The fence that is always reached."""


def test_calls_that_the_queue_takes_in_order_wait_for_nothing() -> None:
    submissions = Submissions(cast(Device, cast(Any, Queue())))
    assert [fences(submissions, True) for _ in range(3)] == [[AT_ONCE, (0, n)] for n in (1, 2, 3)]


def test_what_the_driver_may_hold_back_is_waited_for() -> None:
    """A call that waits is perhaps not submitted yet: what comes behind it waits too, until it is done."""
    queue = Queue()
    submissions = Submissions(cast(Device, cast(Any, queue)))
    assert fences(submissions, True) == [AT_ONCE, (0, 1)]
    assert [fences(submissions, one) for one in (False, True, True)] == [[(0, n), (0, n + 1)] for n in (1, 2, 3)]
    queue.semaphores[0].reached = 3
    assert fences(submissions, True) == [(0, 4), (0, 5)]
    queue.semaphores[0].reached = 5
    assert [fences(submissions, True) for _ in range(2)] == [[AT_ONCE, (0, 6)], [AT_ONCE, (0, 7)]]
    assert fences(submissions, False) == [(0, 7), (0, 8)]


@pytest.mark.parametrize("in_order", [True, False])
def test_a_call_that_fails_waits_for_those_before(in_order: bool) -> None:
    """Which may still use its memory; those after it have another semaphore, since its own is never reached."""
    queue = Queue()
    submissions = Submissions(cast(Device, cast(Any, queue)))
    fences(submissions, in_order)
    fences(submissions, in_order)
    with pytest.raises(RuntimeError, match="gone"):
        fences(submissions, in_order, fail)
    assert queue.waited == [(0, 2)]
    new = len(queue.semaphores)
    assert fences(submissions, in_order) == [AT_ONCE if in_order else (new, 0), (new, 1)]
