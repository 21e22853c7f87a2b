"""The model whose steps are tested, and what counts the calls of a function."""

from __future__ import annotations

import functools
from functools import cache
from typing import Any

import numpy as np
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import (
    Program,
)

from samples.tiny_hybrid import build

CONTEXT = 512
IDS = np.random.default_rng(0).integers(0, 256, (1, CONTEXT))
TARGETS = pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])


@cache
def module(target: str) -> bytes:
    options = CompileOptions(target=target, max_context=CONTEXT, prefill_blocks=(8,), sampler="draw")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linattn.frontend.compile.LEAST_TOKENS", 8)  # the block has a function for its last logits
        patch.setattr("linattn.frontend.graph.last_position.LEAST_BYTES", 0)
        return compile_model(build(), options).module


@cache
def program(target: str) -> Program:
    return Program.load(module(target))


class Counted:
    def __init__(self, function: Any) -> None:
        self._function, self.calls = function, 0

    def __get__(self, instance: Any, owner: Any) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self._function(*args)
