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

    A semaphore that is kept takes half the time of IREE's own waiting.

    Args:
        device: The device; `Device.has_queue`.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._semaphore: Any = None
        self._submitted = 0

    def submit(self, packed: Any, call: Callable[[], None]) -> Submitted:
        """Calls without waiting; one thread at a time.

        Args:
            packed: The call's arguments, of which its fences are the last ones.
            call: Calls with them.
        """
        device = self._device
        device.enter()
        if self._semaphore is None:
            self._semaphore, self._submitted = device.hal_device.create_semaphore(0), 0
        semaphore, value = self._semaphore, self._submitted + 1
        before, after = device.fence(semaphore, value - 1), device.fence(semaphore, value)
        packed.push_ref(before.ref)
        packed.push_ref(after.ref)
        self._semaphore = None  # one that has failed stays failed
        try:
            call()
        except BaseException:
            with suppress(RuntimeError):  # the next call has a semaphore of its own, and does not wait for those before
                before.wait()
            raise
        self._semaphore, self._submitted = semaphore, value
        return Submitted(semaphore, value, after)

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
        self._semaphore = None
