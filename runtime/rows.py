"""Rows of batches put together anew on the device: dropped, repeated, reordered, of several sessions, or empty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from . import held
from .binding import axis_of, full_mask
from .device import DeviceArray, HostArray, Move, numpy_dtype
from .errors import StateError
from .held import Held, Lease
from .manifest import Manifest, StateSpec
from .pool import Pool

Row = tuple[Held, int] | None
"""Whose row, and which; None: a row that has seen no tokens."""


def gather(manifest: Manifest, pool: Pool, rows: Sequence[Row], position: int) -> Held:
    """New states of these rows, copied in one submission; rows may come several times.

    A row of fewer tokens is put at the end of the columns, and the mask hides the columns before it.

    Args:
        manifest: The model.
        pool: Where memory for them comes from.
        rows: The rows in order.
        position: Tokens of the longest row.

    Raises:
        StateError: A row is shorter, and the model cannot have that (see `check_lengths`); or a state without rows.
        TargetError: The device failed.
    """
    lengths = [0 if row is None else row[0].position for row in rows]
    mask = _mask(manifest, rows, lengths, position)
    room = manifest.max_context if manifest.max_context is not None else position
    moving, caches, _, filled = held.take(manifest, pool, len(rows), room)
    taken = Held(moving, Lease(caches, position), position, len(rows), mask)
    moves: list[Move] = []
    sources = {id(row[0]): row[0].arrays(manifest) for row in rows if row is not None}
    for index, (spec, target) in enumerate(zip(manifest.states, taken.arrays(manifest), strict=True)):
        for to, row in enumerate(rows):
            source = None if row is None else sources[id(row[0])][index]
            start = 0 if row is None else row[1]
            moves += _moves(manifest, spec, source, start, target, to, lengths[to], position, filled)
    pool.device.move(moves)
    caches.arrays.filled = position
    return taken


def check_lengths(manifest: Manifest) -> None:
    """Refuses a model whose rows cannot be of different lengths.

    Raises:
        StateError: It cannot: its attention goes by the number of tokens and not by the mask.
    """
    if not manifest.row_masks:
        hint = "give each its own session; the model's attention goes by the number of tokens, not by the mask"
        raise StateError("rows of different lengths", where=manifest.model_name, expected="one length", hint=hint)


def _mask(manifest: Manifest, rows: Sequence[Row], lengths: Sequence[int], position: int) -> HostArray | None:
    """The columns of all rows; None where none is masked."""
    known = [None if row is None or row[0].mask is None else (row[0].mask, row[1]) for row in rows]
    if not any(known) and all(length == position for length in lengths):
        return None
    if any(length != position for length in lengths):
        check_lengths(manifest)
    spec = next((spec for spec in manifest.inputs if spec.role == "attention_mask"), None)
    axis = None if spec is None else axis_of(manifest, spec.shape, "total")
    if spec is None or axis is None:
        return None
    ones = full_mask(manifest, spec, len(rows), position, 0)
    columns, batch = np.moveaxis(ones, axis, -1), axis_of(manifest, spec.shape, "batch") or 0
    for to, (length, old) in enumerate(zip(lengths, known, strict=True)):
        row = np.take(columns, to, batch) if old is None else np.take(np.moveaxis(old[0], axis, -1), old[1], batch)
        seen = row[..., row.shape[-1] - length :]
        target = columns[(slice(None),) * batch + (to,)]
        target[..., : position - length] = 0
        target[..., position - length :] = seen
    return ones


def _moves(
    manifest: Manifest,
    spec: StateSpec,
    source: DeviceArray | None,
    row: int,
    target: DeviceArray,
    to: int,
    length: int,
    position: int,
    filled: int,
) -> list[Move]:
    """What fills one row of one state; of a cache's tokens only so many may hold anything."""
    axis = axis_of(manifest, spec.shape, "batch")
    if axis is None or (spec.length_axis is not None and spec.length_axis < axis):
        raise StateError("its rows are not the first axis", where=spec.name, got=list(spec.shape))
    at = spec.length_axis
    if at is None:
        inner = math.prod(target.shape[axis + 1 :]) * numpy_dtype(spec.dtype).itemsize
        outer = math.prod(target.shape[:axis])
        rows = 0 if source is None else source.shape[axis]
        regions = [((o * rows + row) * inner, (o * target.shape[axis] + to) * inner, inner) for o in range(outer)]
        return [Move(source, target, regions)]
    inner = math.prod(target.shape[at + 1 :]) * numpy_dtype(spec.dtype).itemsize
    middle, room = math.prod(target.shape[axis + 1 : at]), target.shape[at]
    old_rows, old_room = (0, 0) if source is None else (source.shape[axis], source.shape[at])
    end = min(max(filled, position), room) if spec.in_place else room
    copied: list[tuple[int, int, int]] = []
    cleared: list[tuple[int, int, int]] = []
    for o in range(math.prod(target.shape[:axis])):
        for m in range(middle):
            start = ((o * old_rows + row) * middle + m) * old_room * inner
            first = ((o * target.shape[axis] + to) * middle + m) * room
            copied.append((start, (first + position - length) * inner, length * inner))
            cleared.append((0, first * inner, (position - length) * inner))
            cleared.append((0, (first + position) * inner, (end - position) * inner))
    return [Move(source, target, copied if source is not None else []), Move(None, target, cleared)]
