"""SelectiveScan through its pattern and IREE, against its float64 recurrence."""

from __future__ import annotations

import numpy as np
import pytest
from harness import WIDTHS
from linattn.dialect_patterns.op import INTERNAL, LoweringOptions
from linattn.dialect_patterns.selective_scan.reference import reference
from state_ops import Call, run_all
from tolerances import check

OP = "SelectiveScan"
# Batch, tokens, channels, elements of a state: whole vectors, channels and states that leave a rest, several groups of
# elements, a state that does not fill a vector, a workgroup for one token that is not full.
SHAPES = [(1, 1, 48, 16), (2, 1, 135, 24), (1, 7, 32, 16), (2, 5, 37, 24), (1, 3, 21, 4), (1, 33, 19, 40)]
VULKAN = [pytest.mark.vulkan, pytest.mark.xdist_group("vulkan")]
LAVAPIPE = pytest.param("lavapipe", marks=VULKAN)
BASELINE = pytest.param("vulkan", marks=VULKAN)  # without subgroup operations: a thread a channel
RECURRENT = LoweringOptions(strategy="recurrent")


def selective(
    batch: int, tokens: int, channels: int, states: int, *, past: bool = True, seed: int = 0
) -> list[np.ndarray | None]:
    """Operands as a model has them: steps as softplus gives them, rates of -1 to -N."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    step = np.log1p(np.exp(normal(batch, tokens, channels) - 2)).astype(np.float32)
    rate = -np.exp(np.log(np.arange(1, states + 1)) + 0.1 * normal(channels, states)).astype(np.float32)
    value, key, query = normal(batch, tokens, channels), normal(batch, tokens, states), normal(batch, tokens, states)
    return [value, step, rate, key, query, normal(batch, channels, states) if past else None]


def compare(calls: list[list[np.ndarray | None]], target: str, options: LoweringOptions, *, open_dims: bool) -> None:
    got = run_all(OP, [Call(c, {}) for c in calls], domain=INTERNAL, target=target, open_dims=open_dims,
                  options=options)  # fmt: skip
    for inputs, results in zip(calls, got, strict=True):
        check(results, reference(*inputs))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [*WIDTHS, LAVAPIPE])
def test_every_shape(target: str) -> None:
    calls = [selective(*shape) for shape in SHAPES] + [selective(1, 1, 48, 16, past=False)]
    calls += [selective(2, 6, 32, 16, past=False)]
    compare(calls, target, LoweringOptions(), open_dims=False)


@pytest.mark.parametrize("target", WIDTHS)
def test_workgroups_that_share_channels_do_not_add_to_one_sum(target: str) -> None:
    """Two workers at a time: by chance, so often enough (one of twenty calls was wrong)."""
    one = selective(1, 33, 19, 40)
    output, state = reference(*one)  # type: ignore[arg-type]
    for _ in range(200):
        (got,) = run_all(OP, [Call(one, {})], domain=INTERNAL, target=target, open_dims=False)
        check(got, (output, state))


@pytest.mark.parametrize("target", ["cpu", BASELINE])
def test_open_sizes(target: str) -> None:
    calls = [selective(2, 1, 37, 8), selective(2, 7, 37, 8), selective(2, 5, 32, 8, past=False)]
    compare(calls, target, LoweringOptions(), open_dims=True)


def test_recurrent() -> None:
    calls = [selective(1, 1, 5, 3), selective(2, 1, 5, 3, past=False), selective(2, 6, 5, 3)]
    compare([*calls, selective(1, 4, 5, 3, past=False)], "cpu", RECURRENT, open_dims=False)
    compare(calls[2:], "cpu", RECURRENT, open_dims=True)


def test_split_is_whole() -> None:
    inputs = selective(1, 9, 48, 16)
    whole = run_all(OP, [Call(inputs, {})], domain=INTERNAL)[0]
    state, outputs = inputs[5], list[np.ndarray]()
    for part in (slice(0, 5), slice(5, 9)):
        given = [a[:, part] if i in (0, 1, 3, 4) else a for i, a in enumerate(inputs[:5]) if a is not None]
        output, state = run_all(OP, [Call([*given, state], {})], domain=INTERNAL)[0]
        outputs.append(output)
    np.testing.assert_array_equal(np.concatenate(outputs, axis=1), whole[0])
    np.testing.assert_array_equal(state, whole[1])


@pytest.mark.parametrize("target", ["cpu", LAVAPIPE])
def test_extreme_decays(target: str) -> None:
    """A step so large that nothing of the state is left, none at all, and one that is not a number in one channel."""
    inputs = selective(1, 6, 32, 16)
    step = inputs[1]
    assert step is not None
    step[0, 2], step[0, 3], step[0, 4, 5] = 1e4, 0.0, np.nan
    for tokens in (6, 1):
        given = [a[:, :tokens] if a is not None and i in (0, 1, 3, 4) else a for i, a in enumerate(inputs)]
        if tokens == 1:
            given[1] = np.where(np.arange(32) == 5, np.nan, 1e4).astype(np.float32)[None, None]
        output, state = run_all(OP, [Call(given, {})], domain=INTERNAL, target=target, open_dims=False)[0]
        right_output, right_state = reference(*given)  # type: ignore[arg-type]
        np.testing.assert_array_equal(np.isnan(output), np.isnan(right_output))
        np.testing.assert_array_equal(np.isnan(state), np.isnan(right_state))
        check([np.nan_to_num(output), np.nan_to_num(state)], (np.nan_to_num(right_output), np.nan_to_num(right_state)))
