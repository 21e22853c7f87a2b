"""Programs and devices for the runtime's tests; Vulkan cases skip where there is no device."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from linattn.runtime import Program, TargetError
from linattn.runtime.device import Device
from linattn.runtime.opening import open_device
from tiny_hybrid import Hybrid


def need_device(uri: str) -> Device:
    """The device, or a skip; LINATTN_REQUIRE=vulkan (as in CI) turns the skip into a failure."""
    try:
        return open_device(uri)
    except TargetError as error:
        if uri.partition("://")[0] in os.environ.get("LINATTN_REQUIRE", "").split(","):
            raise
        pytest.skip(str(error))


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
