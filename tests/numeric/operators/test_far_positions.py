"""Positions and lengths that no table or cache has: the nearest row is read, never memory beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import run_op

from tests.tolerances import BENIGN, error

ROWS, COLUMNS = 12, 4
FAR = [12, -1, 10**6, 10**9, -(10**9), 5 * 10**9, 1 << 40, -(1 << 40), (1 << 62) + 3, 11]
NEAREST = [11, 0, 11, 11, 0, 11, 11, 0, 11, 11]
TOKENS = len(FAR)
MICROSOFT = "com.microsoft"
TARGETS = ["cpu", pytest.param("vulkan", marks=pytest.mark.vulkan)]


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


X = normal(1, TOKENS, 2 * COLUMNS)
CACHES = [normal(ROWS, COLUMNS), normal(ROWS, COLUMNS)]


def rotary(target: str, positions: np.ndarray) -> np.ndarray:
    return run_op("RotaryEmbedding", [X, *CACHES, positions], {"num_heads": 1}, target=target)[0]


def rotary_of_microsoft(target: str, positions: np.ndarray) -> np.ndarray:
    return run_op("RotaryEmbedding", [X, positions, *CACHES], {}, domain=MICROSOFT, version=1, target=target)[0]


def m_rotary(target: str, positions: np.ndarray) -> np.ndarray:
    attributes = {"num_heads": 1, "mrope_section": [2, 1, 1]}
    positions = np.stack([positions] * 3)
    return run_op("MRotaryEmbedding", [X, positions, *CACHES], attributes, domain=MICROSOFT, version=1, target=target)[
        0
    ]


def group_query_attention(target: str, positions: np.ndarray) -> np.ndarray:
    attributes = {"num_heads": 1, "kv_num_heads": 1, "do_rotary": 1}
    lengths, total = np.array([TOKENS - 1], np.int32), np.array(TOKENS, np.int32)
    inputs = [X, X, X, None, None, lengths, total, *CACHES, positions]
    return run_op("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, version=1, num_outputs=3, target=target)[
        1
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("run", [rotary, rotary_of_microsoft, m_rotary, group_query_attention])
def test_position_ids(run: Any, target: str) -> None:
    got, want = (run(target, np.array([positions])) for positions in (FAR, NEAREST))
    assert error(got, want) < BENIGN["float32"]


@pytest.mark.parametrize("offset", [3, 5 * 10**9, -(1 << 40)])
def test_first_position(offset: int) -> None:
    """com.microsoft's position_ids [1] is the first token's."""
    got = rotary_of_microsoft("cpu", np.array([offset]))
    positions = np.clip(np.clip(offset, 0, ROWS - 1) + np.arange(TOKENS), 0, ROWS - 1)
    assert error(got, rotary_of_microsoft("cpu", positions[None])) < BENIGN["float32"]


LENGTHS = [(1 << 31) - 1, -(1 << 31), -5, 10**6]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("turned", [False, True])
def test_lengths_of_a_growing_cache(turned: bool, target: str) -> None:
    """Every output is a mean of values that were given."""
    batch, past, size = len(LENGTHS), 3, 2 * COLUMNS
    new = [normal(batch, 2, size) for _ in range(3)]
    pasts = [normal(batch, 1, past, size)] * 2
    inputs = [*new, *pasts, np.array(LENGTHS, np.int32), np.array(past + 2, np.int32), *(CACHES if turned else [])]
    attributes = {"num_heads": 1, "kv_num_heads": 1, "do_rotary": int(turned)}
    got = run_op("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, version=1, num_outputs=3, target=target)
    largest = max(np.abs(array).max() for array in (*new, *pasts)) * (1 + 1e-6)
    assert np.abs(got[0]).max() <= largest
    assert np.abs(got[2]).max() <= largest


@pytest.mark.parametrize("target", TARGETS)
def test_more_keys_than_there_are(target: str) -> None:
    q, k, v = normal(4, 1, 2, 8), normal(4, 1, 5, 8), normal(4, 1, 5, 8)
    inputs = [q, k, v, None, None, None, np.array([5, 6, 10**6, -3])]
    got = run_op("Attention", inputs, {}, num_outputs=1, target=target)[0]
    inputs[6] = np.array([5, 5, 5, 0])
    assert error(got, run_op("Attention", inputs, {}, num_outputs=1, target=target)[0]) < BENIGN["float32"]
