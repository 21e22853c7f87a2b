"""What runs in a subject's process for operators: inputs and outputs on the device, one synchronous call at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from linattn.runtime.device import DeviceArray, HostArray, numpy_dtype
from linattn.runtime.drivers import has_worker_threads
from linattn.runtime.loading import device_alone, read_manifest
from linattn.runtime.module import Module
from linattn.runtime.opening import open_device

from .device_times import call_seconds, cuda_call_seconds, memory_arguments
from .lazy import need
from .load import Watch
from .machine import core_count
from .timing import timed, warm_up

Feeds = Mapping[str, HostArray]

_ORT_NAMES = {"float": "float32", "double": "float64"}


class Runner:
    """A subject: models prepared under a key, timed and read by that key."""

    def __init__(self) -> None:
        self._calls: dict[str, Callable[[], Any]] = {}
        self._last: dict[str, Any] = {}
        self._watches: dict[str, Watch] = {}
        self._warmed: dict[str, int] = {}

    def prepare(self, key: str, model: str, feeds: Feeds, attributes: Mapping[str, Any] | None = None) -> None:
        """Loads a model and puts its inputs where it reads them.

        Args:
            key: Name for later.
            model: Path of the module or model.
            feeds: Inputs by name.
            attributes: What the subject must know when it takes no model.
        """
        raise NotImplementedError

    def time(self, key: str, seconds: float, warmup: int) -> list[float]:
        """Seconds of each of the calls that fit into `seconds`, after `warmup` calls."""
        call = self._calls[key]

        def keep() -> None:
            self._last[key] = call()

        self._warmed[key] = self._warmed.get(key, 0) + warm_up(keep, warmup)
        with self._watches.setdefault(key, Watch()).watching():
            return timed(keep, seconds, 0, 0.0)

    def watched(self, key: str) -> dict[str, Any]:
        """How many calls of a model were not timed, and what the CPU did during those that were."""
        return {"warmup": self._warmed[key], **self._watches[key].summary()}

    def results(self, key: str) -> dict[str, HostArray]:
        """What the last timed call returned."""
        raise NotImplementedError

    def drop(self, key: str) -> None:
        """Forgets a model and its arrays."""
        self._calls.pop(key, None)
        self._last.pop(key, None)
        self._watches.pop(key, None)
        self._warmed.pop(key, None)


class IreeRunner(Runner):
    """Modules compiled by linattn.

    Args:
        device: `cpu`, `cuda`, `vulkan` or an IREE device URI.
        threads: CPU worker threads; None: as IREE decides.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        super().__init__()
        self._device = open_device(device, threads if has_worker_threads(device) else None)
        self._name, self._threads = device, threads
        self._names: dict[str, list[str]] = {}
        self._timed: dict[str, tuple[Path, str, str, list[tuple[HostArray, str]], list[str]]] = {}

    def prepare(self, key: str, model: str, feeds: Feeds, attributes: Mapping[str, Any] | None = None) -> None:
        """See `Runner.prepare`; the inputs are uploaded here, the calls take them from the device."""
        module = Module(Path(model))
        manifest = read_manifest(module)
        small = device_alone(manifest, self._name)
        module.link(self._device, None, small)
        specs = (*manifest.inputs, *manifest.states)
        arrays: list[DeviceArray | int] = [self._device.upload(feeds[spec.name], spec.dtype) for spec in specs]
        results = [(out.name, out.dtype) for out in manifest.outputs]
        results += [(state.output, state.dtype) for state in manifest.states]
        entry, dtypes = manifest.entry_points[0], [dtype for _, dtype in results]
        symbol, alone = entry.symbol, small is not None and entry.alone > 0
        self._names[key] = [name for name, _ in results]
        inputs = [(feeds[spec.name], spec.dtype) for spec in specs]
        uri = small.uri if small is not None and alone else self._device.uri
        self._timed[key] = (Path(model), uri, symbol, inputs, memory_arguments(module, symbol))
        into = module.new_results(symbol)
        self._calls[key] = lambda: module.call(symbol, arrays, dtypes, into, alone=alone)

    def kernel(self, key: str, calls: int, warmup: int) -> list[float]:
        """Seconds of the dispatches alone by the device's clock, for each of so many calls after others."""
        if self._device.driver == "cuda":
            return cuda_call_seconds(self._calls[key], calls)
        module, uri, symbol, inputs, memory = self._timed[key]
        return call_seconds(module, uri, symbol, inputs, memory, calls, warmup, self._threads)

    def results(self, key: str) -> dict[str, HostArray]:
        """See `Runner.results`."""
        arrays: list[DeviceArray] = self._last[key]
        return {name: self._device.to_host(array) for name, array in zip(self._names[key], arrays, strict=True)}


@dataclass
class _Bound:
    session: Any
    binding: Any
    outputs: dict[str, Any]
    kept: list[Any]


class OrtRunner(Runner):
    """ONNX Runtime on the CPU, inputs and outputs bound once (no copies in a call).

    Args:
        threads: Of one operator; None: as many as there are cores.
    """

    def __init__(self, threads: int | None = None) -> None:
        super().__init__()
        self._ort = need("onnxruntime", "bench")
        self._threads = threads or core_count()
        self._bound: dict[str, _Bound] = {}

    def prepare(self, key: str, model: str, feeds: Feeds, attributes: Mapping[str, Any] | None = None) -> None:
        """See `Runner.prepare`."""
        onnx = need("onnx", "compile")
        session = open_ort(self._ort, model, self._threads)
        proto = onnx.load_model(model, load_external_data=False)
        values = {value.name: value.type.tensor_type for value in (*proto.graph.input, *proto.graph.output)}
        binding, kept, outputs = session.io_binding(), list[Any](), dict[str, Any]()
        for item in session.get_inputs():
            tensor = to_ort(self._ort, feeds[item.name], values[item.name].elem_type)
            kept += [tensor, feeds[item.name]]
            binding.bind_ortvalue_input(item.name, tensor)
        for item in session.get_outputs():
            shape = [dim.dim_value for dim in values[item.name].shape.dim]
            elem = values[item.name].elem_type
            outputs[item.name] = self._ort.OrtValue.ortvalue_from_shape_and_type(shape, elem, "cpu")
            binding.bind_ortvalue_output(item.name, outputs[item.name])
        self._bound[key] = _Bound(session, binding, outputs, kept)
        self._calls[key] = lambda: session.run_with_iobinding(binding)

    def results(self, key: str) -> dict[str, HostArray]:
        """See `Runner.results`."""
        return {name: from_ort(value) for name, value in self._bound[key].outputs.items()}

    def drop(self, key: str) -> None:
        """See `Runner.drop`."""
        super().drop(key)
        self._bound.pop(key, None)


def open_ort(ort: Any, model: str | bytes, threads: int, folder: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU, with its defaults but for the threads and its warnings.

    Args:
        ort: The package.
        model: Path of the model, or its bytes.
        threads: Of one operator.
        folder: Where the weights of a model in bytes lie.
    """
    options = ort.SessionOptions()
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def to_ort(ort: Any, array: HostArray, elem_type: int) -> Any:
    """An array as an OrtValue; bfloat16 goes in as its bits."""
    dense = np.ascontiguousarray(array)
    if dense.dtype == numpy_dtype("bfloat16"):
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(dense.view(np.uint16), elem_type)
    return ort.OrtValue.ortvalue_from_numpy(dense)


def from_ort(value: Any) -> HostArray:
    """A copy of an OrtValue in host memory, bfloat16 too."""
    return view_ort(value).copy()


def view_ort(value: Any) -> HostArray:
    """An OrtValue's memory as an array; valid while the OrtValue lives."""
    kind: str = value.data_type()[len("tensor(") : -1]
    dtype = numpy_dtype(_ORT_NAMES.get(kind, kind))
    shape = tuple(value.shape())
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size:
        return np.zeros(shape, dtype)
    raw: Any = (ctypes.c_ubyte * size).from_address(value.data_ptr())
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)
