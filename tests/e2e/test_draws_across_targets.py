"""A seed's tokens on two targets: equal up to where a random number is as near to the edge between two as logits round.

Both models are f16, whose logits the targets round differently. Where tokens first differ each target has drawn what
the host draws from that target's logits with the same number, and the number is no further from the other's token than
the difference of the logits moves that token's edges. So it was on an H100 too (CUDA, Vulkan and its CPU, 149 M
parameters, 24 seeds of two samplings, 26 November 2026): docs/explanation/sampling.md.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import Program, Sampling, generate
from linattn.runtime.generation.sampling import likely

from samples.tiny_hybrid import build
from tests.tolerances import MODEL_LOGITS, error

PROMPT, COUNT, SEEDS = [7, 1, 200], 100, 6
ROUNDING = 2e-5
"""Of a module's sums of f32 probabilities, beside all of them."""


@cache
def program(target: str) -> Program:
    options = CompileOptions(
        target=target,
        max_context=128,
        prefill_blocks=(),
        sampler="draw",
    )
    return Program.load(compile_model(build("f16"), options).module)


def logits(target: str, tokens: list[int]) -> np.ndarray:
    session = program(target).session()
    rows = [session.run({"input_ids": [[token]]})["logits"] for token in [*PROMPT, *tokens]]
    return rows[-1][0, -1].astype(np.float64)


def interval(row: np.ndarray, how: Sampling, token: int) -> tuple[float, float]:
    """The random numbers that draw a token."""
    kept, weights = likely(row, how)
    sums = np.concatenate([[0.0], np.cumsum(weights)]) / weights.sum()
    place = int(np.searchsorted(kept, token))
    assert kept[place] == token
    return float(sums[place]), float(sums[place + 1])


def distance(number: float, between: tuple[float, float]) -> float:
    return max(between[0] - number, number - between[1], 0.0)


@pytest.mark.vulkan
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_what_differs_is_rounding(temperature: float) -> None:
    places: list[int] = []
    for seed in range(SEEDS):
        how = Sampling(temperature, seed=seed)
        one, two = (list(generate(program(name).session(), PROMPT, COUNT, how)) for name in ("cpu", "vulkan"))
        place = next((i for i, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1]), None)
        if place is None:
            continue
        places.append(place)
        number = float(np.random.Generator(np.random.Philox(seed)).random(place + 1)[place])
        first, second = (logits(name, one[:place]) for name in ("cpu", "vulkan"))
        assert error(second, first) < MODEL_LOGITS["f16"]
        assert distance(number, interval(first, how, one[place])) < ROUNDING
        assert distance(number, interval(second, how, two[place])) < ROUNDING
        moved = math.expm1(2 * float(np.abs(first - second).max()) / temperature)
        assert distance(number, interval(first, how, two[place])) < moved + ROUNDING
        assert distance(number, interval(second, how, one[place])) < moved + ROUNDING
    assert places  # else nothing was shown
