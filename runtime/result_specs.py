"""What functions taking memory for their results say of it (`linattn.results`), trusted no more than the manifest."""

from __future__ import annotations

import json
import math
from typing import Any, cast

from .device import DTYPE_NAMES, numpy_dtype
from .errors import TargetError
from .manifest_rules import MAX_ARRAY_BYTES

ResultSpec = tuple[str, list[int]]


def read_result_specs(text: str, where: str, function: str) -> list[ResultSpec | None]:
    """Reads and checks the attribute.

    Args:
        text: JSON, `[dtype, shape]` of each result, null for one in an input.
        where: The module, for errors.
        function: Whose results.

    Raises:
        TargetError: It is something else.
    """
    try:
        rows: Any = json.loads(text)
    except (ValueError, RecursionError):
        rows = None
    if not isinstance(rows, list):
        raise TargetError(f"the results of '{function}' are not told", where=where, got=text[:80], expected="a list")
    return [None if row is None else _spec(row, where, function) for row in cast(list[Any], rows)]


def _spec(row: Any, where: str, function: str) -> ResultSpec:
    match row:
        case [str(dtype), [*sizes]] if dtype in DTYPE_NAMES and len(sizes) <= 16:
            whole = all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 40 for size in sizes)
            if whole and math.prod(sizes) * numpy_dtype(dtype).itemsize <= MAX_ARRAY_BYTES:
                return dtype, sizes
        case _:
            pass
    raise TargetError(f"a result of '{function}'", where=where, got=str(row)[:80], expected="[dtype, [sizes]] or null")
