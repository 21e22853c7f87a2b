"""What the strategies emit also compiles for CUDA; nothing is run, so no device is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data import Shape, causal_conv, linear_attention
from harness import DTYPES, TARGETS, compile_module, lowered
from iree.compiler.api import Session
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.op import INTERNAL, MICROSOFT, LoweringOptions
from linattn.dialect_patterns.target import Target
from state_ops import specs_of

FLAGS = ["--iree-hal-target-device=cuda", "--iree-cuda-target=sm_89", "--iree-input-type=none"]


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "cuda", Target("cuda", is_gpu=True, subgroup_size=32, matrix_units=True))


def compiles(op_type: str, inputs: list[np.ndarray | None], attributes: dict[str, Any], open_dims: bool) -> bool:
    return compiles_node("", op_type, 27, specs_of(op_type, inputs, open_dims), attributes, 2)


def compiles_node(
    domain: str,
    op_type: str,
    version: int,
    specs: Sequence[TensorSpec | None],
    attributes: Mapping[str, Any],
    num_outputs: int = 1,
) -> bool:
    session = Session()
    session.set_flags(*FLAGS)
    options = LoweringOptions(chunk_size=16)
    module = lowered(domain, op_type, version, specs, attributes, num_outputs, "cuda", options, session.context)
    return len(compile_module(module, session, "cuda")) > 0


@pytest.mark.parametrize(
    ("shape", "tokens", "open_dims", "dtype"),
    [
        (Shape(), 1, False, np.float16),
        (Shape(), 40, False, np.float16),
        (Shape("gated_delta", "key"), 40, True, np.float32),
        (Shape("gated"), 40, True, np.float32),
    ],
)
def test_linear_attention(shape: Shape, tokens: int, open_dims: bool, dtype: Any) -> None:
    inputs = linear_attention(shape, 1, tokens, dtype=dtype)
    assert compiles("LinearAttention", inputs, shape.attributes, open_dims)


@pytest.mark.parametrize(
    ("tokens", "dtype", "strategy"),
    [
        (2, np.float16, "attention_fused_simt_parts"),
        (40, np.float32, "attention_fused_simt_tiles"),
        (40, ml_dtypes.bfloat16, "linalg.generic"),
    ],
)
def test_group_query_attention(tokens: int, dtype: Any, strategy: str) -> None:
    """Packed, rotated, in a window, with a softcap, a bias and sinks."""
    heads, kv_heads, size = 4, 2, 32
    packed, empty = (1, tokens, (heads + 2 * kv_heads) * size), (1, kv_heads, 0, size)
    tables, bias = [(64, size // 2)] * 2, (1, 1, tokens, tokens)
    shapes = [packed, None, None, empty, empty, None, None, *tables, None, bias, (heads,)]
    specs = [None if s is None else TensorSpec(s, DTYPES[np.dtype(dtype).name]) for s in shapes]
    specs[5:7] = TensorSpec((1,), "i32"), TensorSpec((), "i32")
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1, "rotary_interleaved": 1,
                  "local_window_size": 17, "softcap": 20.0}  # fmt: skip
    session = Session()
    session.set_flags(*FLAGS)
    module = lowered("com.microsoft", "GroupQueryAttention", 1, specs, attributes, 3, "cuda", context=session.context)
    assert strategy in str(module)
    assert len(compile_module(module, session, "cuda")) > 0


@pytest.mark.parametrize("open_dims", [False, True])
def test_causal_conv(open_dims: bool) -> None:
    assert compiles("CausalConvWithState", causal_conv(1, 6, 5, 4, dtype=np.float16), {}, open_dims)


@pytest.mark.parametrize("tokens", [1, 6, None])
def test_selective_scan(tokens: int | None) -> None:
    value, keys = TensorSpec((1, tokens, 40), "f32"), TensorSpec((1, tokens, 16), "f32")
    specs = [value, value, TensorSpec((40, 16), "f32"), keys, keys, TensorSpec((1, 40, 16), "f32")]
    assert compiles_node(INTERNAL, "SelectiveScan", 1, specs, {}, 2)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_gather_block_quantized(dtype: str) -> None:
    table, scales, zeros = TensorSpec((37, 36), "i8"), TensorSpec((37, 3), dtype), TensorSpec((37, 2), "i8")
    attributes = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
    specs = [table, TensorSpec((1, None), "i64"), scales, zeros]
    assert compiles_node(MICROSOFT, "GatherBlockQuantized", 1, specs, attributes)


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter(mode: str) -> None:
    cache, update = TensorSpec((2, 3, 16, 8), "f16"), TensorSpec((2, 3, 4, 8), "f16")
    assert compiles_node("", "TensorScatter", 24, [cache, update, TensorSpec((2,), "i64")], {"mode": mode})
