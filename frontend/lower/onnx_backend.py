"""The ONNX backend interface, so that ONNX's own tests (and tools that speak it) can run on linattn.

Source: ``onnx.backend.base``. Every dim is taken from the model; what is left open stays open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import onnx
from linattn.runtime import Program
from linattn.runtime.errors import LinattnError
from onnx.backend.base import Backend, BackendRep

from ..options import CompileOptions
from ..process.isolated import compile_model
from ..targets import TARGETS

_DEVICES = {name.upper(): name for name in TARGETS}


class LinattnBackendRep(BackendRep):
    """A compiled model behind ONNX's interface."""

    def __init__(self, program: Program, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._program = program
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)

    def run(self, inputs: Any, **kwargs: Any) -> tuple[np.ndarray[Any, Any], ...]:
        """Run once.

        Args:
            inputs: Arrays in the order of the graph's inputs, or by name.
            **kwargs: None are known; there for the interface.

        Returns:
            The graph's outputs, in order.
        """
        del kwargs
        if isinstance(inputs, Mapping):
            feeds = cast("Mapping[str, Any]", inputs)
        else:
            feeds = dict(zip(self._inputs, inputs, strict=True))
        results = self._program.run(feeds)
        return tuple(results[name] for name in self._outputs)


class LinattnBackend(Backend):
    """Compiles with linattn; ``CPU``, ``CUDA`` and ``VULKAN`` are devices."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether the model compiles."""
        try:
            cls.prepare(model, device, **kwargs)
        except LinattnError:
            return False
        return True

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> LinattnBackendRep:
        """Compile a model.

        Args:
            model: The model, weights inside.
            device: ``CPU``, ``CUDA`` or ``VULKAN``, with an ordinal after a colon if wanted.
            **kwargs: Fields of :class:`~linattn.frontend.CompileOptions`.

        Raises:
            LinattnError: if it does not compile.
        """
        target = _DEVICES[device.partition(":")[0]]
        open_dims: dict[str, Any] = {"batch": None, "max_context": None, "prefill_blocks": None}
        options = CompileOptions(target=target, **(open_dims | kwargs))
        compiled = compile_model(model, options)
        initializers = {t.name for t in model.graph.initializer}
        inputs = [v.name for v in model.graph.input if v.name not in initializers]
        return LinattnBackendRep(Program.load(compiled.module), inputs, [v.name for v in model.graph.output])

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether we compile for a device of this kind."""
        return device.partition(":")[0] in _DEVICES
