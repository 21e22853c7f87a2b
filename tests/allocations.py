"""What tests of states count: the memory that is allocated on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from linattn.runtime.device import Device, DeviceArray


@contextmanager
def allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each array that is allocated."""
    empty, sizes = Device._empty, list[int]()

    def counted(self: Device, *args: Any) -> DeviceArray:
        array = empty(self, *args)
        sizes.append(array.nbytes)
        return array

    with monkeypatch.context() as patch:
        patch.setattr(Device, "_empty", counted)
        yield sizes
