"""Weights in a file of their own (``.irpa``, IREE's parameter archive), for models too large for one module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import iree.runtime  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from linattn.runtime.drivers import one_line
from linattn.runtime.integrity import seal_file
from linattn.runtime.outputs import new_file

PARAMETER_SCOPE = "model"


def write_parameters(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write an archive with its seal; it appears whole or not at all.

    Args:
        path: File to write.
        arrays: Parameter name -> values.

    Raises:
        LinattnError: if it cannot be written.
    """
    index: Any = iree.runtime.ParameterIndex()
    for name, array in arrays.items():
        index.add_buffer(name, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    with new_file(path) as partial:
        try:
            index.create_archive_file(str(partial))
        except (RuntimeError, LookupError) as error:
            raise OSError(one_line(error)) from error
        seal_file(partial)
