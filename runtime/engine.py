"""Engine: a module on a device and its calls, which programs, sessions and snapshots share.

It is what they have in common and no user needs: calls of entry points one at a time, memory for their inputs and
outputs, and who is to let go of device memory when the program closes.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from .collect import find_wanted
from .device import Device, DeviceArray, HostArray, numpy_dtype
from .dlpack import borrowed
from .errors import InputError
from .lane import PackedStep
from .manifest import EntryPoint, Manifest
from .module import Module
from .pool import Pool
from .result_specs import ResultSpec
from .state import next_states, state_shape
from .step import Step, ids_alone, step_shapes
from .step_loop import StepLoop
from .turns import Turns
from .usage import MemoryUse

if TYPE_CHECKING:
    from .program import Program

_LARGE_INPUT = 1 << 18  # bytes; above it a copy to the device pays off
_KEPT_INPUTS = 64
_KEPT_STEPS = 32
_MOST_WORKERS = 64
_SMALL_OUTPUT = 1 << 19  # elements; below it the device writes to the host's memory sooner than a copy is submitted

_Holder = TypeVar("_Holder")


class Holding(NamedTuple):
    """What a session or a snapshot does with device memory.

    Attributes:
        release: Lets go of it.
        arrays: What it holds.
    """

    release: Callable[[Any], None]
    arrays: Callable[[Any], Iterable[DeviceArray]]


class Engine:
    """Calls of one loaded module.

    Args:
        module: Linked to its device.
        manifest: What it says about itself.
    """

    def __init__(self, module: Module, manifest: Manifest) -> None:
        self.module = module
        self.manifest = manifest
        self.lock = threading.RLock()
        """`exclusive` for whoever has looked whether it is usable."""
        self._inputs: dict[tuple[int, tuple[int, ...]], DeviceArray] = {}
        self._outputs: dict[str, list[DeviceArray]] = {}
        self._steps: dict[tuple[int, int, bool], Step | None] = {}
        self._choosers: dict[int, list[Step]] = {}  # those that nobody uses
        self._row_choosers: dict[bool, Step | None] = {}
        self._loops: dict[int, StepLoop | None] = {}
        self._packed: list[PackedStep | None] = []
        self.turns = Turns()
        self.pool = Pool(module.device, keeps=self.takes_results)
        """Memory for states."""
        self._workers: ThreadPoolExecutor | None = None
        self._holders: weakref.WeakKeyDictionary[object, Holding] = weakref.WeakKeyDictionary()
        self._holders_lock = threading.Lock()
        tokens = [spec for spec in manifest.inputs if spec.role == "tokens"]
        self._ids = tokens[0] if len(tokens) == 1 else None
        sizes = {entry.tokens for entry in manifest.entry_points}
        self._step_sizes = {1} if None in sizes else {1, *sizes}  # what takes any number of tokens takes all but one
        names = [spec.name for spec in manifest.outputs]
        self.plain = {which: find_wanted(names, None, which) for which in ("all", "last")}
        """What a call wants that asks for nothing but which logits."""
        self._result_dtypes = [spec.dtype for spec in (*manifest.outputs, *manifest.states)]

    @property
    def device(self) -> Device:
        """Where it runs."""
        return self.module.device

    def check_usable(self) -> None:
        """Refuses whatever would use the device in vain.

        Raises:
            StateError: The program has been closed.
            TargetError: This process was forked from the one that loaded it.
        """
        self.module.check_usable()

    def adopt(
        self,
        holder: _Holder,
        release: Callable[[_Holder], None],
        arrays: Callable[[_Holder], Iterable[DeviceArray]],
    ) -> None:
        """Lets `close` free what a session or a snapshot holds, and `memory` count it; it may go at any time."""
        with self._holders_lock:
            self._holders[holder] = Holding(cast(Any, release), cast(Any, arrays))

    def memory(self) -> MemoryUse:
        """See `Program.memory`."""
        m, module = self.manifest, self.module
        with self.exclusive(), self._holders_lock:
            held = {id(array): array for one, holding in self._holders.items() for array in holding.arrays(one)}
            steps = [step.nbytes for step in self._steps.values() if step is not None]
            steps += [step.nbytes for free in self._choosers.values() for step in free]
            steps += [step.nbytes for step in {*self._row_choosers.values()} if step is not None]
            steps += [packed.nbytes for packed in self._packed if packed is not None]
            loops = [loop for loop in self._loops.values() if loop is not None]
            steps += [loop.nbytes + (loop.step.nbytes if loop.rows > 1 else 0) for loop in loops]
            kept = [*self._inputs.values(), *(array for arrays in self._outputs.values() for array in arrays)]
        batch = m.batch or 1
        sizes = [
            math.prod(state_shape(m, spec, batch, m.max_context or 0)) * numpy_dtype(spec.dtype).itemsize
            for spec in m.states
        ]
        again = sum(size for size, spec in zip(sizes, m.states, strict=True) if not spec.in_place)
        return MemoryUse(
            device=self.device.uri,
            files=module.file_bytes,
            weights=module.loaded_bytes,
            workspace=module.workspace_now + sum(steps) + sum(array.nbytes for array in kept),
            session=sum(sizes) + again,
            batch=batch,
            held=sum(array.nbytes for array in held.values()),
            kept=self.pool.nbytes,
        )

    def close(self) -> None:
        """See `Program.close`."""
        if self.module.is_foreign:  # a lock may be held by a thread that is not in this process
            self.module.close()
            return
        with self.lock:
            self.module.close()
            self._inputs.clear()
            self._steps.clear()
            self._choosers.clear()
            self._row_choosers.clear()
            self._loops.clear()
            self._packed.clear()
            if self._workers is not None:
                self._workers.shutdown(wait=False, cancel_futures=True)
            self._outputs.clear()
            self.pool.close()
            with self._holders_lock:
                for holder, holding in self._holders.items():
                    holding.release(holder)

    def exclusive(self) -> AbstractContextManager[object]:
        """No other thread's call runs inside, so that the outputs of one's own call stay as they are."""
        self.check_usable()
        return self.lock

    def call(
        self,
        entry: EntryPoint,
        inputs: Sequence[HostArray | DeviceArray],
        states: Sequence[DeviceArray],
        position: int,
        last: bool = False,
        into: Sequence[DeviceArray | None] | None = None,
    ) -> tuple[list[DeviceArray], list[DeviceArray]]:
        """Calls one entry point with arrays of exactly its shapes, and waits.

        Args:
            entry: Which one.
            inputs: One array per graph input, in manifest order, in the shapes that the module takes; the CPU reads
                large ones where they are.
            states: One device array per state; those with `in_place` are written to.
            position: P.
            last: The last position's logits will do: the others are left out where the module can do without them.
            into: Arrays like the states (None for those with `in_place`), to hold the next ones where the module
                `takes_results`. Left out: new ones.

        Returns:
            The outputs, in arrays that the next call of the entry point may overwrite, and the states after the call.

        Raises:
            TargetError: The call failed.
        """
        m = self.manifest
        symbol = entry.last if last and entry.last else entry.symbol
        self.check_usable()
        with self.lock:  # the inputs' buffers are used again in the next call
            self.check_usable()  # another thread may have closed it by now
            arguments: list[DeviceArray | int] = [self._input(i, array) for i, array in enumerate(inputs)]
            arguments += states
            if m.takes_position:
                arguments.append(position)
            storage = self._storage(symbol, into)
            alone = position < entry.alone
            results = self.module.call(symbol, arguments, self._result_dtypes, storage, alone=alone)
        count = len(m.outputs)
        return results[:count], next_states(m, states, results[count:])

    def not_finite(self, states: Sequence[DeviceArray]) -> list[HostArray] | None:
        """What is not finite in each state of floats, see `Manifest.finite`; None: the module does not tell."""
        symbol = self.manifest.finite
        specs = self.module.result_specs(symbol) if symbol is not None else None
        if symbol is None or specs is None:
            return None
        with self.exclusive():
            if symbol not in self._outputs:
                self._outputs[symbol] = [self.device.host_buffer(s[1], s[0]) for s in specs if s is not None]
            memory = self._outputs[symbol]
            self.module.call(symbol, states, [array.dtype for array in memory], memory)
            return [self.device.to_host(array) for array in memory]

    def ids_alone(self, inputs: object) -> HostArray | None:
        """The token ids of a session's call that gives nothing else; None for any other call.

        Raises:
            InputError: Not token ids.
        """
        return None if self._ids is None else ids_alone(self._ids, inputs)

    def step(self, batch: int, tokens: int = 1, *, last: bool = False) -> Step | None:
        """What is prepared for so many tokens of every row; None where there is no such entry point or `Step`.

        Args:
            batch: Rows.
            tokens: Of a row: one, or a block.
            last: The last position's logits are wanted, not all.
        """
        if tokens not in self._step_sizes:
            return None
        key = batch, tokens, last and tokens > 1
        if key not in self._steps:
            with self.exclusive():
                if len(self._steps) > _KEPT_STEPS:
                    self._steps.clear()
                self._steps[key] = self._prepare(*key)
        return self._steps[key]

    def _prepare(self, batch: int, tokens: int, last: bool) -> Step | None:
        m = self.manifest
        entries = {entry.tokens: entry for entry in m.entry_points}
        entry = entries.get(tokens) or entries.get(None)
        shapes = step_shapes(m, batch, tokens)
        if entry is None or shapes is None:
            return None
        symbol = (last and entry.last) or entry.symbol
        outputs = self._output_memory(symbol)
        if tokens > 1 and outputs is None:  # the states would share memory with large outputs
            return None
        return Step(self.module, m, symbol, shapes, outputs, entry.alone, cut=last and not entry.last)

    def row_chooser(self, draws: bool) -> Step | None:
        """The step of one row that chooses tokens, for whoever has the lock; None: `take_chooser` may have one.

        Args:
            draws: Whether the largest logits are not enough.
        """
        if draws not in self._row_choosers:
            with self.exclusive():
                can = not self.device.has_queue and self.manifest.batch in (None, 1)
                step = self.take_chooser(1, draws=draws) if can else None
                other = self._row_choosers.get(not draws)
                is_same = step is not None and other is not None and other.draws == step.draws
                self._row_choosers[draws] = other if is_same else step
        return self._row_choosers[draws]

    def packed_step(self) -> PackedStep | None:
        """What steps of one row are packed by, for whoever has the lock; None where there is no such function."""
        if not self._packed:
            with self.exclusive():
                entry = next((entry for entry in self.manifest.entry_points if entry.packed), None)
                step = self.step(1) if entry is not None and not self.device.has_queue else None
                packed, names = None, [spec.name for spec in self.manifest.outputs]
                if entry is not None and entry.packed and step is not None and step.is_one_row and len(names) == 1:
                    packed = PackedStep(self.module, entry.packed, step, names[0], self.lock)
                self._packed.append(packed)
        return self._packed[0]

    def loop(self, batch: int) -> StepLoop | None:
        """Several steps of so many rows in a call, for whoever has the lock; None where there is no such function."""
        if batch not in self._loops:
            with self.exclusive():
                name = next((entry.steps for entry in self.manifest.entry_points if entry.steps), None)
                can = name is not None and not self.device.has_queue and self.manifest.batch == batch
                step = (self.row_chooser(False) if batch == 1 else self.take_chooser(batch)) if can else None
                self._loops[batch] = None
                if name is not None and step is not None:
                    self._loops[batch] = StepLoop(self.module, name, step, batch)
        return self._loops[batch]

    def take_chooser(self, batch: int, *, draws: bool = False) -> Step | None:
        """A step of the entry point that chooses tokens, for whoever takes it alone; None where there is none.

        Args:
            batch: Rows.
            draws: Whether the largest logits are not enough.
        """
        m = self.manifest
        draw = next((entry.draw for entry in m.entry_points if entry.draw), None)
        if draws and draw is None:
            return None
        if free := self._choosers.get(batch):
            return free.pop()
        entry = next((entry for entry in m.entry_points if entry.draw or entry.token), None)
        symbol = draw or (entry.token if entry is not None else None)
        shapes = step_shapes(m, batch) if symbol is not None else None
        specs = self.module.result_specs(symbol) if symbol is not None else None
        if entry is None or symbol is None or shapes is None or specs is None:
            return None
        return Step(self.module, m, symbol, shapes, self._new_outputs(specs), entry.alone, batch if draw else 0)

    def give_back(self, batch: int, step: Step) -> None:
        """Lets others have a step that is done."""
        free = self._choosers.setdefault(batch, [])
        if len(free) < _KEPT_STEPS:
            free.append(step)

    @property
    def workers(self) -> ThreadPoolExecutor:
        """The threads that submitted calls run in, started with the first of them."""
        with self._holders_lock:  # not that of calls, which may be held for as long as a block takes
            if self._workers is None:
                self._workers = ThreadPoolExecutor(_MOST_WORKERS, thread_name_prefix="linattn")
            return self._workers

    @property
    def takes_results(self) -> bool:
        """Whether calls write their results where they are told to."""
        return self.module.result_specs(self.manifest.entry_points[0].symbol) is not None

    def _storage(self, symbol: str, into: Sequence[DeviceArray | None] | None) -> list[DeviceArray | None] | None:
        """Memory for the results of an entry point: the outputs' is kept, small ones where the host reads them."""
        specs, outputs = self.module.result_specs(symbol), self._output_memory(symbol)
        if specs is None or outputs is None:
            return None
        following = specs[len(outputs) :]
        given = into if into is not None else [None] * len(following)
        states: list[DeviceArray | None] = []
        for spec, array in zip(following, given, strict=True):
            states.append(None if spec is None else array or self.device.empty(spec[1], spec[0]))
        return [*outputs, *states]

    def _output_memory(self, symbol: str) -> list[DeviceArray] | None:
        """Memory for the outputs of an entry point, kept from call to call; None where the module brings it."""
        specs = self.module.result_specs(symbol)
        if specs is not None and symbol not in self._outputs:
            self._outputs[symbol] = self._new_outputs(specs)
        return self._outputs.get(symbol)

    def _new_outputs(self, specs: Sequence[ResultSpec | None]) -> list[DeviceArray]:
        """Memory for outputs, small ones where the host reads them."""
        return [
            self.device.host_buffer(spec[1], spec[0])
            if math.prod(spec[1]) <= _SMALL_OUTPUT
            else self.device.empty(spec[1], spec[0])
            for spec in specs[: len(self.manifest.outputs)]
            if spec is not None
        ]

    def _input(self, index: int, array: HostArray | DeviceArray) -> DeviceArray:
        """A graph input where the device can read it; for as long as the call takes."""
        if isinstance(array, DeviceArray):
            return array
        dtype = self.manifest.inputs[index].dtype
        if array.nbytes > _LARGE_INPUT:
            own = borrowed(self.device, array, dtype) if self.takes_results else None  # else a result may be an input
            return own if own is not None else self.device.upload(array, dtype)
        key = index, array.shape
        if key not in self._inputs:
            if len(self._inputs) > _KEPT_INPUTS:  # an open context has another mask in every step
                self._inputs.clear()
            self._inputs[key] = self.device.host_buffer(array.shape, dtype)
        self.device.write(self._inputs[key], array)
        return self._inputs[key]


def engine_of(program: Program) -> Engine:
    """What a program and its sessions share; for the files of the runtime, users have no use of it."""
    engine: Engine | None = getattr(program, "_engine", None)
    if engine is None:
        raise InputError("not a program", where="program", got=type(program).__name__, expected="Program.load(...)")
    return engine
