"""How a token is chosen: as the softmax says, within what top-k, top-p and min-p leave, the same for equal seeds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linattn.runtime import InputError, Sampling, StateError
from linattn.runtime.generation.sampling import Sampler, likely

from tests.chi_square import chi_square_bound

DRAWS = 20_000


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(0, 1.5, 40).astype(np.float32)
    sampler = Sampler(Sampling(temperature=temperature, seed=7))
    counts = np.bincount([sampler.choose(logits) for _ in range(DRAWS)], minlength=40)
    expected = softmax(logits.astype(np.float64), temperature) * DRAWS
    large = expected >= 5
    found = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    assert ((found - wanted) ** 2 / np.maximum(wanted, 1e-9)).sum() < chi_square_bound(int(large.sum()))


def slow_filter(logits: list[float], sampling: Sampling) -> set[int]:
    """What transformers' processors leave, one after the other, a token at a time."""
    kept = set(range(len(logits)))
    if sampling.top_k:
        least = sorted(logits, reverse=True)[: sampling.top_k][-1]
        kept = {token for token in kept if logits[token] >= least}

    def chances() -> dict[int, float]:
        weights = {token: float(np.exp(logits[token] / sampling.temperature)) for token in kept}
        return {token: weight / sum(weights.values()) for token, weight in weights.items()}

    order = sorted(kept, key=lambda token: (-logits[token], token))
    before = itertools.accumulate([chances()[token] for token in order], initial=0.0)
    pairs = enumerate(zip(order, before, strict=False))
    kept = {token for i, (token, sum_before) in pairs if i == 0 or sum_before < sampling.top_p}
    return {token for token in kept if chances()[token] >= sampling.min_p * max(chances().values())}


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(-12, 12), min_size=1, max_size=12),
    st.integers(0, 14),
    st.sampled_from([1.0, 0.9, 0.5, 0.123, 0.0]),
    st.sampled_from([0.0, 0.05, 0.33, 1.0]),
    st.sampled_from([0.7, 1.0, 3.0]),
)
def test_what_is_left_to_draw(logits: list[int], top_k: int, top_p: float, min_p: float, temperature: float) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    values = [value / 3.1 for value in logits]
    kept, weights = likely(np.array(values), sampling)
    assert set(kept.tolist()) == slow_filter(values, sampling)
    assert kept.tolist() == sorted(kept.tolist())
    assert np.allclose(weights / weights.sum(), softmax(np.array(values)[kept], temperature))


def test_a_large_vocabulary() -> None:
    """Where not all of it is sorted for top-p: the same tokens, many of them equally likely."""
    numbers = np.random.default_rng(4)
    for spread in (0.1, 1.0, 4.0):
        logits = (numbers.normal(0, spread, 5000) * 4).round() / 4
        for top_p in (0.05, 0.5, 0.9, 0.999):
            kept, weights = likely(logits, Sampling(1.0, 0, top_p))
            order = np.argsort(-logits, kind="stable")
            sums = np.cumsum(softmax(logits)[order])
            assert kept.tolist() == sorted(order[: np.count_nonzero(np.append(0, sums[:-1]) < top_p)].tolist())
            assert np.allclose(weights / weights.sum(), softmax(logits[kept]))


def test_equal_seeds() -> None:
    logits = np.random.default_rng(2).normal(size=(50, 100)).astype(np.float16)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(row) for row in logits]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)
    assert draw(3)[:6] == [4, 7, 20, 96, 90, 73]  # on any machine, in any version


def test_repeat_penalty() -> None:
    sampler = Sampler(Sampling(repeat_penalty=2.0), seen=[0, 9])
    logits = np.array([3.0, 2.0, -1.0, 1.4])
    assert [sampler.choose(logits) for _ in range(3)] == [1, 0, 0]  # 1.5 2 -1 1.4; then 1.5 1 -1 1.4
    drawn = Sampler(Sampling(temperature=1e-3, repeat_penalty=2.0, seed=0), seen=[2])
    assert drawn.choose(np.array([-3.0, -5.0, -1.4])) == 2  # -2.8
    assert drawn.choose(np.array([-2.0, -5.0, -1.4])) == 0


def test_what_cannot_be_chosen_from() -> None:
    for temperature in (0.0, 1.0):
        with pytest.raises(StateError, match="the logits are NaN"):
            Sampler(Sampling(temperature)).choose(np.array([1.0, np.nan], np.float32))
    for value in (np.inf, -np.inf):
        with pytest.raises(StateError, match="no logit is finite"):
            Sampler(Sampling(1.0)).choose(np.array([1.0 if value > 0 else value, value]))
    assert Sampler(Sampling(1.0, seed=0)).choose(np.array([-np.inf, 1.0, -np.inf])) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repeat_penalty": 0},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))}: out of range"):
        Sampling(**wrong)  # type: ignore[arg-type]
