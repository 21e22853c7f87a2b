"""The rules of a manifest that take more than one of its fields; what a field may be is checked as it is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .device import numpy_dtype
from .manifest_reader import bad

if TYPE_CHECKING:
    from .manifest import Manifest

MAX_ARRAY_BYTES = 1 << 40
_MAX_NAME = 255


def is_plain_name(name: str) -> bool:
    """Whether it names a file without a folder, on any system."""
    return 0 < len(name) <= _MAX_NAME and not set(name) & set("/\\:\0") and name not in (".", "..")


def check(manifest: Manifest, where: str) -> None:
    """Refuse what breaks a rule.

    Raises:
        TargetError: One line says which.
    """
    m = manifest
    for name, role in m.dims.items():
        if role not in ("batch", "tokens", "past", "total", "open"):
            raise bad(where, f"dims.{name}", "unknown role", role, "batch | tokens | past | total | open")
    entries = [name for entry in m.entry_points for name in (*entry.symbols, entry.steps, entry.packed)]
    symbols = [name for name in (*entries, m.finite) if name]
    for group, names in (
        ("input and state", [spec.name for spec in (*m.inputs, *m.states)]),
        ("output", [*(spec.name for spec in m.outputs), *(state.output for state in m.states)]),
        ("entry point", symbols),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise bad(where, f"{group} names", "not unique", ", ".join(twice))
    if not m.entry_points:
        raise bad(where, "entry_points", "empty")
    for symbol in symbols:
        if symbol == "__init" or "$" in symbol:
            raise bad(where, "entry_points", "not a function to call", symbol)
    for entry in m.entry_points:
        if entry.kind == "decode" and entry.tokens != 1:
            raise bad(where, entry.symbol, "wrong token count of a decode entry", entry.tokens, 1)
        if entry.steps is not None and not (entry.token or entry.draw):
            raise bad(where, entry.symbol, "several steps without one that chooses", entry.steps, "token or draw")
        if entry.packed is not None and entry.tokens != 1:
            raise bad(where, entry.symbol, "wrong token count of a packed step", entry.tokens, 1)
    for role in ("attention_mask", "position_ids"):
        if sum(spec.role == role for spec in m.inputs) > 1:
            raise bad(where, "inputs", f"more than one {role}")
    for spec in (*m.inputs, *m.outputs, *m.states):
        unknown = [dim for dim in spec.shape if isinstance(dim, str) and dim not in m.dims]
        if unknown:
            raise bad(where, spec.name, "dims without a role", ", ".join(map(str, unknown)), "an entry in dims")
        known = {"batch": m.batch or 1, "past": m.max_context or 1, "total": m.max_context or 1}
        sizes = [known.get(m.dims[dim], 1) if isinstance(dim, str) else dim for dim in spec.shape]
        nbytes = math.prod(sizes) * numpy_dtype(spec.dtype).itemsize
        if nbytes > MAX_ARRAY_BYTES:
            raise bad(where, spec.name, "too large", f"{nbytes} bytes", f"at most {MAX_ARRAY_BYTES}")
    for spec in m.inputs:
        if spec.bounds is not None and numpy_dtype(spec.dtype).kind not in "iu":
            raise bad(where, spec.name, "bounds of values that are no indices", spec.dtype, "an integer dtype")
    for output in m.outputs:
        if output.token_axis is not None and output.token_axis >= len(output.shape):
            raise bad(where, output.name, "token_axis out of range", output.token_axis, f"< {len(output.shape)}")
    for state in m.states:
        axis = state.length_axis
        if axis is not None and axis >= len(state.shape):
            raise bad(where, state.name, "length_axis out of range", axis, f"< {len(state.shape)}")
        if (state.kind == "kv_cache") != (axis is not None):
            raise bad(where, state.name, f"wrong length_axis of a {state.kind} state", axis)
        if axis is not None and m.role(state.shape[axis]) != "past":
            raise bad(where, state.name, "the length axis is not a past dim", state.shape[axis])
        if state.in_place and not (state.kind == "kv_cache" and m.max_context):
            raise bad(where, state.name, "in_place without a capacity", state.kind, "a kv_cache and max_context")
    if m.parameters and not is_plain_name(m.parameters.file):
        raise bad(where, "parameters.file", "not a plain file name", repr(m.parameters.file))
