"""NaN and inf in attention: queries that do not see the key are bit-equal to a run without, the others not finite."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import harness
import matrices
import numpy as np
import pytest
from harness import WIDTHS
from iree.compiler.api import Session
from linattn.dialect_patterns.attention import fused_mma
from linattn.dialect_patterns.node import TensorSpec
from operators.attention_runs import CapacityRun, load, to_device, to_host

B, HQ, HKV, D = 2, 4, 2, 32
CAPACITY, POSITION = 160, 61
VALUES = (np.nan, np.inf)
Inputs = list[np.ndarray | None]


@dataclass(frozen=True)
class Case:
    """One node.

    Attributes:
        op: Which.
        target: Where it runs.
        tokens: T.
        cache: None without a past; "growing", or "capacity": of fixed capacity.
        mask: None, or the type of a mask that hides every fifth key before a query and all after it.
        window: How many keys before its own position a query sees, None for all.
        dtype: Of queries, keys and values; f16 on lavapipe is that of the matrix units, which are emulated.
    """

    op: str
    target: str
    tokens: int
    cache: str = ""
    mask: str = ""
    window: int | None = None
    dtype: Any = np.float32

    @property
    def on_units(self) -> bool:
        """Whether it is one for the matrix units."""
        return self.dtype == np.float16

    @property
    def first(self) -> int:
        """Position of the first query."""
        return POSITION if self.cache else 0

    @property
    def rows(self) -> int:
        """Keys, or the capacity."""
        return CAPACITY if self.cache == "capacity" else self.first + self.tokens

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the node."""
        if self.op == "GroupQueryAttention":
            window = {} if self.window is None else {"local_window_size": self.window + 1}
            return {"num_heads": HQ, "kv_num_heads": HKV, **window}
        window = {} if self.window is None else {"left_window_size": self.window}
        return {
            "q_num_heads": HQ,
            "kv_num_heads": HKV,
            "is_causal": int(not self.mask or self.target == "lavapipe"),
            **window,
        }

    @property
    def pasts(self) -> tuple[int, int]:
        """The ports of the past."""
        return (3, 4) if self.op == "GroupQueryAttention" else (4, 5)

    @cached_property
    def seen(self) -> np.ndarray:
        """Of [T, rows], in the order of the rows of the cache."""
        own, key = self.first + np.arange(self.tokens)[:, None], np.arange(self.rows)
        seen = key <= own
        if self.window is not None:
            seen &= own - self.window <= key
        if self.mask:
            seen &= (key == own) | (key % 5 != 3)
        return seen

    def inputs(self) -> Inputs:
        """The operands, whose caches have their first rows filled."""
        rng = np.random.default_rng(self.tokens)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(self.dtype)

        new = [normal(B, self.tokens, n * D) for n in (HQ, HKV, HKV)]
        past_rows = {"": 0, "growing": self.first, "capacity": CAPACITY}[self.cache]
        past: Inputs = [normal(B, HKV, past_rows, D) for _ in range(2)]
        if self.op == "GroupQueryAttention":
            last = np.full(B, self.first + self.tokens - 1, np.int32)
            return [*new, *past, last, np.array(self.first + self.tokens, np.int32)]
        seen = self.seen
        if self.cache == "capacity":  # the mask has the new keys after the capacity
            own = seen[:, self.first : self.first + self.tokens]
            seen = np.concatenate([seen & (np.arange(CAPACITY) < self.first), own], 1)
        mask = seen if self.mask == "bool" else np.where(seen, 0, -np.inf).astype(self.dtype)
        return [*new, mask if self.mask else None, *(past if self.cache else [])]

    def compiled(self) -> Any:
        """A function of the inputs that gives the output [B, T, Hq, d]."""
        domain, version = ("com.microsoft", 1) if self.op == "GroupQueryAttention" else ("", 25)
        inputs = self.inputs()
        if self.cache == "capacity":
            dtype = harness.DTYPES[np.dtype(self.dtype).name]
            cache = TensorSpec((B, HKV, CAPACITY, D), dtype)
            outputs = [TensorSpec((B, self.tokens, HQ * D), dtype), cache, cache]
            run = CapacityRun(self.op, domain, version, inputs, outputs, self.attributes, self.pasts, self.target)
            assert ("attention_fused_mma" if self.on_units else "attention_fused") in run.lowered

            def step(given: Inputs) -> np.ndarray:
                caches = [to_device(given[i], self.target) for i in self.pasts]
                return run.step(given, caches, self.first).reshape(B, self.tokens, HQ, D)

            return step
        session = Session()
        session.set_flags(*harness.FLAGS[self.target], "--iree-input-type=none")
        specs = [harness.spec(a) for a in inputs]
        module = harness.lowered(
            domain, self.op, version, specs, self.attributes, 3, self.target, context=session.context
        )
        assert ("attention_fused_mma" if self.on_units else "attention_fused") in str(module)
        function = load(harness.compile_module(module, session, self.target), self.target)

        def call(given: Inputs) -> np.ndarray:
            y = function(*[to_device(a, self.target) for a in given if a is not None])[0]
            return to_host(y, self.target, np.dtype(self.dtype)).reshape(B, self.tokens, HQ, D)

        return call


LONG = ("GroupQueryAttention", 40, "capacity", "", 18)
PROMPT = ("GroupQueryAttention", 21, "", "", None)
MASKED = ("Attention", 21, "capacity", "bool", None)
ON_CPU = [
    PROMPT,
    ("GroupQueryAttention", 1, "capacity", "", None),
    ("Attention", 21, "growing", "", 9),
    ("Attention", 5, "growing", "float", None),
]
# On GPUs rows of a batch that stand at different positions are left to the portable form.
ON_GPU = [PROMPT, LONG, ("Attention", 3, "growing", "float", 9), ("Attention", 20, "capacity", "bool", None)]
CASES = [("cpu", kind) for kind in ON_CPU] + [("lavapipe", kind) for kind in ON_GPU]
CASES += [(width, kind) for width in WIDTHS for kind in (LONG, MASKED)]


def name(case: Case) -> str:
    window = "" if case.window is None else f"w{case.window}"
    target = "units" if case.on_units else case.target
    return "-".join(filter(None, (target, case.op, str(case.tokens), case.cache, case.mask, window)))


ALL = [Case(kind[0], target, *kind[1:]) for target, kind in CASES]
ALL += [Case(kind[0], "lavapipe", *kind[1:], dtype=np.float16) for kind in (PROMPT, LONG, ON_GPU[3])]
VULKAN = pytest.mark.vulkan


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=name(c), marks=VULKAN if c.target == "lavapipe" else ()) for c in ALL]
)
def test_attention(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last key head of batch row 1 gets the value, in one row of the keys or of the values."""
    if case.on_units:
        monkeypatch.setitem(harness.TARGETS, case.target, matrices.TARGET)
        matrices.emulate(monkeypatch, fused_mma)
    inputs, run = case.inputs(), case.compiled()
    clean = run(inputs)
    assert np.isfinite(clean).all()
    new = (0, 1, case.tokens // 2, case.tokens - 1)
    places = {case.first + t for t in new}
    if case.cache:
        places |= {3, POSITION - 12, POSITION - 1}
    if case.cache == "capacity":
        places |= {POSITION + case.tokens, CAPACITY - 1}
    for place in sorted(p for p in places if p < case.rows):
        is_new = case.first <= place < case.first + case.tokens
        for which, port in enumerate((1, 2) if is_new else case.pasts):
            for value in VALUES[: 2 if case.target == "cpu" else 1]:
                poisoned = list(inputs)
                poisoned[port] = np.array(inputs[port])
                row = (1, place - case.first, slice(-D, None)) if is_new else (1, -1, place)
                poisoned[port][row] = value
                got = run(poisoned)
                reached = np.zeros(clean.shape, bool)
                reached[1, case.seen[:, place], HQ - HQ // HKV :] = True
                what = f"{value} in {('the key', 'the value')[which]} at {place}"
                np.testing.assert_array_equal(got[~reached], clean[~reached], err_msg=what)
                if which or np.isnan(value):
                    assert not np.isfinite(got[reached]).any(), what


@pytest.mark.parametrize("target", ["cpu", pytest.param("lavapipe", marks=VULKAN)])
def test_query(target: str) -> None:
    """A query reaches itself alone."""
    case = Case("GroupQueryAttention", target, 5)
    inputs, run = case.inputs(), case.compiled()
    clean = run(inputs)
    for token in range(case.tokens):
        poisoned = [np.array(a) for a in inputs]
        poisoned[0][1, token, D] = np.nan
        got, reached = run(poisoned), np.zeros(clean.shape, bool)
        reached[1, token, 1] = True
        np.testing.assert_array_equal(got[~reached], clean[~reached])
        assert np.isnan(got[reached]).all()


def test_rows_behind_what_is_valid() -> None:
    """Of a growing cache whose batch rows are filled differently."""
    ragged = Case("GroupQueryAttention", "cpu", 2, "growing")
    inputs, run = ragged.inputs(), ragged.compiled()
    inputs[5] = np.array([POSITION + 1, POSITION - 9], np.int32)
    clean = run(inputs)
    for port in ragged.pasts:
        inputs[port][1, :, POSITION - 10 :] = np.nan
    np.testing.assert_array_equal(run(inputs), clean)


def test_keys_that_are_none() -> None:
    """Attention's nonpad_kv_seqlen: a batch row of no keys gives zeros, one of a few sees no more."""
    rng = np.random.default_rng(0)
    inputs: Inputs = [rng.standard_normal((B, n, 6, D)).astype(np.float32) for n in (HQ, HKV, HKV)]
    inputs += [None, None, None, np.array([0, 4])]
    for array in inputs[1:3]:
        array[0], array[1, :, 4:] = np.nan, np.nan
    (y,) = harness.run_op("Attention", inputs, {}, version=24)
    np.testing.assert_array_equal(y[0], 0)
    assert np.isfinite(y[1]).all()
