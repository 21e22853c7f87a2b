"""The context of a thread, with a driver that only counts; e2e/test_chosen_steps.py has threads on real devices."""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from linattn.runtime import TargetError
from linattn.runtime.cuda_context import ThreadContext
from linattn.runtime.device import Device
from linattn.runtime.opening import open_device


class Driver:
    """What the driver was asked, by whom; `refuses` names the call that fails."""

    def __init__(self, refuses: str = "") -> None:
        self.refuses = refuses
        self.calls: list[tuple[str, object, int]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            told = arguments[0].value if name == "cuCtxSetCurrent" else arguments[1]
            self.calls.append((name, getattr(told, "value", told), threading.get_ident()))
            if name == "cuDevicePrimaryCtxRetain":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_void_p))[0] = 77
            if name == "cuDeviceGet":
                ctypes.cast(arguments[0], ctypes.POINTER(ctypes.c_int))[0] = arguments[1] + 40
            return 201 if name == self.refuses else 0

        return call

    def named(self, name: str) -> list[tuple[object, int]]:
        return [(told, thread) for called, told, thread in self.calls if called == name]


def on(driver: Driver, ordinal: int = 2) -> Device:
    """The CPU's device with that driver's context beside it."""
    real = open_device("cpu")
    return Device("cuda", real.hal_device, "counts", ThreadContext(ordinal, lambda name: driver))


def test_once_in_every_thread_and_before_anything_else() -> None:
    driver, barrier = Driver(), threading.Barrier(8)
    device = on(driver)
    assert not driver.calls

    def work(_: int) -> None:
        barrier.wait(60)
        for _ in range(3):
            device.zeros((4,), "float32")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert [told for told, _ in driver.named("cuDeviceGet")] == [2]
    assert [told for told, _ in driver.named("cuDevicePrimaryCtxRetain")] == [42]
    current = driver.named("cuCtxSetCurrent")
    assert {told for told, _ in current} == {77}
    assert len(current) == len({thread for _, thread in current}) == 8


@pytest.mark.parametrize("refuses", ["cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"])
def test_a_refusal_is_told_each_time(refuses: str) -> None:
    device = on(Driver(refuses), 0)
    for _ in range(2):
        with pytest.raises(TargetError, match=rf"cuda, device 0: {refuses} failed in a new thread, got CUDA error 201"):
            device.empty((4,), "float32")


def test_a_library_that_is_not_there() -> None:
    context = ThreadContext(0, lambda name: ctypes.CDLL("libnot.there.so.1"))
    with pytest.raises(TargetError, match="does not load"):
        context.make_current()
