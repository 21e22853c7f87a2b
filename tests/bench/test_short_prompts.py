"""How often a prompt is timed within a turn."""

from __future__ import annotations

import numpy as np
import pytest
from linattn.runtime.bench import model_runners
from linattn.runtime.bench.model_runners import ModelRunner
from linattn.runtime.device import HostArray


class Clock:
    """Time that passes only where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Runner(ModelRunner):
    """Its prompts take what is given, one after the other."""

    def __init__(self, clock: Clock, prompts: list[float]) -> None:
        super().__init__()
        self.clock, self.prompts, self.resets = clock, prompts, 0

    def reset(self) -> None:
        self.resets += 1
        self.clock.now += 100.0

    def step(self, ids: HostArray) -> HostArray:
        self.clock.now += self.prompts[self.resets - 1] if ids.size > 1 else 0.001
        return np.arange(4.0)


@pytest.mark.parametrize(
    ("prompts", "times", "median"),
    [([0.009, 0.003, 0.002, 0.002, 0.001], 5, 0.002), ([0.02, 0.04], 2, 0.03), ([0.3], 1, 0.3)],
)
def test_short_ones_are_timed_again(
    prompts: list[float], times: int, median: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(model_runners, "time", clock)
    runner = Runner(clock, prompts)
    found = runner._repeat([1, 2], 2)
    assert runner.resets == times
    assert found["prefill_s"] == pytest.approx(median)
    assert found["tokens"] == [3, 3, 3]
    assert found["steps_s"] == pytest.approx([0.001, 0.001])
