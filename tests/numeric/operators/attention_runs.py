"""Runs an attention operator with open dimensions, and over a KV cache of fixed capacity that is updated in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import harness
import iree.runtime as rt
import ml_dtypes
import numpy as np
import together
from iree.compiler import ir
from iree.compiler.api import Session
from iree.compiler.passmanager import PassManager
from iree.compiler.tools import InputType, compile_str
from linattn.dialect_patterns.emit.builder import Builder
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import LoweringContext
from linattn.dialect_patterns.rewrite import lower_operators

from tests.tolerances import BENIGN

KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32}
CAPACITY = 200
"""Of the caches that many query rows go over."""


def error(got: np.ndarray, want: np.ndarray) -> float:
    """max|d| / max|ref|; differing shapes and NaNs fail."""
    assert got.shape == want.shape
    got, want = got.astype(np.float64), want.astype(np.float64)
    assert np.isfinite(got).all()
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)) if want.size else 0.0


def open_axes(array: np.ndarray, axes: Sequence[int]) -> TensorSpec:
    spec = harness.spec(array)
    return replace(spec, shape=tuple(None if i in axes else d for i, d in enumerate(spec.shape)))


def load(vmfb: bytes, target: str) -> Any:
    harness.skip_unless_it_runs(target)
    context = rt.SystemContext(config=harness.device_config(target))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, vmfb))
    return context.modules.module.main


def to_device(array: np.ndarray, target: str) -> Any:
    device = harness.device_config(target).device
    if array.dtype.name == "bfloat16":
        view = device.allocator.allocate_buffer_copy(  # asdevicearray drops its element_type (IREE 3.13)
            memory_type=rt.MemoryType.DEVICE_LOCAL, allowed_usage=rt.BufferUsage.DEFAULT, device=device,
            buffer=np.ascontiguousarray(array).view(np.uint16), element_type=rt.HalElementType.BFLOAT_16,
        )  # fmt: skip
        return rt.DeviceArray(device, view, override_dtype=np.dtype(np.uint16))
    return rt.asdevicearray(device, np.asarray(array, order="C"))  # ascontiguousarray would make [1] of a scalar


def to_host(array: Any, target: str, dtype: np.dtype) -> np.ndarray:
    host = harness._host(harness.device_config(target).device, array)
    return host.view(dtype) if dtype == ml_dtypes.bfloat16 else host


def run_open(
    op_type: str,
    inputs: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any],
    axes: Mapping[int, Sequence[int]] | None = None,
    *,
    domain: str = "",
    version: int = 24,
    num_outputs: int = 3,
    target: str = "cpu",
) -> list[np.ndarray]:
    """One operator with the given axes of its inputs open; outputs of the type of the first input."""
    specs = [None if a is None else open_axes(a, (axes or {}).get(i, ())) for i, a in enumerate(inputs)]
    node = harness.node_for(domain, op_type, version, specs, attributes, num_outputs)
    main = together.function(node, target, harness.DEFAULTS)
    harness.skip_unless_it_runs(target)
    results = main(*[to_device(a, target) for a in inputs if a is not None])
    return [to_host(r, target, inputs[0].dtype) for r in results]


def capacity_module(
    op_type: str,
    domain: str,
    version: int,
    inputs: Sequence[TensorSpec | None],
    outputs: Sequence[TensorSpec],
    attributes: Mapping[str, Any],
    pasts: tuple[int, int],
) -> str:
    """An entry point that takes a position last and returns its two caches in the buffers that it got."""
    given = [(i, s) for i, s in enumerate(inputs) if s is not None]
    order = [i for i, _ in given]
    torch = [harness.torch_type(s) for s in outputs]
    tied = [torch[0], *(f"{t} {{iree.abi.tied = {order.index(p)}}}" for t, p in zip(torch[1:], pasts, strict=True))]
    attributes = {**attributes, "linattn.capacity": 1}
    attrs = "".join(f", torch.onnx.{k} = {harness._attribute(v)}" for k, v in attributes.items())
    operands = ", ".join("%none" if s is None else f"%a{i}" for i, s in enumerate(inputs))
    arguments = ", ".join(f"%a{i}: {harness.torch_type(s)}" for i, s in given)
    return f"""
func.func @main({arguments}, %position: !torch.int) -> ({", ".join(tied)})
    attributes {{torch.onnx_meta.opset_version = 23 : si64}} {{
  %none = torch.constant.none
  %r:3 = torch.operator "onnx.{op_type}"({operands}) {{linattn.domain = "{domain}", linattn.version = {version} : i64,
      linattn.node = "test"{attrs}}} : ({", ".join(harness.torch_type(s) for s in inputs)}) -> ({", ".join(torch)})
  return %r#0, %r#1, %r#2 : {", ".join(torch)}
}}"""


def capacity_lowered(text: str, session: Session, target: str) -> ir.Module:
    context = session.context
    context.load_all_available_dialects()
    with context, ir.Location.unknown():
        module = ir.Module.parse(text)
        assert lower_operators(module, LoweringContext(Builder(), harness.TARGETS[target])) == 1
        harness.set_device(module, target)
        module.operation.verify()
        return module


class CapacityRun:
    """One operator over caches of capacity M: :meth:`step` runs it and commits its tokens."""

    def __init__(
        self,
        op_type: str,
        domain: str,
        version: int,
        inputs: Sequence[np.ndarray | None],
        outputs: Sequence[TensorSpec],
        attributes: Mapping[str, Any],
        pasts: tuple[int, int],
        target: str,
    ) -> None:
        specs = [harness.spec(a) for a in inputs]
        self.text = capacity_module(op_type, domain, version, specs, outputs, attributes, pasts)
        self.target, self.pasts = target, pasts
        session = Session()
        session.set_flags(*harness.FLAGS[target], "--iree-input-type=none")
        module = capacity_lowered(self.text, session, target)
        self.lowered = str(module)
        self.function = load(harness.compile_module(module, session, target), target)
        self.dtype = inputs[0].dtype

    def step(self, inputs: Sequence[np.ndarray | None], caches: Sequence[Any], position: int) -> np.ndarray:
        """The output; ``caches`` are device arrays that are updated in place."""
        given = []
        for i, array in enumerate(inputs):
            if i in self.pasts:
                given.append(caches[self.pasts.index(i)])
            elif array is not None:
                given.append(to_device(array, self.target))
        results = self.function(*given, position)
        return to_host(results[0], self.target, self.dtype)


def attend(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, window: int | None, softcap: float, scale: float
) -> np.ndarray:
    """Causal attention of q [T, Hq, d] over keys and values [Hkv, P + T, d], in float64, a query at a time."""
    tokens, heads, size = q.shape
    y = np.zeros((tokens, heads, size))
    for t in range(tokens):
        seen = slice(0 if window is None else max(0, position + t + 1 - window), position + t + 1)
        for h in range(heads):
            kv = h * keys.shape[0] // heads
            scores = keys[kv, seen] @ q[t, h] * scale
            scores = softcap * np.tanh(scores / softcap) if softcap else scores
            weights = np.exp(scores - scores.max())
            y[t, h] = weights @ values[kv, seen] / weights.sum()
    return y


def rows(array: np.ndarray, kv_heads: int) -> np.ndarray:
    """[T, Hkv * d] as [Hkv, T, d]."""
    return array.astype(np.float64).reshape(len(array), kv_heads, -1).transpose(1, 0, 2)


@dataclass(frozen=True)
class ManyRows:
    """A GroupQueryAttention of many query rows over a cache of 200 rows.

    Attributes:
        tokens: T.
        heads: Hq.
        kv_heads: Hkv.
        size: Of a head.
        window: How many keys a query sees, None for all.
        softcap: Of the scores, 0 for none.
        smooth: Whether the softmax sees a key of score 0 and value 0 besides.
        dtype: Element type.
    """

    tokens: int
    heads: int
    kv_heads: int
    size: int
    window: int | None
    softcap: float
    smooth: bool
    dtype: str

    def check(self, target: str, positions: Sequence[int]) -> str:
        """Runs it at positions of its first token; what it was lowered to.

        What lies behind the position is NaN and is neither read nor weighed; a NaN that is seen spoils who sees it.
        """
        tokens, heads, kv_heads, size = self.tokens, self.heads, self.kv_heads, self.size
        random, scale, kind = np.random.default_rng(tokens + heads), 0.3, KINDS[self.dtype]
        limit = BENIGN[np.dtype(kind).name]
        caches = [TensorSpec((1, kv_heads, CAPACITY, size), self.dtype)] * 2
        specs = [TensorSpec((1, tokens, heads * size), self.dtype), *caches]

        def normal(*shape: int) -> np.ndarray:
            return random.standard_normal(shape).astype(kind)

        cache = [normal(1, kv_heads, CAPACITY, size) for _ in range(2)]
        lengths, total = np.zeros(1, np.int32), np.array(CAPACITY + tokens, np.int32)
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale, "softcap": self.softcap}
        if self.smooth:
            attributes["smooth_softmax"] = 1
        if self.window is not None:
            attributes["local_window_size"] = self.window
        new = [normal(1, tokens, heads * size), *(normal(1, tokens, kv_heads * size) for _ in range(2))]
        inputs = [*new, *cache, lengths, total]
        run = CapacityRun("GroupQueryAttention", "com.microsoft", 1, inputs, specs, attributes, (3, 4), target)
        for position in (min(position, CAPACITY - tokens) for position in positions):
            past = [array.copy() for array in cache]
            for array in past:
                array[:, :, position:] = np.nan
            got = run.step([*new, None, None, lengths, total], [to_device(array, target) for array in past], position)
            q = new[0][0].astype(np.float64).reshape(tokens, heads, size)
            held = [array[0, :, :position].astype(np.float64) for array in past]
            keys, values = (np.concatenate([a, rows(x[0], kv_heads)], 1) for a, x in zip(held, new[1:], strict=True))
            if self.smooth:  # a key more, before all others
                keys, values = (np.concatenate([np.zeros_like(x[:, :1]), x], 1) for x in (keys, values))
            want = attend(q, keys, values, position + self.smooth, self.window, self.softcap, scale)
            assert error(got[0], want.reshape(tokens, -1)) <= limit, f"position {position}"
        spoilt, at = [array.copy() for array in new], tokens - 2
        spoilt[2][0, at, 0] = np.nan  # the first column of the first head's value
        again = run.step([*spoilt, None, None, lengths, total], [to_device(array, target) for array in past], position)
        group, first = heads // kv_heads, again[0].reshape(tokens, heads, size)
        assert np.isnan(first[at:, :group, 0].astype(np.float32)).all()
        clean = got[0].reshape(tokens, heads, size)
        for found, wanted in ((first[:at], clean[:at]), (first[:, group:], clean[:, group:])):
            assert error(found, wanted) <= limit
        assert error(first[at:, :group, 32:], clean[at:, :group, 32:]) <= limit
        return run.lowered


def stream_ir(text: str, target: str) -> str:
    """The entry point after IREE's stream passes: its dispatches and copies."""
    session = Session()
    module = capacity_lowered(text, session, target)
    with session.context, ir.Location.unknown():
        passes = "builtin.module(func.func(convert-torch-onnx-to-torch),torch-to-iree)"
        PassManager.parse(passes).run(module.operation)
    flags = [*harness.FLAGS[target], "--compile-to=stream"]
    return compile_str(str(module), input_type=InputType.NONE, extra_args=flags).decode()
