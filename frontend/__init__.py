"""linattn.frontend: ONNX models in, self-describing IREE modules out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .options import CompileOptions
    from .process.isolated import compile_bundle, compile_model

__all__ = ["CompileOptions", "compile_bundle", "compile_model"]


def __getattr__(name: str) -> object:
    """Import what compiles when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .process import isolated

    return getattr(isolated, name)
