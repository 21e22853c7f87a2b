"""Loaded modules and their calls; with `drivers.py`, `opening.py` and `device.py` alone to touch `iree.runtime`.

Facts about IREE 3.13.0 that shape this file (each has a test):

* A `VmContext` must not be entered by two threads at once, so every call of a module holds the module's lock.
* A module at an unaligned address computes zeros (iree#13887), so bytes are copied.
* `VmModule.mmap` wants to write to the file, and closes the map by a call of Python: where an exception travels at that
  time, it is replaced by a SystemError. So the map is made here, and goes with the last reference to it.
* A CPU worker wakes the caller before it is done; see `scheduling.py`.
* The memory of one CPU device is any other's: a module that is linked to two has one set of weights, and calls on both
  take the same arrays.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import iree.runtime as _untyped_rt  # pyright: ignore[reportMissingTypeStubs]

from .device import Device, DeviceArray
from .drivers import CPU_DRIVERS, one_line
from .errors import StateError, TargetError
from .integrity import check_seal
from .manifest import IN_ORDER_KEY, RESULTS_KEY
from .owned import Owned, check_process, is_process
from .result_specs import ResultSpec, read_result_specs
from .scheduling import is_ordinary_thread, set_policy
from .submissions import Submissions, Submitted

_rt: Any = cast(Any, _untyped_rt)
_log = logging.getLogger("linattn.runtime")

_IREE_ERRORS = (RuntimeError, ValueError, LookupError, NotImplementedError)
_WORKSPACE_BYTES = "iree.abi.transients.size.constant"
_LOAD_KERNEL = "load_kernel$"
"""How the names of the functions begin that load one kernel, those with the largest code first."""


class Module(Owned):
    """A module loaded on a device; calls from several threads are let in one at a time.

    Args:
        source: Path of a `.vmfb` file (memory-mapped; do not overwrite it while it is loaded) or its bytes.
        verify: Check every byte of the weights too, in the module and in their own file; see `integrity.py`.

    Raises:
        TargetError: The file is damaged.
    """

    _copy_hint = "load it again: modules of one file share its memory"

    def __init__(self, source: Path | bytes, *, verify: bool = False) -> None:
        self._verify = verify
        self._device: Device | None = None
        self.pid = os.getpid()
        """Of the process that has linked it."""
        self._closed = self._has_workers = False
        self.file = source if isinstance(source, Path) else None
        self.where = str(source) if self.file else "module bytes"
        self.file_bytes = 0
        """Of the module and, once it is linked, of the file with its weights."""
        self.loaded_bytes = 0
        """What linking took on the device."""
        self._lock = threading.Lock()
        self._workspace: DeviceArray | None = None
        self.workspace_ref: Any = None
        """The memory for intermediate values that calls share, as they take it; a larger one may take its place."""
        self._workspace_bytes: dict[str, int | None] = {}
        self._submissions: Submissions | None = None
        self._in_order: dict[str, bool] = {}
        self._flying: dict[object, object] = {}
        self._result_specs: dict[str, list[ResultSpec | None] | None] = {}
        self._instance: Any = _rt.VmInstance()
        self._context: Any = None
        self._alone: Any = None
        check_seal(source, self.where, whole=verify)
        self.file_bytes = source.stat().st_size if isinstance(source, Path) else len(source)
        try:
            if isinstance(source, Path):
                self._module: Any = _rt.VmModule.wrap_buffer(self._instance, _map(source))
            else:  # always copies: a module at an unaligned address computes zeros (iree#13887)
                self._module = _rt.VmModule.copy_buffer(self._instance, source)
            names = [str(name) for name in self._module.function_names]
        except (RuntimeError, ValueError, OSError) as error:
            hint = f"is it complete? ({one_line(error)})"
            raise TargetError("not an IREE module", where=self.where, hint=hint) from error
        self.functions: dict[str, Any] = {name: self._module.lookup_function(name) for name in names}

    def reflection(self, function: str) -> Mapping[str, str]:
        """The reflection attributes of an exported function."""
        try:
            return cast(Mapping[str, str], self.functions[function].reflection)
        except (RuntimeError, ValueError) as error:
            message = f"the attributes of '{function}' are not text"
            raise TargetError(message, where=self.where, hint=one_line(error)) from error

    @property
    def device(self) -> Device:
        """Where it has been linked."""
        assert self._device is not None, "link comes first"
        return self._device

    def check_usable(self) -> None:
        """Refuses whatever would use the device from here on, or wait for a lock in vain.

        Raises:
            StateError: It has been closed.
            TargetError: This process was forked from the one that loaded it.
        """
        device = self._device
        if device is not None and not is_process(device.pid):
            check_process(device.pid, device.uri)
        if self._closed:
            raise StateError("the program is closed", where=self.where, hint="load it again")

    @property
    def is_foreign(self) -> bool:
        """Whether another process, of which this one was forked, has loaded it."""
        return self._device is not None and self._device.pid != os.getpid()

    def close(self) -> None:
        """Waits for the call under way and lets go of code, weights and file; twice is fine.

        In a forked child nothing is waited for and nothing let go of: what the parent put on the device stays there.
        """
        if self.is_foreign:
            self._closed = True
            return
        with self._lock:
            self._closed = True
            if self._submissions is not None:
                self._submissions.close()
            self._flying.clear()
            self._context = self._alone = self._module = None
            self._workspace = self.workspace_ref = None
            self.functions.clear()

    def link(self, device: Device, parameters: tuple[str, Path] | None, alone: Device | None = None) -> None:
        """Loads the code (and the weights) onto a device; called once, before the first call.

        Args:
            device: Where it shall run.
            parameters: `(scope, path)` of the parameter file, if the module keeps its weights in one.
            alone: A CPU device without workers, for those calls that the calling thread shall run by itself where
                `device` is one with workers.

        Raises:
            TargetError: The module was compiled for another device, or the parameter file does not fit or is damaged.
        """
        self._device, self._has_workers, self.pid = device, device.has_workers, device.pid
        self._submissions = Submissions(device) if device.has_queue else None
        start, before = time.perf_counter(), device.allocated_bytes()
        if parameters is not None:
            self.file_bytes += parameters[1].stat().st_size
            check_seal(parameters[1], str(parameters[1]), whole=self._verify)
        try:
            self._context = self._context_on(device, parameters)
            self._load_kernels()
            self.loaded_bytes = max(device.allocated_bytes() - before, 0)
            if alone is not None:
                before = alone.allocated_bytes()
                self._alone = self._context_on(alone, parameters)
                self.loaded_bytes += max(alone.allocated_bytes() - before, 0)
            compiled = "" if device.driver in CPU_DRIVERS else ", its driver's compilation of the kernels included"
            message = "%s: loaded on %s in %.2f s%s; %d bytes of files, %d on the device"
            seconds = time.perf_counter() - start
            _log.info(message, self.where, device.uri, seconds, compiled, self.file_bytes, self.loaded_bytes)
        except (RuntimeError, ValueError, LookupError, NotImplementedError, OSError) as error:
            if parameters is not None and "no parameter found" in str(error):  # each is named by the hash of its values
                hint = f"{self.where} needs the file that was written with it"
                raise TargetError("weights of another model", where=str(parameters[1]), hint=hint) from error
            hint = f"recompile it for this device or name another one ({one_line(error)})"
            message = f"does not load on {self.device.uri} ({self.device.description})"
            raise TargetError(message, where=self.where, hint=hint) from error

    def _context_on(self, device: Device, parameters: tuple[str, Path] | None) -> Any:
        modules: list[Any] = [_rt.create_hal_module(self._instance, device.hal_device)]
        if parameters is not None:
            index = _rt.ParameterIndex()
            index.load(str(parameters[1]))
            provider = index.create_provider(scope=parameters[0])
            modules.append(_rt.create_io_parameters_module(self._instance, provider))
        return _rt.VmContext(self._instance, [*modules, self._module])

    def _load_kernels(self) -> None:
        """Loads the kernels that have functions for it, side by side: a GPU's driver compiles each on one core.

        A context takes calls of several threads whose functions have no variable in common.
        """
        waiting = [one for name, one in self.functions.items() if name.startswith(_LOAD_KERNEL)]
        if not waiting:
            return

        def load(function: Any) -> None:
            self.device.enter()
            self._context.invoke(function, _rt.VmVariantList(0), _rt.VmVariantList(0))

        with ThreadPoolExecutor(min(len(waiting), _cores())) as threads:
            for _ in threads.map(load, waiting):
                pass

    def call(
        self,
        function: str,
        arguments: Sequence[DeviceArray | int],
        dtypes: Sequence[str],
        into: Sequence[DeviceArray | None] | None = None,
        *,
        alone: bool = False,
    ) -> list[DeviceArray]:
        """Calls a function and waits until it is done.

        Args:
            function: Name of an exported function (the synchronous one).
            arguments: Device arrays, and Python ints for i64 scalars.
            dtypes: Element type of each result.
            into: For a function that takes the memory of its results (`result_specs`): an array of exactly its shape
                for each, None for a result in an input. Left out: new arrays.
            alone: By the calling thread, where the module was linked for that and takes the memory of its results.

        Raises:
            TargetError: The call failed on the device, or the number of results is another one.
        """
        self.check_usable()
        packed = _rt.VmVariantList(len(arguments))
        for argument in arguments:
            if isinstance(argument, int):
                packed.push_int(argument)
            else:
                packed.push_ref(argument.ref)
        storage = into if into is not None else self.new_results(function)
        memory = None if storage is None else [a for a in storage if a is not None]
        results = self._run(function, packed, memory, alone)
        given = list(storage) if storage is not None else [None] * len(dtypes)
        returned = iter(range(len(results)))
        if len(given) != len(dtypes) or given.count(None) != len(results):
            raise TargetError("wrong number of results", where=function, got=len(results), expected=len(dtypes))

        def wrapped(dtype: str) -> DeviceArray:
            return self.device.wrap(results.get_as_object(next(returned), _rt.HalBufferView), dtype)

        return [wrapped(dtype) if array is None else array for array, dtype in zip(given, dtypes, strict=True)]

    def call_step(
        self, function: str, arguments: Iterable[Any], position: int | None, storage: Iterable[Any], alone: bool
    ) -> int:
        """`call` of a function that takes the memory of its results, with as little as possible besides.

        Args:
            function: Its name.
            arguments: `DeviceArray.ref` of its arguments that are arrays.
            position: The one that is a number, after them; None: there is none.
            storage: Likewise of the memory of its results, without those in inputs.
            alone: As of `call`.

        Returns:
            The number of results in inputs.

        Raises:
            TargetError: The call failed on the device.
        """
        if self._closed:
            self.check_usable()
        packed, results = _rt.VmVariantList(32), _rt.VmVariantList(8)
        push = packed.push_ref
        for ref in arguments:
            push(ref)
        if position is not None:
            packed.push_int(position)
        for ref in storage:
            push(ref)
        with self._lock:
            push(self._workspace_of(function))
            self._wait_for(function, packed, results, alone)
        return results.size

    def call_loop(self, function: str, one: str, refs: Iterable[Any], numbers: Iterable[int], alone: bool) -> int:
        """Calls a function of several steps; see `steps` in README.md.

        Args:
            function: Its name.
            one: That of the function of one step, whose workspace it takes.
            refs: `DeviceArray.ref` of its arguments.
            numbers: What follows the workspace.
            alone: As of `call`.

        Returns:
            How many steps it did.

        Raises:
            TargetError: The call failed on the device.
        """
        if self._closed:
            self.check_usable()
        packed, results = _rt.VmVariantList(64), _rt.VmVariantList(1)
        for ref in refs:
            packed.push_ref(ref)
        with self._lock:
            packed.push_ref(self._workspace_of(one))
            for number in numbers:
                packed.push_int(number)
            self._wait_for(function, packed, results, alone)
        return int(results.get_variant(0))

    def submit_step(
        self, function: str, arrays: Sequence[DeviceArray], position: int | None, storage: Sequence[DeviceArray]
    ) -> Callable[[], None]:
        """`call_step` on a device with a queue of its own (`Device.has_queue`): comes back at once.

        Returns:
            What waits until it is done, and raises what `call_step` raises. The arrays are not used before.
        """
        self.check_usable()
        packed = _rt.VmVariantList(16)
        for array in arrays:
            packed.push_ref(array.ref)
        if position is not None:
            packed.push_int(position)
        key, submissions = object(), self._submissions
        assert submissions is not None
        try:
            with self._lock:
                self._push_memory(function, packed, storage)
                self._flying[key] = arrays, storage  # freed by nobody before it is done
                submitted = self._submit(submissions, function, packed, _rt.VmVariantList(8))
        except _IREE_ERRORS as error:
            raise self._failed(function, error) from error

        def wait() -> None:
            try:
                submissions.wait(submitted)
            except _IREE_ERRORS as error:
                raise self._failed(function, error) from error
            finally:
                self._flying.pop(key, None)

        return wait

    def _run(self, function: str, packed: Any, storage: Iterable[DeviceArray] | None, alone: bool) -> Any:
        """Calls with packed arguments and memory for the results, one thread at a time, and waits."""
        results = _rt.VmVariantList(8)
        with self._lock:
            if storage is not None:
                self._push_memory(function, packed, storage)
            self._wait_for(function, packed, results, alone and storage is not None)
        return results

    def pack(self, one: str, refs: Iterable[Any]) -> Any:
        """Arguments of a packed function (`packed` in README.md) for many calls.

        Args:
            one: The function that it calls, whose workspace it takes.
            refs: `DeviceArray.ref` of the other arguments.
        """
        packed = _rt.VmVariantList(32)
        for ref in refs:
            packed.push_ref(ref)
        packed.push_ref(self._workspace_of(one))
        return packed

    def call_packed(self, function: Any, packed: Any, results: Any, alone: bool) -> None:
        """Calls with what `pack` made, on a CPU; by whoever lets in one call of the module at a time.

        Args:
            function: One of `functions`.
            packed: Its arguments.
            results: Of `no_results`.
            alone: As of `call`.

        Raises:
            TargetError: The call failed on the device.
        """
        context, waits = self._alone if alone else None, False
        try:
            if context is None:
                context = self._context
                if self._has_workers and is_ordinary_thread():
                    waits = True
                    set_policy(os.SCHED_BATCH)
            context.invoke(function, packed, results)
        except _IREE_ERRORS as error:
            raise self._failed(function.name, error) from error
        finally:  # after a Ctrl-C anywhere in between, too
            if waits:
                set_policy(os.SCHED_OTHER)

    @staticmethod
    def no_results() -> Any:
        """What a function without results is given for them."""
        return _rt.VmVariantList(1)

    def _wait_for(self, function: str, packed: Any, results: Any, alone: bool) -> None:
        """Calls with everything packed, and waits; on CPU workers as `scheduling.py` says."""
        alone = alone and self._alone is not None
        waits = not alone and self._has_workers and is_ordinary_thread()
        try:
            try:
                if waits:
                    set_policy(os.SCHED_BATCH)
                self._invoke(function, packed, results, alone)
            finally:  # after a Ctrl-C anywhere in between, too
                if waits:
                    set_policy(os.SCHED_OTHER)
        except _IREE_ERRORS as error:
            raise self._failed(function, error) from error

    def _push_memory(self, function: str, packed: Any, storage: Iterable[DeviceArray]) -> None:
        for array in storage:
            packed.push_ref(array.ref)
        packed.push_ref(self._workspace_of(function))

    def _failed(self, function: str, error: BaseException) -> TargetError:
        hint = one_line(error)
        if "empty buffer range" in hint:
            hint = "IREE's driver takes no tensors of size zero; compile it again, or with a fixed --max-context"
        return TargetError(f"the call failed on {self.device.uri}", where=function, hint=hint)

    def _invoke(self, function: str, packed: Any, results: Any, alone: bool) -> None:
        """Calls and waits."""
        submissions = self._submissions
        if submissions is None:
            (self._alone if alone else self._context).invoke(self.functions[function], packed, results)
        elif f"{function}$async" not in self.functions:
            self.device.enter()
            self._context.invoke(self.functions[function], packed, results)
        else:
            submissions.wait(self._submit(submissions, function, packed, results))

    def _submit(self, submissions: Submissions, function: str, packed: Any, results: Any) -> Submitted:
        asynchronous = self.functions[f"{function}$async"]
        if function not in self._in_order:
            self._in_order[function] = IN_ORDER_KEY in asynchronous.reflection
        call = partial(self._context.invoke, asynchronous, packed, results)
        return submissions.submit(packed, call, self._in_order[function])

    @property
    def workspace_now(self) -> int:
        """Bytes that have been taken for intermediate values."""
        return 0 if self._workspace is None else self._workspace.nbytes

    def workspace_bytes(self, function: str) -> int | None:
        """Size of the memory that a function takes for its intermediate values; None if it allocates them itself."""
        if function not in self._workspace_bytes:
            told = self.functions[f"{function}$async"].reflection if RESULTS_KEY in self.reflection(function) else None
            self._workspace_bytes[function] = None if told is None else max(int(told.get(_WORKSPACE_BYTES, 0)), 16)
        return self._workspace_bytes[function]

    def result_specs(self, function: str) -> list[ResultSpec | None] | None:
        """Element type and shape of each result of a function that takes their memory, see `RESULTS_KEY`."""
        if function not in self._result_specs:
            text = self.reflection(function).get(RESULTS_KEY)
            specs = None if text is None else read_result_specs(text, self.where, function)
            self._result_specs[function] = specs
        return self._result_specs[function]

    def new_results(self, function: str) -> list[DeviceArray | None] | None:
        """New arrays for the results of a function that takes their memory; None for another one."""
        specs = self.result_specs(function)
        return None if specs is None else [self.device.empty(s[1], s[0]) if s is not None else None for s in specs]

    def _workspace_of(self, function: str) -> Any:
        """Memory for a function's intermediate values; the calls share it, since they are let in one by one."""
        needed = self._workspace_bytes.get(function) or self.workspace_bytes(function) or 0
        if self._workspace is None or self._workspace.shape[0] < needed:
            self._workspace = self.device.empty([needed], "uint8")
            self.workspace_ref = self._workspace.view.get_buffer().ref
        return self.workspace_ref


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _map(path: Path) -> mmap.mmap:
    """The file's bytes, read into memory at once where the system can."""
    with path.open("rb") as file:
        if hasattr(mmap, "MAP_POPULATE"):
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
