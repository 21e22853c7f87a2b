"""The calls of a module on a device with a queue of its own: one after the other, along one semaphore that is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from .device import Device


class Submitted(NamedTuple):
    """A call that a device has been given.

    Attributes:
        semaphore: It reaches the value when the call is done.
        value: The value.
        fence: Of the two.
    """

    semaphore: Any
    value: int
    fence: Any


class Submissions:
    """Gives calls to a device, which takes one after the other, whoever submits them; waits for them.

    A semaphore that is kept takes half the time of IREE's own waiting. IREE's Vulkan driver signals it from a thread of
    the host, so that a call which waits for it begins late. Calls that the queue takes in order, see `IN_ORDER_KEY`,
    wait for nothing, so that the driver submits them at once, behind whatever it has submitted; what it may be holding
    back is waited for.

    Args:
        device: The device; `Device.has_queue`.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._semaphore: Any = None
        self._submitted = 0
        self._behind = 0  # of the last call that the driver may hold back until another one is done
        self._at_once: Any = None

    def submit(self, packed: Any, call: Callable[[], None], in_order: bool) -> Submitted:
        """Calls without waiting; one thread at a time.

        Args:
            packed: The call's arguments, of which its fences are the last ones.
            call: Calls with them.
            in_order: The call is one submission that ends with a barrier.
        """
        device = self._device
        device.enter()
        if self._semaphore is None:
            self._semaphore, self._submitted, self._behind = device.hal_device.create_semaphore(0), 0, 0
        semaphore, value = self._semaphore, self._submitted + 1
        if in_order and (not self._behind or semaphore.query() >= self._behind):
            before, behind = self._nothing(), 0
        else:
            before, behind = device.fence(semaphore, value - 1), value
        after = device.fence(semaphore, value)
        packed.push_ref(before.ref)
        packed.push_ref(after.ref)
        self._semaphore = None  # one that has failed stays failed
        try:
            call()
        except BaseException:
            with suppress(RuntimeError):  # the next call has a semaphore of its own, and does not wait for those before
                device.fence(semaphore, value - 1).wait()
            raise
        self._semaphore, self._submitted, self._behind = semaphore, value, behind
        return Submitted(semaphore, value, after)

    def _nothing(self) -> Any:
        """A fence that is reached."""
        if self._at_once is None:
            self._at_once = self._device.fence(self._device.hal_device.create_semaphore(0), 0)
        return self._at_once

    def wait(self, call: Submitted) -> None:
        """Waits until a call is done."""
        try:
            self._device.wait(*call)
        except BaseException as error:
            if isinstance(error, RuntimeError):
                self._semaphore = None
            with suppress(RuntimeError):  # nothing of it may go on behind a Ctrl-C
                call.fence.wait()
            raise

    def close(self) -> None:
        """Waits for all calls that were submitted."""
        if self._semaphore is not None:
            self._device.fence(self._semaphore, self._submitted).wait()
        self._semaphore = self._at_once = None
