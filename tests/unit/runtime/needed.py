"""Devices that the runtime's tests need; a file of its own, since two folders' `conftest` are one name to an import."""

from __future__ import annotations

import os

import pytest
from linattn.runtime import TargetError
from linattn.runtime.device import Device
from linattn.runtime.opening import open_device


def need_device(uri: str) -> Device:
    """The device, or a skip; LINATTN_REQUIRE=vulkan (as in CI) turns the skip into a failure."""
    try:
        return open_device(uri)
    except TargetError as error:
        if uri.partition("://")[0] in os.environ.get("LINATTN_REQUIRE", "").split(","):
            raise
        pytest.skip(str(error))
