"""Weights in a file of their own (``.irpa``, IREE's parameter archive), for models too large for one module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import iree.runtime  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from linattn.runtime.integrity import seal_file

PARAMETER_SCOPE = "model"


def write_parameters(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write an archive with its seal; it appears whole or not at all.

    Args:
        path: File to write.
        arrays: Parameter name -> values.
    """
    index: Any = iree.runtime.ParameterIndex()
    for name, array in arrays.items():
        index.add_buffer(name, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    partial = Path(f"{path}.partial")
    try:
        index.create_archive_file(str(partial))
        seal_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
