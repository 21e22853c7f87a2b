"""linattn: ONNX models with LinearAttention and CausalConvWithState, compiled with IREE and run with their state.

The names of the runtime need numpy and iree-base-runtime, `compile` needs the extra `compile`. Each is loaded when it
is first used: `import linattn` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linattn.frontend import CompileOptions
    from linattn.frontend import compile_model as compile
    from linattn.runtime import (
        InputError,
        LinattnError,
        Program,
        Sampling,
        Session,
        Snapshot,
        StateError,
        TargetError,
        TextGenerator,
        devices,
        generate,
        greedy,
    )

_COMPILER = {"CompileOptions": "CompileOptions", "compile": "compile_model"}

__all__ = [
    "CompileOptions",
    "InputError",
    "LinattnError",
    "Program",
    "Sampling",
    "Session",
    "Snapshot",
    "StateError",
    "TargetError",
    "TextGenerator",
    "compile",
    "devices",
    "generate",
    "greedy",
]


def __getattr__(name: str) -> Any:
    """What is public, on its first use, and `__version__`."""
    if name == "__version__":
        from importlib import metadata

        return metadata.version("linattn")
    if name not in __all__:
        raise AttributeError(f"module 'linattn' has no attribute '{name}'")
    module = importlib.import_module("linattn.frontend" if name in _COMPILER else "linattn.runtime")
    found = getattr(module, _COMPILER.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]
