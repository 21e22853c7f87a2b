"""What made compiling slow, counted rather than timed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.lower.iree import Compiler

from samples.tiny_hybrid import build


class Lowered(BaseException):
    """Everything before code generation is done."""


def stop(*_: object) -> None:
    raise Lowered


def test_dialects_are_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every value of a dialect without a module, by a search of all folders of the path."""
    searches: list[str] = []

    class Searches:
        """Finds nothing, and keeps what was looked for."""

        def find_spec(
            self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            if name.startswith("iree.compiler.dialects."):
                searches.append(name)
            return None

    monkeypatch.setattr(Compiler, "compile", stop)
    monkeypatch.setattr(sys, "meta_path", [Searches(), *sys.meta_path])
    with pytest.raises(Lowered):
        compile_model(build(), CompileOptions(cpu_features="generic"))
    assert len(searches) == len(set(searches))
