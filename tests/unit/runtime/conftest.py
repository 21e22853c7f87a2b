"""Programs and devices for the runtime's tests; Vulkan cases skip where there is no device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from linattn.runtime import Program
from linattn.runtime.device import Device
from needed import need_device
from tiny_hybrid import Hybrid


@pytest.fixture(params=["local-task", "local-sync", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def device(request: pytest.FixtureRequest) -> Device:
    return need_device(request.param)


@pytest.fixture
def load(device: Device) -> Callable[..., Program]:
    """Compiles a form of the tiny hybrid for the device and loads it."""

    def load_form(**form: object) -> Program:
        hybrid = Hybrid("vulkan" if device.driver == "vulkan" else "cpu", **form)  # type: ignore[arg-type]
        return Program.load(hybrid.compile(), device.uri)

    return load_form


@pytest.fixture
def cpu() -> Program:
    return Program.load(Hybrid().compile(), "local-sync")
