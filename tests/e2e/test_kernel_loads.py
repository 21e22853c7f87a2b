"""Kernels of a Vulkan module are loaded by several threads, or with the first call where nobody asks for it."""

from __future__ import annotations

import threading
from functools import cache

import numpy as np
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program, TargetError
from linattn.runtime import module as module_module
from linattn.runtime.device import Device
from linattn.runtime.module import Module
from linattn.runtime.session import engine_of

from samples.tiny_hybrid import build

pytestmark = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]
PROMPT = {"input_ids": np.arange(8)[None]}


@cache
def compiled(plain: bool = False) -> bytes:
    options = CompileOptions(target="vulkan", max_context=64, prefill_blocks=(8,), plain_abi=plain)
    return compile_model(build(), options).module


def logits(loaded: Program) -> list[np.ndarray]:
    """Of a prompt and of a step."""
    session = loaded.session()
    return [session.run(given)["logits"] for given in (PROMPT, {"input_ids": np.array([[3]])})]


def kernels(loaded: Program) -> int:
    return sum(name.startswith("load_kernel$") for name in engine_of(loaded).module.functions)


def test_each_kernel_is_loaded_once_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, right = list[int](), Device.enter

    def entered(self: Device) -> None:
        threads.append(threading.get_ident())
        right(self)

    monkeypatch.setattr(module_module, "_cores", lambda: 3)
    monkeypatch.setattr(Device, "enter", entered)
    loaded = Program.load(compiled(), "vulkan")
    others = [thread for thread in threads if thread != threading.get_ident()]
    assert len(others) == kernels(loaded) > 20
    assert 1 < len(set(others)) <= 3


def test_whoever_asks_for_none_gets_them_with_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    want = logits(Program.load(compiled(), "vulkan"))
    monkeypatch.setattr(Module, "_load_kernels", lambda self: None)
    for got, right in zip(logits(Program.load(compiled(), "vulkan")), want, strict=True):
        np.testing.assert_array_equal(got, right)


def test_a_kernel_that_does_not_load_is_an_error_of_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Device.enter

    def entered(self: Device) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("injected")
        right(self)

    monkeypatch.setattr(Device, "enter", entered)
    with pytest.raises(TargetError, match=r"does not load on vulkan.*injected"):
        Program.load(compiled(), "vulkan")


def test_modules_for_others_load_all_with_the_module() -> None:
    assert kernels(Program.load(compiled(plain=True), "vulkan")) == 0
