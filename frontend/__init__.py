"""linattn.frontend: ONNX models in, self-describing IREE modules out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .compile import CompileOptions, compile_model

__all__ = ["CompileOptions", "compile_model"]


def __getattr__(name: str) -> object:
    """Import the compiler when it is first asked for, so that the command line can say what is missing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import compile as compiler

    return getattr(compiler, name)
