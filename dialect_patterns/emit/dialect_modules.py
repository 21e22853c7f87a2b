"""The dialects that we build operations of, and Python modules for those that have none."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

from iree.compiler import ir

DIALECTS = (
    "arith", "builtin", "flow", "func", "gpu", "hal", "iree_linalg_ext", "linalg", "llvm", "math", "memref", "scf",
    "spirv", "tensor", "torch", "torch_c", "util", "vector",
)  # fmt: skip
"""Those whose operations are built one by one; text brings its own."""

_FOLDER = "iree.compiler.dialects"
_WITHOUT_MODULE = ("iree_linalg_ext", "ml_program", "torch", "torch_c")


def know_dialects() -> None:
    """Give each dialect that IREE 3.13's wheel has no Python module for an empty one.

    MLIR's bindings import ``iree.compiler.dialects.NAME`` when they hand out an operation or a type of a dialect, and
    remember what they have found, but not what they have not: 160,000 searches of the path, three quarters of the time
    in which the operators of 24 layers were lowered.
    """
    for dialect in _WITHOUT_MODULE:
        name = f"{_FOLDER}.{dialect}"
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            sys.modules[name] = types.ModuleType(name)


def load_dialects(context: ir.Context) -> None:
    """Load the dialects into the context of a compiler session, which loads none by itself.

    Building operations of a dialect that is not loaded corrupts memory. Each one that is loaded takes its time: IREE
    collects the patterns of all operations that there are for most of its passes.
    """
    know_dialects()
    untyped: Any = context
    for dialect in DIALECTS:
        untyped.get_dialect_descriptor(dialect)
