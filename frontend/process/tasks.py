"""What the compiler's process does for others."""

from __future__ import annotations

from pathlib import Path

import onnx

from ..compile import compile_model
from ..options import CompiledModel, CompileOptions
from ..plan.report import Progress


def compile_task(source: str | bytes, options: CompileOptions, output: str | Path, progress: Progress) -> CompiledModel:
    """:func:`~linattn.frontend.compile.compile_model`, for a model in memory that is handed over as bytes."""
    model = onnx.ModelProto.FromString(source) if isinstance(source, bytes) else source
    return compile_model(model, options, output=output, progress=progress)
