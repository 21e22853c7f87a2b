"""Session: one sequence (or one batch of them) with its states on the device."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import binding
from .arrays import as_array
from .binding import Sizes
from .device import DeviceArray, HostArray, numpy_dtype
from .errors import InputError, StateError
from .manifest import OutputSpec
from .owned import Owned
from .program import block_inputs, check_room, complete_inputs
from .state import read_state, state_shape, zero_states

if TYPE_CHECKING:
    from .program import Program

_COMPACT_BYTES = 16 << 20
_SPARE_STATES = 2


class Session(Owned):
    """The states of one sequence, or of B rows of equal length.

    A call commits every state or none: when `run` raises, position and states are as they were. A session is for one
    thread at a time; sessions of one program may run in different threads.

    Get it from `Program.session`.
    """

    _copy_hint = "start another one with program.session(); fork(), which is to branch a sequence, does not exist yet"

    def __init__(self, program: Program, batch: int | None = None) -> None:
        manifest = program.manifest
        if batch is not None and manifest.batch is not None and batch != manifest.batch:
            hint = "compile with --batch open for any"
            raise InputError("wrong batch", where="batch", got=batch, expected=manifest.batch, hint=hint)
        if batch is not None and batch < 1:
            raise InputError("wrong batch", where="batch", got=batch, expected="at least 1")
        self._program = program
        self._manifest = manifest
        self._fixed_batch = batch if batch is not None else manifest.batch
        self._busy = threading.Lock()
        self._batch: int | None = None
        self._arrays: list[DeviceArray] = []
        self._spare: list[list[DeviceArray]] = []  # memory of states that nobody needs any more
        self._position = 0
        self._mask: HostArray | None = None  # columns of committed tokens, once a caller has masked one
        if self._fixed_batch is not None:
            self._allocate(self._fixed_batch)

    @property
    def program(self) -> Program:
        """The program it runs."""
        return self._program

    @property
    def position(self) -> int:
        """Number of tokens committed."""
        return self._position

    def reset(self) -> None:
        """Forgets everything: zero states (KV caches too, since 0 * NaN is NaN), position 0.

        A batch size that the first call had decided is forgotten too.
        """
        with self._exclusive():
            arrays = self._arrays
            self._arrays = []
            self._position, self._mask, self._batch = 0, None, None
            if self._fixed_batch is None:
                return
            past = self._manifest.max_context or 0
            shapes = [state_shape(self._manifest, spec, self._fixed_batch, past) for spec in self._manifest.states]
            if [array.shape for array in arrays] == shapes:  # new memory costs a GPU's driver milliseconds
                self._program.device.fill_zero(arrays)
                self._arrays, self._batch = arrays, self._fixed_batch
            else:
                self._allocate(self._fixed_batch)

    def run(self, inputs: Mapping[str, Any], logits: Literal["all", "last"] = "all") -> dict[str, HostArray]:
        """Appends T tokens and returns the outputs; the tokens are cut into the blocks that the module has.

        Args:
            inputs: Graph inputs by ONNX name: token ids [B, T] (any T; 0 returns empty outputs), other inputs of the
                graph. `attention_mask` ([B, P+T], or [B, T] for the new tokens alone) and `position_ids` may be left
                out. States may not be passed: the session has them.
            logits: `last` returns the last position's logits only ([B, 1, vocabulary]); the rest stays on the device.

        Returns:
            The outputs by ONNX name, joined along their token axis. The states are not among them (see `states`).

        Raises:
            InputError: A wrong name, dtype or shape, an index outside the model's tables, a mask with zeros for a
                model with recurrent or conv states, or no blocks for this number of tokens.
            StateError: The context is full (nothing has run), or another thread is inside.
            TargetError: The call failed on the device.
        """
        if logits not in ("all", "last"):
            raise InputError("unknown choice", where="logits", got=repr(logits), expected="all | last")
        with self._exclusive():
            return self._run(inputs, logits == "last")

    def state(self, name: str) -> HostArray:
        """A copy of one state on the host, in ONNX form (a KV cache has `position` rows).

        Args:
            name: Name of the past input or of the present output.

        Raises:
            StateError: No such state, or an open batch before the first call.
        """
        with self._exclusive():
            for spec, index in zip(self._manifest.states, range(len(self._manifest.states)), strict=True):
                if name in (spec.name, spec.output):
                    array = self._need_arrays()[index]
                    return read_state(self._manifest, self._program.device, spec, array, self._position)
        expected = ", ".join(spec.name for spec in self._manifest.states) or "none: the model has no states"
        raise StateError("no such state", got=name, expected=expected)

    def states(self) -> dict[str, HostArray]:
        """Copies of all states by the name of their past input; see `state`."""
        return {spec.name: self.state(spec.name) for spec in self._manifest.states}

    def release(self) -> None:
        """Frees the states; the program calls it when it closes, after which a session has no use of them."""
        self._arrays, self._spare, self._mask = [], [], None

    def _run(self, inputs: Mapping[str, Any], last: bool) -> dict[str, HostArray]:
        m, past = self._manifest, self._position
        feeds, batch, tokens, mask = self._prepare(inputs)
        if tokens == 0:
            return {spec.name: self._empty(spec, batch) for spec in m.outputs}
        check_room(m, past, tokens)
        binding.check_indices(m, feeds)
        plan = binding.plan_blocks(m, tokens)
        if self._batch is None:
            self._allocate(batch)

        committed = self._arrays
        states, start = committed, 0
        parts: dict[str, list[HostArray]] = {spec.name: [] for spec in m.outputs}
        outputs: list[DeviceArray] = []
        for entry, size in plan:
            outputs = []  # lets go of the block before, which may be large
            block = block_inputs(m, feeds, past, start, size)
            with self._program.exclusive():
                outputs, following = self._program.call(entry, block, states, past + start, last, self._take_spare())
                start += size
                for spec, output in zip(m.outputs, outputs, strict=True):
                    self._collect(parts[spec.name], spec, output, last, start == tokens)
            if states is not committed:
                self._keep_spare(states)
            states = following
        joined = {
            spec.name: found[0] if len(found) == 1 else np.concatenate(found, spec.token_axis or 0)
            for spec, found in ((spec, parts[spec.name]) for spec in m.outputs)
        }
        states = self._compact(states, outputs)
        self._arrays, self._position, self._mask = states, past + tokens, mask
        self._keep_spare(committed)
        return joined

    def _prepare(self, inputs: Mapping[str, Any]) -> tuple[dict[str, HostArray], int, int, HostArray | None]:
        """Checks a call; returns its inputs in ONNX form, B, T, and the mask to remember."""
        m, past = self._manifest, self._position
        for state in m.states:
            if state.name in inputs:
                hint = "use program.run to pass states"
                raise InputError("a session has its own states", where=state.name, hint=hint)
        optional = ("attention_mask", "position_ids")
        required = [spec.name for spec in m.inputs if spec.role not in optional]
        binding.check_names(inputs, [spec.name for spec in m.inputs], required)
        arrays = {spec.name: as_array(spec, inputs[spec.name]) for spec in m.inputs if spec.name in inputs}
        sizes = Sizes(m, past=past) if self._batch is None else Sizes(m, past=past, batch=self._batch)
        for spec in m.inputs:
            if spec.name in arrays and spec.role != "attention_mask":
                sizes.bind(spec.name, spec.shape, arrays[spec.name])
        batch = sizes.set_default("batch", 1)
        tokens = sizes.set_default("tokens", binding.count_tokens(m, sizes, arrays))
        sizes.set_default("total", past + tokens)
        mask = self._merge_mask(arrays, sizes, batch, tokens)
        return complete_inputs(m, arrays, sizes, batch, past, tokens), batch, tokens, mask

    def _merge_mask(self, arrays: dict[str, HostArray], sizes: Sizes, batch: int, tokens: int) -> HostArray | None:
        """Puts the mask of all P+T columns into `arrays` where one was given or is remembered."""
        m, past = self._manifest, self._position
        spec = next((spec for spec in m.inputs if spec.role == "attention_mask"), None)
        if spec is None or (spec.name not in arrays and self._mask is None):
            return None
        axis = binding.axis_of(m, spec.shape, "total")
        given = arrays.get(spec.name)
        if axis is not None and (given is None or given.shape[axis : axis + 1] == (tokens,)) and past:
            old = self._mask if self._mask is not None else binding.full_mask(m, spec, batch, past, 0)
            new = binding.full_mask(m, spec, batch, 0, tokens) if given is None else given
            if new.ndim != old.ndim or new.shape[:axis] != old.shape[:axis]:
                sizes.bind(spec.name, spec.shape, new)
            given = np.concatenate([old, new], axis)
        if given is None:
            return None
        sizes.bind(spec.name, spec.shape, given)
        arrays[spec.name] = given
        if given.all():
            return None
        binding.refuse_padding(m, spec, given)
        return given.copy() if axis is not None else None

    def _collect(self, found: list[HostArray], spec: OutputSpec, output: DeviceArray, last: bool, final: bool) -> None:
        device = self._program.device
        if spec.token_axis is None:
            if final:
                found.append(device.to_host(output))
        elif last and spec.role == "logits":
            if final:
                found.append(device.to_host_last(output, spec.token_axis))
        else:
            found.append(device.to_host(output))

    def _take_spare(self) -> list[DeviceArray] | None:
        """Memory for the next states, None where there is none yet or the module brings it."""
        return self._spare.pop() if self._spare else None

    def _keep_spare(self, states: list[DeviceArray]) -> None:
        """Keeps the memory of states for later ones; two sets are enough, whatever the number of blocks."""
        if self._program.takes_results and len(self._spare) < _SPARE_STATES:
            self._spare.append(states)

    def _compact(self, states: list[DeviceArray], outputs: list[DeviceArray]) -> list[DeviceArray]:
        """Copies states out of an allocation that they share with large outputs, which they would keep alive."""
        if self._program.takes_results or sum(output.nbytes for output in outputs) < _COMPACT_BYTES:
            return states
        moving = [i for i, spec in enumerate(self._manifest.states) if not spec.in_place]
        copies = self._program.device.copy([states[i] for i in moving])
        moved = dict(zip(moving, copies, strict=True))
        return [moved.get(i, state) for i, state in enumerate(states)]

    def _empty(self, spec: OutputSpec, batch: int) -> HostArray:
        sizes = {"batch": batch}
        shape = [dim if isinstance(dim, int) else sizes.get(self._manifest.dims[dim], 0) for dim in spec.shape]
        if spec.token_axis is not None:
            shape[spec.token_axis] = 0
        return np.zeros(shape, numpy_dtype(spec.dtype))

    def _allocate(self, batch: int) -> None:
        self._arrays = zero_states(self._manifest, self._program.device, batch)
        self._batch = batch

    def _need_arrays(self) -> list[DeviceArray]:
        if self._batch is None:
            raise StateError("the batch is open until the first call", hint="use program.session(batch=B)")
        return self._arrays

    @contextmanager
    def _exclusive(self) -> Generator[None]:
        self._program.check_usable()
        if not self._busy.acquire(blocking=False):
            raise StateError("the session is in use by another thread", hint="use one session per thread")
        try:
            yield
        finally:
            self._busy.release()
