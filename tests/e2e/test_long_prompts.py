"""Table 2 #31: a prompt of 16k tokens costs what sixteen of 1k cost, in calls of blocks and in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program
from linattn.runtime.module import Module

from samples.stream_sensor import build
from tests.tolerances import BENIGN, error

SIGNAL = np.random.default_rng(0).standard_normal((1, 16_384, 8)).astype(np.float32)


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)])
def test_a_prompt_of_16k_tokens(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program.load(compile_model(build(), CompileOptions(target=target, prefill_blocks=(256,))).module)
    session, call, called = program.session(), Module._wait_for, list[str]()

    def counted(self: Module, function: str, *args: Any) -> Any:
        called.append(function)
        return call(self, function, *args)

    monkeypatch.setattr(Module, "_wait_for", counted)
    parts = [session.run({"signal": SIGNAL[:, at : at + 1024]})["score"] for at in range(0, 16_384, 1024)]
    in_parts, held = list(called), program.memory().held
    called.clear()
    whole = program.session()
    assert error(whole.run({"signal": SIGNAL})["score"], np.concatenate(parts, 1)) < BENIGN["float32"]
    assert called == in_parts == called[:1] * 64  # the same calls of the same sizes: all that could grow is the memory
    assert program.memory().held <= 2 * held  # two sessions, whatever they have read
