"""DrawToken against the host's sampler and the softmax: settings, sizes, ties, infinities and NaN."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import compile_for_cuda, node_for, run_op, spec
from linattn.dialect_patterns.draw_token import contract, kernel
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import INTERNAL
from linattn.runtime import Sampling, StateError
from linattn.runtime.errors import UnsupportedModelError
from linattn.runtime.generation.sampling import draw_settings, index_of_largest, likely

from tests.chi_square import chi_square_bound

SETTINGS = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7, top_k=20),
    Sampling(1.0, top_p=0.9),
    Sampling(1.0, top_k=50, top_p=0.95),
    Sampling(1.0, min_p=0.05),
    Sampling(1.5, top_p=0.5, min_p=0.3),
    Sampling(1.0, top_k=1),
    Sampling(1e-3),
    Sampling(1e-30, top_p=0.5),
    Sampling(1e3, top_p=0.99),
    Sampling(1.0, top_p=0.0),
    Sampling(1.0, top_k=3, top_p=0.6, min_p=1.0),
    Sampling(1.0, top_k=1 << 20, top_p=0.999),
    Sampling(30.0, top_k=40, top_p=0.9, min_p=0.01),
]
ROUNDING = 2e-5
"""Of the sums of f32 probabilities, beside all of them."""


def kinds_of_logits(vocabulary: int) -> list[np.ndarray]:
    rng, last = np.random.default_rng(vocabulary), vocabulary - 1
    wide, narrow = rng.standard_normal(vocabulary) * 3, rng.standard_normal(vocabulary) * 0.1
    alone = np.full(vocabulary, -np.inf)
    alone[last] = -2.0
    few = np.where(rng.random(vocabulary) < 0.6, -np.inf, wide)
    few[last // 2] = 0.0
    zeros = np.full(vocabulary, -0.0)
    zeros[::2] = 0.0
    steep = np.linspace(-300, 300, vocabulary)
    return [
        wide,
        narrow,
        np.round(wide),
        np.round(narrow),
        zeros,
        few,
        alone,
        steep,
        np.full(vocabulary, -6e4),
        -wide * 30,
    ]


def host(logits: np.ndarray, sampling: Sampling, number: float) -> int:
    """What the runtime's sampler chooses with a random number; -1 for NaN, -2 where nothing is finite."""
    if np.isnan(logits).any():
        return -1
    if not sampling.temperature:
        return index_of_largest(logits)
    try:
        kept, weights = likely(logits, sampling)
    except StateError:
        return -2
    sums = np.cumsum(weights)
    return int(kept[min(int(np.count_nonzero(sums <= number * sums[-1])), kept.size - 1)])


def allowed(logits: np.ndarray, sampling: Sampling, number: float) -> set[int]:
    """What it chooses with sums that are rounded otherwise."""
    shares = {min(max(sampling.top_p + d, 0.0), 1.0) if sampling.top_p < 1 else 1.0 for d in (-ROUNDING, 0, ROUNDING)}
    numbers = [min(max(number + d, 0.0), 1.0) for d in (-ROUNDING, 0, ROUNDING)]
    least = {sampling.min_p * (1 + d) for d in (-ROUNDING, 0, ROUNDING) if sampling.min_p * (1 + d) <= 1}
    hows = [dataclasses.replace(sampling, top_p=share, min_p=part) for share in shares for part in least]
    return {host(logits, how, n) for how in hows for n in numbers}


def draw(logits: np.ndarray, settings: np.ndarray, target: str) -> np.ndarray:
    (found,) = run_op(contract.DRAW_TOKEN, [logits[:, None], settings], domain=INTERNAL, version=1, target=target)
    return found[:, 0]


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "target"),
    [
        (7, np.float32, "cpu"),
        (1000, np.float16, "cpu"),
        (32_003, np.float32, "cpu"),
        (32_000, ml_dtypes.bfloat16, "cpu128"),
        (248_320, np.float32, "cpu"),
        pytest.param(7, np.float32, "lavapipe", marks=pytest.mark.vulkan),
        pytest.param(1000, np.float16, "lavapipe", marks=pytest.mark.vulkan),
        pytest.param(32_003, np.float32, "lavapipe", marks=pytest.mark.vulkan),
        pytest.param(248_320, ml_dtypes.bfloat16, "lavapipe", marks=pytest.mark.vulkan),
        pytest.param(200, np.float32, "vulkan", marks=pytest.mark.vulkan),  # without subgroups
    ],
)
def test_as_the_host(vocabulary: int, dtype: Any, target: str) -> None:
    """The host's token for the same random number, but for numbers at the very edge between two tokens."""
    rng = np.random.default_rng(1)
    kinds = kinds_of_logits(vocabulary)
    if vocabulary > 100_000:
        kinds = kinds[:4:3]
    if target == "lavapipe" and vocabulary > 10_000:  # whose threads are few
        kinds = kinds[:1] if vocabulary > 100_000 else kinds[:4:3]
    cases = [(logits, how) for logits in kinds for how in SETTINGS]
    numbers = np.append([0.0, 1 - 2**-24], rng.random(len(cases) - 2).astype(np.float32))
    logits = np.array([row for row, _ in cases]).astype(dtype)
    settings = np.array([draw_settings(how, n, vocabulary) for (_, how), n in zip(cases, numbers, strict=True)])
    found = draw(logits, settings, target)
    different = 0
    for row, (_, how), number, token in zip(logits.astype(np.float32), cases, numbers, found, strict=True):
        if token != host(row, how, float(number)):
            different += 1
            assert token in allowed(row, how, float(number)), (how, number)
    assert different <= len(cases) // 20  # and most are the very same


@pytest.mark.parametrize("target", ["cpu", pytest.param("lavapipe", marks=pytest.mark.vulkan)])
def test_what_cannot_be_chosen_from(target: str) -> None:
    rows = np.full((8, 40), -1.0, np.float32)
    rows[0, 39], rows[1, 0], rows[2, 3], rows[3] = np.nan, -np.nan, np.inf, -np.inf
    rows[4, 3], rows[4, 5], rows[5], rows[6, 17] = np.inf, np.nan, -np.inf, np.inf
    hows = [Sampling(1.0, top_k=5)] * 5 + [Sampling()] * 3
    settings = np.array([draw_settings(how, 0.5, 40) for how in hows])
    assert draw(rows, settings, target).tolist() == [-1, -1, -2, -2, -1, 0, 17, 0]


@pytest.mark.parametrize("target", ["cpu", pytest.param("lavapipe", marks=pytest.mark.vulkan)])
def test_draws_follow_the_softmax(target: str) -> None:
    """20,000 draws of each way to draw; chi-square against what the settings leave of the softmax."""
    draws, rng = 20_000, np.random.default_rng(3)
    logits = rng.normal(0, 1.5, 40).astype(np.float32)
    logits[20:30] = np.round(logits[20:30])  # some are equal
    hows = [Sampling(1.0), Sampling(0.5, top_k=9), Sampling(2.0, top_p=0.8), Sampling(1.0, min_p=0.1)]
    hows.append(Sampling(1.5, top_k=20, top_p=0.9, min_p=0.05))
    numbers = rng.random((len(hows), draws), np.float32)
    settings = np.concatenate([[draw_settings(how, 0.0, 40)] * draws for how in hows])
    settings[:, 5] = numbers.reshape(-1)
    found = draw(np.broadcast_to(logits, (len(hows) * draws, 40)).copy(), settings, target)
    for how, tokens in zip(hows, found.reshape(len(hows), draws), strict=True):
        kept, weights = likely(logits, how)
        counts, wanted = np.bincount(tokens, minlength=40), weights / weights.sum() * draws
        assert counts[kept].sum() == draws
        assert ((counts[kept] - wanted) ** 2 / wanted).sum() < chi_square_bound(kept.size - 1)


def test_it_is_one_kernel_on_cuda() -> None:
    """Run on no GPU here: what is compiled is one kernel of whole warps that shuffle, and nothing beside it."""
    specs = [TensorSpec((1, 1, 32_000), "f16"), TensorSpec((1, contract.SETTINGS), "f32")]
    code = compile_for_cuda(INTERNAL, contract.DRAW_TOKEN, 1, specs)
    assert code.count(b".entry") == 1
    assert code.count(b"shfl.sync") > 0


def test_what_cannot_be_drawn_from() -> None:
    row, settings = np.zeros((1, 1, 4), np.float32), np.zeros((1, 8), np.float32)
    for inputs, message in (
        ([row.astype(np.int64), settings], "input 'logits' cannot be chosen from"),
        ([row, settings[:, :3]], "input 'settings' is another one"),
        ([np.zeros((2, 1, 4), np.float32), settings], "input 'settings' is another one"),
    ):
        node = node_for(INTERNAL, contract.DRAW_TOKEN, 1, [spec(array) for array in inputs], {}, 1)
        with pytest.raises(UnsupportedModelError, match=message):
            contract.parse(node)


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 200.0])
def test_the_k_largest_wherever_they_lie(spread: float) -> None:
    """Beside each other, so that one thread has all of them, or as many as there are shares of the row, or equal."""
    vocabulary = 2000
    rng = np.random.default_rng(11)
    rows, settings, kept = [], [], []
    for k in (1, 7, 100, 900, 1999):
        logits = (rng.standard_normal(vocabulary) * spread).astype(np.float32)
        first = int(rng.integers(0, vocabulary - k))
        logits[first : first + k] = logits.max() + 1 + rng.random(k).astype(np.float32) * 1e-2
        for number in (0.0, 0.3, 1 - 2**-24):
            rows.append(logits)
            settings.append(draw_settings(Sampling(1.0, top_k=k), number, vocabulary))
            kept.append(host(logits, Sampling(1.0, top_k=k), number))
    found = draw(np.array(rows), np.array(settings), "lavapipe")
    assert np.count_nonzero(found != kept) <= 1  # at the very edge between two
    for token, want in zip(found, kept, strict=True):
        assert abs(int(token) - want) <= 1


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
def test_one_subgroup_draws_what_all_threads_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few strips that are left are listed for it; so many that they are not are among them."""
    vocabulary, rng = 3000, np.random.default_rng(5)
    hows = [Sampling(0.8, top_k=k, top_p=p) for k in (1, 2, 31, 200, 256, 257, 300) for p in (1.0, 0.9)]
    logits = rng.standard_normal((len(hows), vocabulary)).astype(np.float32)
    logits[::4] = np.round(logits[::4], 1)  # with some that are equal
    settings = np.array([draw_settings(how, 0.6, vocabulary) for how in hows])
    found = draw(logits, settings, "lavapipe")
    monkeypatch.setattr(kernel, "MOST_STRIPS", -1)
    assert np.count_nonzero(draw(logits, settings, "lavapipe") != found) <= 1  # at the very edge between two
    kept = [host(row, how, 0.6) for row, how in zip(logits, hows, strict=True)]
    assert np.count_nonzero(found != kept) <= 1
