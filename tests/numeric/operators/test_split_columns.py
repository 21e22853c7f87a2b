"""SplitColumns on a Vulkan device (lavapipe in CI), bit by bit, and which Split nodes it is made of."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from harness import TARGETS, run_op, spec
from linattn.dialect_patterns.node import TensorSpec
from linattn.dialect_patterns.split_columns import can_divide
from linattn.dialect_patterns.target import Limits, Target
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from linattn.frontend.graph.split_columns import split_columns
from onnx import TensorProto, helper, numpy_helper
from tolerances import BENIGN, error

GPU = Target("vulkan", is_gpu=True)


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("target", "dtype", "lead", "sizes"),
    [
        ("vulkan", np.float32, (1, 70), (64, 4, 32)),
        ("vulkan", np.float32, (2, 3, 5), (12, 12)),
        ("lavapipe", np.float16, (1, 33), (128, 8, 24, 128)),
        ("lavapipe", ml_dtypes.bfloat16, (2, 1), (8, 16)),
    ],
)
def test_parts(target: str, dtype: Any, lead: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    x = np.random.default_rng(len(sizes)).standard_normal((*lead, sum(sizes))).astype(dtype)
    x[..., 0], x[..., -1] = np.nan, -np.inf
    common = {"domain": "linattn", "version": 1, "num_outputs": len(sizes), "target": target}
    got = run_op("SplitColumns", [x], {"sizes": list(sizes)}, **common)
    for part, want in zip(got, np.split(x, np.cumsum(sizes)[:-1], axis=-1), strict=True):
        assert part.dtype == dtype
        assert part.tobytes() == want.tobytes()


@pytest.mark.vulkan
@pytest.mark.xdist_group("vulkan")
@pytest.mark.parametrize(
    ("dtype", "rows", "sizes", "heads", "factors"),
    [
        (np.float32, 33, (64, 32, 64), (32, 0, 32), (0.125, 1.0, 1.0)),
        (np.float16, 70, (128, 64, 64), (64, 64, 0), (1.0, -3.0, 1.0)),
        (ml_dtypes.bfloat16, 5, (16, 16), (0, 8), (1.0, 1.0)),
    ],
)
def test_parts_over_the_norms_of_their_heads(
    dtype: Any, rows: int, sizes: tuple[int, ...], heads: tuple[int, ...], factors: tuple[float, ...]
) -> None:
    x = np.random.default_rng(rows).standard_normal((1, rows, sum(sizes))).astype(dtype)
    assert can_divide(spec(x), sizes, heads, TARGETS["lavapipe"])
    x[0, 1] = 0
    given = {"sizes": list(sizes), "heads": list(heads), "factors": list(factors)}
    common = {"domain": "linattn", "version": 1, "num_outputs": len(sizes), "target": "lavapipe"}
    got = run_op("SplitColumns", [x], given, **common)
    for part, want, head, factor in zip(got, np.split(x, np.cumsum(sizes)[:-1], axis=-1), heads, factors, strict=True):
        if head:
            apart = want.astype(np.float64).reshape(rows, -1, head)
            norm = np.linalg.norm(apart, axis=-1, keepdims=True)
            want = (apart / np.where(norm, norm, 1) * factor).reshape(want.shape)
            assert error(part, want) <= BENIGN[np.dtype(dtype).name]
        else:
            assert part.tobytes() == want.tobytes()


@pytest.mark.parametrize(
    ("sizes", "heads", "possible"),
    [
        ((32, 32, 64), (32, 32, 0), True),
        ((32, 32, 20), (32, 32, 0), False),  # the second row's heads begin between two groups of threads
        ((20, 32, 12), (0, 32, 0), False),  # heads of every row do
        ((32, 20, 12), (32, 0, 0), True),
    ],
)
def test_where_heads_begin(sizes: tuple[int, ...], heads: tuple[int, ...], possible: bool) -> None:
    """Their threads are neighbours that begin at a multiple of their number: others would sum over two heads."""
    x = TensorSpec((1, 5, sum(sizes)), "f32")
    assert can_divide(x, sizes, heads, TARGETS["lavapipe"]) is possible


def kinds(
    axis: int,
    shape: tuple[int | str, ...],
    sizes: tuple[int, ...],
    target: Target = GPU,
    elem: int = TensorProto.FLOAT16,
) -> list[str]:
    """What becomes of a Split."""
    names = [f"y{i}" for i in range(len(sizes))]
    node = helper.make_node("Split", ["x", "sizes"], names, "split", axis=axis)
    outputs = [helper.make_tensor_value_info(name, elem, None) for name in names]
    inputs = [helper.make_tensor_value_info("x", elem, shape)]
    given = [numpy_helper.from_array(np.array(sizes), "sizes")]
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, outputs, given), opset_imports=[helper.make_opsetid("", 21)]
    )
    before = model.SerializeToString()
    found = split_columns(SpecializedGraph(model, infer_types(model)), target).proto
    assert model.SerializeToString() == before
    return [node.op_type for node in found.graph.node]


@pytest.mark.parametrize(
    ("axis", "shape", "sizes", "options", "made"),
    [
        (-1, (1, 8, 48), (32, 16), {}, True),
        (2, (1, 8, 48), (32, 16), {}, True),
        (1, (1, 8, 48), (4, 4), {}, False),
        (-1, (1, 1, 48), (32, 16), {}, False),  # of one row they lie beside each other
        (-1, (1, 1, 8, 48), (32, 16), {}, False),  # of one token their readers find them
        (-1, (1, 2, 8, 48), (32, 16), {}, True),
        (-1, (1, "tokens", 48), (32, 16), {}, False),
        (-1, (1, 8, 48), (36, 12), {}, False),  # no whole chunks in f16
        (-1, (1, 8, 48), (36, 12), {"elem": TensorProto.FLOAT}, True),
        (-1, (1, 8, 48), (32, 16), {"elem": TensorProto.INT64}, False),
        (-1, (1, 8, 48), (32, 16), {"target": Target("cpu", vector_bits=256)}, False),
        (-1, (1, 8, 48), (16, 16, 16), {"target": Target("v", is_gpu=True, limits=Limits(bindings=3))}, False),
    ],
)
def test_what_is_made_of_it(
    axis: int, shape: tuple[int | str, ...], sizes: tuple[int, ...], options: dict[str, Any], made: bool
) -> None:
    assert kinds(axis, shape, sizes, **options) == ["SplitColumns" if made else "Split"]


@pytest.mark.parametrize(
    ("elsewhere", "axis", "factor", "rest", "heads"),
    [("", -1, 0.25, 32, [16, 0]), ("", 3, 0.0, 32, [16, 0]), ("y0", -1, 0.25, 32, [0, 0]),
     ("normed", -1, 0.25, 32, [0, 0]), ("", 2, 0.25, 32, [0, 0]), ("", -1, 0.25, 24, [0, 0])],
)  # fmt: skip
def test_a_norm_behind_a_part(elsewhere: str, axis: int, factor: float, rest: int, heads: list[int]) -> None:
    """It is part of the kernel where nothing else reads what is on the way; without a factor there is no product."""
    nodes = [
        helper.make_node("Split", ["x", "sizes"], ["y0", "y1"], "split", axis=-1),
        helper.make_node("Reshape", ["y0", "apart"], ["heads"], "r0"),
        helper.make_node("LpNormalization", ["heads"], ["normed"], "norm", axis=axis, p=2),
        helper.make_node("Reshape", ["normed", "flat"], ["z"], "r1"),
    ]
    nodes += [helper.make_node("Mul", ["z", "factor"], ["q"], "times")] if factor else []
    nodes.append(helper.make_node("Neg", ["q" if factor else "z"], ["end"], "end"))
    nodes += [helper.make_node("Neg", [elsewhere], ["other"], "other")] if elsewhere else []
    given = {"sizes": [64, rest], "apart": [0, 0, 4, 16], "flat": [0, 0, 64]}
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in given.items()]
    constants.append(numpy_helper.from_array(np.array(factor, np.float16), "factor"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, None) for name in ("end", "y1")]
    x = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, (1, 8, 64 + rest))]
    imports = [helper.make_opsetid("", 21)]
    model = helper.make_model(helper.make_graph(nodes, "g", x, ends, constants), opset_imports=imports)
    target = Target("vulkan", is_gpu=True, subgroup_size=32)
    found = split_columns(SpecializedGraph(model, infer_types(model)), target).proto.graph.node
    attributes = {one.name: helper.get_attribute_value(one) for one in found[0].attribute}
    assert attributes["heads"] == heads
    if any(heads):
        assert [node.op_type for node in found] == ["SplitColumns", "Neg"]
        assert list(found[0].output) == ["q" if factor else "z", "y1"]
        assert attributes["factors"] == [factor or 1.0, 1.0]
