"""A step: one token of every row, or one block, through one entry point, with all prepared that no token changes.

A general call checks, completes, cuts and packs whatever it is given. Of a step only the token ids, the position and
columns of the mask are new: they are written where the device reads them. The states are those of whoever calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, cast

import numpy as np

from .arrays import as_array, check_bounds
from .binding import Sizes, axis_of
from .device import DeviceArray, HostArray
from .errors import InputError, TargetError
from .held import Caches, Held
from .manifest import InputSpec, Manifest
from .module import Module

DRAW_SETTINGS = 8
"""Numbers that say how a token is drawn, see `draw` in README.md."""

_MANY = 1 << 31
_PREPARED_ROLES = ("tokens", "attention_mask", "position_ids")


class _Row(NamedTuple):
    """Where the numbers of one row are written, one by one: numpy's assignments have code of their own to be fetched.

    Attributes:
        ids: The token.
        positions: Its position, as often as the model takes it.
        columns: The mask's columns of committed tokens; None where there is no such mask.
        low: The least token.
        high: The greatest one.
    """

    ids: memoryview
    positions: list[memoryview]
    columns: memoryview | None
    low: int
    high: int


class Step:
    """What is prepared for one batch size of a program; it is used with the program's lock.

    Args:
        module: The loaded module.
        manifest: Its manifest.
        symbol: The entry point.
        shapes: Of the graph's inputs.
        outputs: Memory of the graph's outputs; None: the module brings it.
        alone: Of the entry point, see `EntryPoint`.
        draws: Of how many rows the entry point draws tokens; 0: of none.
        cut: Whether of the logits only those of the last position are read, though it gives all.
    """

    def __init__(
        self,
        module: Module,
        manifest: Manifest,
        symbol: str,
        shapes: Sequence[tuple[int, ...]],
        outputs: Sequence[DeviceArray] | None,
        alone: int,
        draws: int = 0,
        *,
        cut: bool = False,
    ) -> None:
        m, device = manifest, module.device
        self._module, self._manifest, self._symbol = module, m, symbol
        self._outputs, self._alone, self._cut = outputs, alone, cut
        self._inputs = [device.host_buffer(shape, spec.dtype) for shape, spec in zip(shapes, m.inputs, strict=True)]
        views = [device.host_view(array) for array in self._inputs]
        pairs = [(spec, view) for spec, view in zip(m.inputs, views, strict=True) if view is not None]
        self._spec, self._ids = next(pair for pair in pairs if pair[0].role == "tokens")
        self._ids_at = m.inputs.index(self._spec)
        self.tokens = self._ids.shape[-1]
        """T, of a row."""
        self._logits_at = next((i for i, spec in enumerate(m.outputs) if spec.role == "logits"), 0)
        by_token = [_by_token(m, spec, view) for spec, view in pairs if spec.role == "position_ids"]
        self._positions: list[tuple[HostArray, HostArray]] = [(view, np.arange(view.shape[-1])) for view in by_token]
        self._columns: HostArray | None = None
        self.filled = 0
        """Tokens whose columns of the mask are written; -1: unknown."""
        for spec, view in pairs:
            if spec.role == "attention_mask":
                self._start_mask(spec, view)
        self._views = [device.host_view(output) for output in outputs or ()]
        limits = [spec.bounds[1] + 1 for spec in m.inputs if spec.role == "position_ids" and spec.bounds is not None]
        limits += [m.token_limit] if m.token_limit is not None else []
        self._limit = min(limits) if limits else None
        moving = sum(not spec.in_place for spec in m.states)
        places, caches = iter(range(moving)), iter(range(moving, len(m.states)))
        order = [next(caches if spec.in_place else places) for spec in m.states]
        self._in_order: Any = itemgetter(*order) if len(order) > 1 else tuple
        self._tied = len(m.states) - moving
        self._takes_position = m.takes_position
        self._draw: list[DeviceArray] = [device.host_buffer((draws, DRAW_SETTINGS), "float32")] if draws else []
        self._settings = [_bytes_of(view) for array in self._draw if (view := device.host_view(array)) is not None]
        self._drawn_by: bytes | None = None
        self._rows = draws
        for cells in self._settings:
            cells[:] = bytes(cells.nbytes)
        self._refs = [[array.ref for array in arrays] for arrays in (self._inputs, self._draw, outputs or ())]
        self._name, self._dtype = self._spec.name, self._ids.dtype
        limits = np.iinfo(self._dtype)
        self._range = self._spec.bounds or (int(limits.min), int(limits.max))
        self._row = self._one_row()
        self._memory = [*self._inputs, *self._draw, *(outputs or ())]  # goes last: the views above are of it

    @property
    def nbytes(self) -> int:
        """Of its inputs; the outputs' memory is the engine's."""
        return sum(array.nbytes for array in (*self._inputs, *self._draw))

    def accepts(self, ids: HostArray, position: int) -> bool:
        """Whether a session's call with nothing but these ids is no more than this step; they are checked.

        Raises:
            InputError: An index outside the model's tables.
        """
        if ids.shape != self._ids.shape or not self.has_room(position):
            return False
        self.check(ids)
        return True

    def check(self, ids: HostArray) -> None:
        """Refuses token ids outside the model's tables.

        Raises:
            InputError: Names the first.
        """
        check_bounds(self._spec, ids)

    def token_of(self, inputs: Any) -> int | None:
        """The token of a session's call that appends it to the one row (`append`); None for any other call."""
        row, kind = self._row, cast(Any, type(inputs))
        if row is None or kind is not dict or len(inputs) != 1:
            return None
        token: Any = inputs.get(self._name)
        kind = cast(Any, type(token))
        if kind is np.ndarray:
            try:  # least code to be fetched: no tuple of a shape
                token = token.item() if token.dtype is self._dtype and token.ndim == 2 else None
            except ValueError:
                return None
        elif kind is list and len(token) == 1:
            token = token[0]
            token = token[0] if cast(Any, type(token)) is list and len(token) == 1 else None
        else:
            return None
        return token if cast(Any, type(token)) is int and row.low <= token <= row.high else None

    def is_for(self, token: int, position: int) -> bool:
        """Whether `append` does this token at this position; `call` says what is wrong with others."""
        row, limit = self._row, self._limit
        return row is not None and row.low <= token <= row.high and (limit is None or position < limit)

    def is_token(self, token: int) -> bool:
        """Whether it is one of the model's tables."""
        low, high = self._range
        return low <= token <= high

    def draw_by(self, settings: bytes | None) -> None:
        """Says how the next call chooses: 8 f32 of `draw` in README.md, for all rows or each; None: the largest."""
        if settings == self._drawn_by:
            return
        self._drawn_by = b""  # unknown, should a Ctrl-C come
        for cells in self._settings:
            each = bytes(4 * DRAW_SETTINGS) if settings is None else settings
            cells[:] = each if len(each) == cells.nbytes else each * self._rows
        self._drawn_by = settings

    def has_room(self, position: int) -> bool:
        """Whether the context has room for its tokens at a position; the general call says why not."""
        return self._limit is None or position + self.tokens <= self._limit

    def call(
        self, ids: HostArray, now: Held, into: list[DeviceArray] | None
    ) -> tuple[Sequence[DeviceArray], list[DeviceArray]]:
        """Appends its tokens to every row, and waits.

        Args:
            ids: Token ids, [B, T], checked.
            now: The states before; rows of its caches at its position are written.
            into: Memory for the moving states; None: the module brings it.

        Returns:
            The outputs, in memory that the next call may overwrite, and the moving states.

        Raises:
            TargetError: The call failed on the device.
        """
        self._write(ids, now.position)
        states = self._in_order([*now.moving, *now.lease.caches.arrays])
        position = now.position if self._takes_position else None
        if self._outputs is None:
            return self._call_for_memory(states, position)
        assert into is not None, "a module takes memory for all its results or for none"
        self._invoke([array.ref for array in states], position, into, now.position)
        return self._outputs, into

    def append(self, token: int, now: Held, caches: Caches, into: list[DeviceArray]) -> None:
        """`call` for one row, where `is_for` says so, with as little code as possible.

        Weights that go through the caches leave nothing of it there, and each line of memory that it takes to append a
        token is fetched anew: 300 us went so where Python itself took 20.
        """
        row, position, filled = self._row, now.position, self.filled
        assert row is not None
        row.ids[0] = token
        for cells in row.positions:
            for i in range(len(cells)):
                cells[i] = position
        if position != filled and row.columns is not None:
            if filled == position - 1:
                self.filled = -1  # unknown: a Ctrl-C may come before the column is written
                row.columns[filled] = 1
                self.filled = position
            else:
                self.write_columns(position)
        states = [array.ref for array in now.moving]
        states += [array.ref for array in caches.arrays]
        self._invoke(self._in_order(states), position if self._takes_position else None, into, position)

    def refs_before(self, moving: Sequence[DeviceArray], caches: Caches) -> list[Any]:
        """The inputs and the states before it, as a call takes them."""
        return [*self._refs[0], *self._in_order([array.ref for array in (*moving, *caches.arrays)])]

    def _invoke(self, states: Sequence[Any], number: int | None, moving: Sequence[DeviceArray], position: int) -> None:
        inputs, draw, outputs = self._refs
        storage = [*outputs, *[array.ref for array in moving]]
        alone = position < self._alone
        tied = self._module.call_step(self._symbol, [*inputs, *states, *draw], number, storage, alone)
        if tied != self._tied:
            raise TargetError("wrong number of results", where=self._symbol, got=tied, expected=self._tied)

    def submit(self, ids: HostArray | Step, now: Held, into: list[DeviceArray]) -> Callable[[], None]:
        """`call` on a device with a queue of its own: comes back at once.

        Until it is done nothing of the step, of `now` and of the moving states is used otherwise.

        Args:
            ids: Token ids, or the step that was submitted before it and chooses them.
            now: The states before.
            into: Memory for the moving states.

        Returns:
            What waits until it is done.
        """
        assert self._outputs is not None, "only modules that take memory for their results have such steps"
        inputs = list(self._inputs)
        if isinstance(ids, Step):
            assert ids._outputs is not None
            inputs[self._ids_at] = ids._outputs[ids._logits_at]
            self._write(None, now.position)
        else:
            self._write(ids, now.position)
        states = self._in_order([*now.moving, *now.lease.caches.arrays])
        position = now.position if self._takes_position else None
        storage = [*self._outputs, *into]
        return self._module.submit_step(self._symbol, [*inputs, *states, *self._draw], position, storage)

    @property
    def outputs(self) -> Sequence[DeviceArray]:
        """The memory of its outputs, where the module takes it."""
        return self._outputs or ()

    @property
    def alone(self) -> int:
        """Of its entry point, see `EntryPoint`."""
        return self._alone

    @property
    def limit(self) -> int:
        """Tokens that there is room for."""
        return _MANY if self._limit is None else self._limit

    @property
    def is_one_row(self) -> bool:
        """Whether it can `append`."""
        return self._row is not None

    @property
    def symbol(self) -> str:
        """The function that it calls."""
        return self._symbol

    @property
    def ids_dtype(self) -> np.dtype[Any]:
        """Of the token ids."""
        return self._dtype

    def start_packed(self) -> memoryview:
        """Where a packed call finds its token; of the positions the module writes the low halves."""
        assert self._row is not None
        self.start_positions()
        return self._row.ids

    def start_positions(self) -> None:
        """Makes what is written into the low halves of numbers, as a loop in the module does, all of them."""
        for view, _ in self._positions:
            view.fill(0)

    def is_alone(self, position: int) -> bool:
        """Whether the calling thread does it without workers."""
        return position < self._alone

    def steps_alike(self, position: int) -> int:
        """How many steps there is room for from a position on, up to where workers take over."""
        ends = [end for end in (self._limit, self._alone) if end is not None and end > position]
        has_room = self._limit is None or position < self._limit
        return min(ends, default=_MANY) - position if has_room else 0

    def start_loop(self, now: Held, storage: Sequence[DeviceArray]) -> list[Any]:
        """What a call of several steps takes of this one: its inputs but the ids, states, and memory but the token's.

        Args:
            now: The states before the first of them.
            storage: Memory for moving states.
        """
        inputs, _, outputs = self._refs
        self.write_columns(now.position)
        self.filled = -1  # unknown until `end_loop`: the module writes a column after each step
        states = self._in_order([array.ref for array in (*now.moving, *now.lease.caches.arrays)])
        others = [ref for i, ref in enumerate(outputs) if i != self._logits_at]
        ids, following = self._ids_at, [array.ref for array in storage]
        return [*inputs[:ids], *inputs[ids + 1 :], *states, *others, *following]

    def end_loop(self, position: int) -> None:
        """Says how many tokens are committed after it."""
        self.filled = position

    @property
    def draws(self) -> bool:
        """Whether its entry point draws tokens."""
        return self._rows > 0

    def read_all(self) -> dict[str, HostArray]:
        """`read` of its own memory."""
        assert self._outputs is not None
        return self.read(self._outputs)

    def read(self, outputs: Sequence[DeviceArray]) -> dict[str, HostArray]:
        """Copies of the outputs of the last call, by name."""
        device, views = self._module.device, self._views or [None] * len(outputs)
        found: dict[str, HostArray] = {}
        for spec, view, output in zip(self._manifest.outputs, views, outputs, strict=True):
            if self._cut and spec.role == "logits" and spec.token_axis is not None:
                found[spec.name] = self._last_row(spec.token_axis, view, output)
            else:
                found[spec.name] = view.copy() if view is not None else device.to_host(output)
        return found

    def _last_row(self, axis: int, view: HostArray | None, output: DeviceArray) -> HostArray:
        rows = output.shape[axis]
        if view is None:
            return self._module.device.to_host_rows(output, axis, rows - 1, rows)
        return view[(slice(None),) * axis + (slice(rows - 1, rows),)].copy()

    def logits(self, outputs: Sequence[DeviceArray]) -> HostArray:
        """The logits of the last call, of a model that has them once, in their own memory where the host reads it."""
        view = self._views[self._logits_at] if self._views else None
        return view if view is not None else self._module.device.to_host(outputs[self._logits_at])

    def token(self) -> int:
        """`chosen` of one row."""
        view = self._views[self._logits_at]
        assert view is not None
        return int(view.item())

    def chosen(self) -> HostArray:
        """A copy of what the last call chose, [B, 1], where the entry point is one that chooses; -1 for NaN."""
        assert self._outputs is not None
        return self.logits(self._outputs).copy()

    def _write(self, ids: HostArray | None, position: int) -> None:
        if ids is not None:
            self._ids[...] = ids
        for view, counted in self._positions:
            if self.tokens == 1:
                view.fill(position)
            else:
                np.add(counted, position, out=view, casting="unsafe")
        self.write_columns(position)

    def write_columns(self, position: int) -> None:
        """Writes the columns of the mask of as many committed tokens."""
        filled, columns = self.filled, self._columns
        if columns is not None and position != filled:
            self.filled = -1  # unknown: a Ctrl-C may come before the columns are written
            if filled < 0:
                columns.fill(0)
            columns[..., max(filled, 0) : position] = 1
            columns[..., position : max(filled, position)] = 0
            self.filled = position

    def _start_mask(self, spec: InputSpec, view: HostArray) -> None:
        """Fills the mask of no committed tokens; its columns are kept, those of the new tokens are always there."""
        axis = axis_of(self._manifest, spec.shape, "total")
        view.fill(1)
        if axis is not None:
            self._columns = np.moveaxis(view, axis, -1)[..., : -self.tokens]
            self._columns.fill(0)

    def _one_row(self) -> _Row | None:
        """Where the numbers of one row are; None for several, and for modules that bring their results' memory."""
        first = [view for view, _ in self._positions]
        views = [self._ids, *first, *([] if self._columns is None else [self._columns])]
        is_one = self._ids.shape == (1, 1) and self._outputs is not None
        columns = self._columns
        if columns is not None and columns.size != columns.shape[-1]:
            is_one = False
        if not is_one or any(view.dtype.kind not in "iub" for view in views):
            return None
        low, high = self._range
        numbers = [view.reshape(-1).data for view in first]
        cells = None if columns is None else columns.reshape(-1).data
        return _Row(self._ids.reshape(-1).data, numbers, cells, low, high)

    def _call_for_memory(
        self, states: Sequence[DeviceArray], position: int | None
    ) -> tuple[list[DeviceArray], list[DeviceArray]]:
        m = self._manifest
        dtypes = [spec.dtype for spec in (*m.outputs, *m.states)]
        numbers = [] if position is None else [position]
        results = self._module.call(self._symbol, [*self._inputs, *states, *numbers], dtypes)
        count = len(m.outputs)
        return results[:count], [new for spec, new in zip(m.states, results[count:], strict=True) if not spec.in_place]


def _bytes_of(view: HostArray) -> memoryview:
    """The memory of an array, byte by byte."""
    return view.reshape(-1).view(np.uint8).data


def ids_alone(spec: InputSpec, inputs: object) -> HostArray | None:
    """The token ids of a call that gives nothing else, those of one row as [1, T]; None for any other call.

    Raises:
        InputError: Not token ids.
    """
    if type(inputs) is not dict or len(inputs) != 1 or spec.name not in inputs:  # pyright: ignore[reportUnknownArgumentType]
        return None
    ids = as_array(spec, inputs[spec.name])
    return ids[None] if ids.ndim == 1 and len(spec.shape) == 2 else ids


def step_shapes(manifest: Manifest, batch: int, tokens: int = 1) -> list[tuple[int, ...]] | None:
    """The shapes of the inputs of a step; None where a step is not just tokens, a position and columns of a mask.

    So it is where a mask grows with every token (an open context), or where there is an input of another kind.
    """
    m = manifest
    if sum(spec.role == "tokens" for spec in m.inputs) != 1 or any(s.role not in _PREPARED_ROLES for s in m.inputs):
        return None
    grows = any(axis_of(m, spec.shape, "total") is not None for spec in m.inputs if spec.role == "attention_mask")
    if grows and m.max_context is None:
        return None
    past = m.max_context or 0
    sizes = Sizes(m, batch=batch, tokens=tokens, past=past, total=past + tokens)
    try:
        shapes = [sizes.concrete(spec.name, spec.shape) for spec in m.inputs]
    except InputError:
        return None
    ids = next(shape for spec, shape in zip(m.inputs, shapes, strict=True) if spec.role == "tokens")
    return shapes if ids == (batch, tokens) else None


def _by_token(manifest: Manifest, spec: InputSpec, view: HostArray) -> HostArray:
    """A view of position ids whose last axis is that of the tokens."""
    axis = axis_of(manifest, spec.shape, "tokens")
    return view if axis is None else np.moveaxis(view, axis, -1)
