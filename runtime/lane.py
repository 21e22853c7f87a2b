"""Steps of one row that follow one another, whose arguments are packed once: states go to and fro between two memories.

The weights of a step leave nothing of Python in a CPU's caches, and each line of memory that it takes to append a token
is fetched anew, which is most of what a step takes beyond the call. So all that such steps take lies together here,
`Lane.run` is one function, and a session is told where it stands only when it is asked for something else (`close`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import suppress
from sys import getrefcount
from typing import Any, cast

import numpy as np

from .device import Device, DeviceArray, HostArray
from .errors import StateError
from .held import Caches, Held
from .module import Module
from .owned import is_process, keep_to_the_end
from .step import Step

_NUMBERS = 16
"""i32, a line of a cache; the position is the first of them."""
_VIEWS = 32
"""Of an output's memory that are made at once: numpy's way to a view is longer than all the rest of a step's."""


_KEPT_OUTPUTS = 8


class Output:
    """Memory for the output of a step, which callers get and let go of: it is written again once nobody has it.

    Args:
        device: A CPU.
        array: The memory.
    """

    __slots__ = ("__weakref__", "alone", "array", "owner", "view", "views")

    def __init__(self, device: Device, array: DeviceArray) -> None:
        keep_to_the_end(array.allocator)  # views do not keep it, and crash where it is freed before their memory
        view = device.host_view(array)
        assert view is not None, "only on CPUs"
        owner = view
        while isinstance(base := cast(object, owner.base), np.ndarray):
            owner = cast(HostArray, base)
        self.array = array
        self.view: HostArray = view
        self.owner: HostArray = owner  # what all views of the memory hold, however they were made
        del view, owner, base
        self.views = list[HostArray]()
        self.alone = getrefcount(self.owner)
        """References to the memory where no caller has it, but for those of `views`."""

    def is_free(self) -> bool:
        """Whether no caller has it."""
        return getrefcount(self.owner) == self.alone + len(self.views)


class Side:
    """A step from one set of memory for moving states to the other one.

    Args:
        before: The moving states before it.
        into: Those behind it.
        caches: What it writes to in place.
        output: What it writes besides.
        is_copied: Callers get copies of the output.
        arguments: All of these, as a call takes them.
    """

    __slots__ = ("arguments", "before", "caches", "into", "is_copied", "output")

    def __init__(
        self,
        before: list[DeviceArray],
        into: list[DeviceArray],
        caches: Caches,
        output: Output,
        is_copied: bool,
        arguments: Any,
    ) -> None:
        self.before, self.into, self.caches = before, into, caches
        self.output, self.is_copied, self.arguments = output, is_copied, arguments

    def read(self) -> HostArray:
        """What the last call wrote, for a caller, where the output has no `views`."""
        output = self.output
        if self.is_copied:
            return output.view.copy()
        output.views = [output.view.view() for _ in range(_VIEWS)]
        return output.views.pop()


class Lane:
    """Steps of one session that follow one another; while it is open it knows where the session stands.

    Args:
        packed: What all lanes of a program have in common.
        free: Of the session, empty while a thread is inside.
        now: What it holds.
        into: Memory for the moving states behind the next step.
    """

    __slots__ = (
        "_alone_until",
        "_back",
        "_free",
        "_function",
        "_ids",
        "_limit",
        "_lock",
        "_module",
        "_now",
        "_numbers",
        "_packed",
        "_reached",
        "_results",
        "_side",
        "_step",
        "_token_of",
        "_workspace",
        "is_open",
        "position",
    )

    def __init__(self, packed: PackedStep, free: list[None], now: Held, into: list[DeviceArray]) -> None:
        module, step = packed.module, packed.step
        self._side: Side = packed.side(now, now.moving, into)
        self._back: Side = packed.side(now, into, now.moving)
        self._packed, self._module, self._step, self._free, self._now = packed, module, step, free, now
        self._ids, self._numbers, self._token_of, self._lock = packed.ids, packed.numbers, step.token_of, packed.lock
        self._limit, self._alone_until = step.limit, step.alone
        self._function, self._results = module.functions[packed.symbol], module.no_results()
        self._workspace = module.workspace_ref
        self.is_open, self.position, self._reached = False, 0, 0

    def run(self, inputs: object) -> dict[str, HostArray] | None:
        """A session's call that appends one token; None: nothing was done, it is another call or takes more.

        Raises:
            StateError: Another thread is inside.
            TargetError: The call failed on the device.
        """
        token, free, module = self._token_of(inputs), self._free, self._module
        if token is None or not is_process(module.pid):
            return None
        try:
            free.pop()
        except IndexError:
            raise in_use() from None
        lock = self._lock
        try:
            if not lock.acquire(False):  # less code to be fetched than `with`
                lock.acquire()
            try:
                side, step, position = self._side, self._step, self.position
                if not self.is_open or position >= self._limit or self._reached != position:
                    return None
                if self._now.shared or module.workspace_ref is not self._workspace:
                    return None
                output = side.output
                if getrefcount(output.owner) != output.alone + len(output.views):  # a caller keeps what it was given
                    side = self._side = self._packed.side(self._now, side.before, side.into, is_copied=True)
                    output = side.output
                if step.filled != position - 1:
                    step.write_columns(position)
                step.filled = -1  # unknown until it is done: the module writes the column of the token before
                self._ids[0] = token
                self._numbers[0] = position
                self._reached = position + 1
                module.call_packed(self._function, side.arguments, self._results, position < self._alone_until)
                step.filled = position
                views = output.views
                found = {self._packed.name: views.pop() if views and not side.is_copied else side.read()}
                self._side, self._back, self.position = self._back, side, position + 1
                return found
            finally:
                lock.release()
        finally:
            free.append(None)

    def last_call(self) -> Callable[[], None] | None:
        """What does the last step again, which changes nothing, for measuring the call; None: there has been none."""
        module, side, alone = self._module, self._back, self.position <= self._alone_until
        if not self.is_open or self.position == self._now.position:
            return None
        return lambda: module.call_packed(self._function, side.arguments, self._results, alone)

    def fits(self, now: Held, into: list[DeviceArray]) -> bool:
        """Whether its sides are the ways between these memories; whoever asks has closed it."""
        if now is not self._now or now.lease.caches is not self._side.caches:
            return False
        if now.moving is self._back.before:
            self._side, self._back = self._back, self._side
        is_same = now.moving is self._side.before and into is self._side.into
        return is_same and self._module.workspace_ref is self._workspace

    def open(self) -> bool:
        """Knows from now on where the session stands; False: not so, others have rows of its caches behind its own."""
        now = self._now
        self.position = self._reached = now.position
        self.is_open = True  # comes first, so that nothing is claimed behind a Ctrl-C
        self.is_open = now.lease.caches.claim(now.lease)
        return self.is_open

    def close(self, spare: list[list[DeviceArray]]) -> None:
        """Says what the session holds; twice is fine.

        Args:
            spare: Its memory for moving states, of which the last one is the lane's.
        """
        if self.is_open:
            now, side, position = self._now, self._side, self.position
            now.lease.caches.stand(now.lease, position, self._reached)
            now.moving, spare[-1], now.position, self.is_open = side.before, side.into, position, False

    def __del__(self) -> None:
        with suppress(AttributeError):  # it was not made whole
            self._packed.keep(self._side.output, self._back.output)


class PackedStep:
    """What the lanes of a program have in common; it is used with the program's lock.

    Args:
        module: The loaded module, on a CPU.
        symbol: Its function, see `packed` in README.md.
        step: Of one row and one output, whose memory inputs are in.
        name: Of the output.
        lock: The program's.
    """

    def __init__(self, module: Module, symbol: str, step: Step, name: str, lock: Any) -> None:
        self.module, self.symbol, self.step, self.name, self.lock = module, symbol, step, name, lock
        self._outputs = weakref.WeakSet[Output]()
        self._kept = list[Output]()
        self._memory = module.device.host_buffer([_NUMBERS], "int32")
        numbers = module.device.host_view(self._memory)
        assert numbers is not None, "only on CPUs"
        numbers.fill(0)
        self.numbers: memoryview = numbers.data
        self.ids = step.start_packed()

    def side(self, now: Held, before: list[DeviceArray], into: list[DeviceArray], *, is_copied: bool = False) -> Side:
        """Packs the arguments of a step.

        Args:
            now: Whose caches it writes to.
            before: The moving states before it.
            into: Memory for those behind it.
            is_copied: Callers get copies of the output.

        Raises:
            TargetError: No memory.
        """
        caches, output = now.lease.caches, self._take_output()
        refs = [*self.step.refs_before(before, caches), self._memory.ref, output.array.ref]
        packed = self.module.pack(self.step.symbol, [*refs, *(array.ref for array in into)])
        return Side(before, into, caches, output, is_copied, packed)

    def _take_output(self) -> Output:
        while self._kept:
            with suppress(IndexError):
                output = self._kept.pop()
                if output.is_free():
                    return output
        device, like = self.module.device, self.step.outputs[0]
        output = Output(device, device.host_buffer(like.shape, like.dtype))
        self._outputs.add(output)
        return output

    def keep(self, *outputs: Output) -> None:
        """Keeps some for lanes to come; at any time, for the collector may ask for it."""
        self._kept += outputs
        del self._kept[:-_KEPT_OUTPUTS]

    @property
    def nbytes(self) -> int:
        """Of the memory of inputs and outputs that lanes have beside their step's."""
        return self._memory.nbytes + sum([output.array.nbytes for output in list(self._outputs)])


def in_use() -> StateError:
    """What a second thread in a session is told."""
    return StateError("the session is in use by another thread", hint="use one session per thread")
