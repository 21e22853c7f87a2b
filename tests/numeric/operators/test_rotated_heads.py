"""Rotary embeddings of prompts on CPUs, with norms, casts and Splits around them, as one kernel, against float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from harness import CPUS, WIDTHS, skip_unless_it_runs
from linattn.dialect_patterns.op import MICROSOFT
from linattn.dialect_patterns.target import Target
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.graph.rotate_heads import rotate_heads
from linattn.frontend.graph.schema import infer_types
from linattn.frontend.graph.specialize import SpecializedGraph
from linattn.runtime import Program
from onnx import TensorProto, helper, numpy_helper
from tolerances import BENIGN, error

B, T, H, D, POSITIONS, EPSILON = 2, 37, 3, 64, 50, 1e-6
MROPE = {"mrope_section": [6, 6, 4], "mrope_layout": 1}
VERSIONS = {"": 23, MICROSOFT: 1}


@dataclass
class Branch:
    """One rotary embedding and what stands around it.

    Attributes:
        kind: ``mrope``, ``offset``, ``rows`` (com.microsoft), ``onnx`` or ``in_cache`` (ai.onnx).
        normed: Whether heads are normalised, flat as [1, B * T * H, D].
        cast: Whether it is computed in f32 between casts.
        gate: Whether each head has a gate beside it, which a Split takes off.
        attributes: More of the node's.
        tokens: T.
    """

    kind: str
    normed: bool = True
    cast: bool = False
    gate: bool = False
    rotated: int = 32
    attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    tokens: int = T

    @property
    def width(self) -> int:
        return H * D * (2 if self.gate else 1)


BRANCHES = [
    Branch("mrope", cast=True, gate=True, attributes=MROPE),
    Branch("mrope", cast=True, attributes=MROPE | {"mrope_layout": 0, "scale": 1.5}),
    Branch("rows", normed=False),
    Branch("offset", gate=True),
    Branch("onnx", rotated=64),
    Branch("in_cache", normed=False, cast=True, rotated=16),
]


def build(branches: list[Branch], dtype: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A product's columns cut into one branch after the other; what to feed, and float64's results."""
    element, generator = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), np.random.default_rng(3)
    tokens, total = branches[0].tokens, sum(branch.width for branch in branches) + 8
    x = generator.standard_normal((B, tokens, total)).astype(dtype)
    feeds, wants = {"x": x}, dict[str, np.ndarray]()
    inputs = [helper.make_tensor_value_info("x", element, x.shape)]
    weights = [numpy_helper.from_array(np.array([*(one.width for one in branches), 8]), "widths")]
    nodes = [helper.make_node("Split", ["x", "widths"], [f"part{i}" for i in range(len(branches) + 1)], "cut", axis=-1)]
    outputs: list[onnx.ValueInfoProto] = []

    def add(kind: str, given: list[str], made: str | list[str], domain: str = "", **attributes: Any) -> None:
        names = [made] if isinstance(made, str) else made
        nodes.append(helper.make_node(kind, given, names, names[0], domain=domain, **attributes))

    def constant(name: str, values: Any) -> str:
        weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def feed(name: str, values: np.ndarray) -> str:
        feeds[name] = values
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        inputs.append(helper.make_tensor_value_info(name, kind, values.shape))
        return name

    first = 0
    for i, one in enumerate(branches):
        name, heads = f"part{i}", x[..., first : first + one.width].astype(np.float64).reshape(B, tokens, H, -1)
        heads, first = heads[..., :D], first + one.width
        if one.gate:
            add("Reshape", [name, constant(f"apart{i}", [0, 0, H, 2 * D])], f"apart.{i}")
            add("Split", [f"apart.{i}", constant(f"halves{i}", [D, D])], [f"heads{i}", f"gate{i}"], axis=-1)
            outputs.append(helper.make_tensor_value_info(f"gate{i}", element, [B, tokens, H, D]))
            wants[f"gate{i}"] = x[..., first - one.width : first].reshape(B, tokens, H, -1)[..., D:]
            name = f"heads{i}"
        if one.normed:
            gamma = generator.standard_normal(D).astype(dtype)
            add("Reshape", [name, constant(f"flat{i}", [1, B * tokens * H, D])], f"flat.{i}")
            add(
                "SimplifiedLayerNormalization", [f"flat.{i}", constant(f"gamma{i}", gamma)], f"normed{i}",
                axis=-1, epsilon=EPSILON, stash_type=1,
            )  # fmt: skip
            name = f"normed{i}"
            heads = heads / np.sqrt(np.mean(heads**2, axis=-1, keepdims=True) + EPSILON) * gamma.astype(np.float64)
        if one.normed or one.gate:
            add("Reshape", [name, constant(f"rows{i}", [B, tokens, H * D])], f"rows.{i}")
            name = f"rows.{i}"
        inner = np.float32 if one.cast else dtype
        if one.cast:
            add("Cast", [name], f"wide{i}", to=TensorProto.FLOAT)
            name = f"wide{i}"
        half = one.rotated // 2
        phase = 3 * generator.standard_normal((B, tokens, half) if one.kind == "in_cache" else (POSITIONS, half))
        caches = [feed(f"cos{i}", np.cos(phase).astype(inner)), feed(f"sin{i}", np.sin(phase).astype(inner))]
        cos, sin = (feeds[cache].astype(np.float64) for cache in caches)
        ids = generator.integers(0, POSITIONS, (3, B, tokens))
        domain, given = MICROSOFT, [name, f"ids{i}", *caches]
        if one.kind == "mrope":
            feed(f"ids{i}", ids)
            sections = one.attributes["mrope_section"]
            if one.attributes["mrope_layout"]:
                streams = [c % 3 if c % 3 and c < 3 * sections[c % 3] else 0 for c in range(half)]
            else:
                streams = [s for s, count in enumerate(sections) for _ in range(count)]
            columns = np.arange(half)
            cos, sin = (
                np.stack([cache[ids[s], c] for s, c in zip(streams, columns, strict=True)], -1)
                * one.attributes.get("scale", 1.0)
                for cache in (cos, sin)
            )
        elif one.kind == "offset":
            feed(f"ids{i}", np.array([5]))
            cos, sin = (cache[5 : 5 + tokens][None] for cache in (cos, sin))
        elif one.kind in ("rows", "onnx"):
            feed(f"ids{i}", ids[0])
            cos, sin = (cache[ids[0]] for cache in (cos, sin))
        if one.kind in ("onnx", "in_cache"):
            domain, given = "", [name, *caches, *([f"ids{i}"] if one.kind == "onnx" else [])]
        sizes = {"num_heads": H, "rotary_embedding_dim": one.rotated}
        operator = "MRotaryEmbedding" if one.kind == "mrope" else "RotaryEmbedding"
        add(operator, given, f"turned{i}", domain, **sizes, **one.attributes)
        name = f"turned{i}"
        if one.cast:
            add("Cast", [name], f"y{i}", to=element)
            name = f"y{i}"
        outputs.append(helper.make_tensor_value_info(name, element, [B, tokens, H * D]))
        cos, sin = cos[:, :, None], sin[:, :, None]
        low, high = heads[..., :half], heads[..., half : 2 * half]
        turned = [low * cos - high * sin, high * cos + low * sin, heads[..., 2 * half :]]
        wants[name] = np.concatenate(turned, axis=-1).reshape(B, tokens, H * D)
    outputs.append(helper.make_tensor_value_info(f"part{len(branches)}", element, [B, tokens, 8]))
    wants[f"part{len(branches)}"] = x[..., -8:]
    opsets = [helper.make_opsetid("", VERSIONS[""]), helper.make_opsetid(MICROSOFT, 1)]
    graph = helper.make_graph(nodes, "rotations", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds, wants


@pytest.mark.parametrize(
    ("target", "dtype"),
    [*((width, np.float32) for width in WIDTHS), ("cpu256", np.float16), ("cpu512", ml_dtypes.bfloat16)],
)
def test_rotated_heads(target: str, dtype: Any) -> None:
    model, feeds, wants = build(BRANCHES, dtype)
    module = compile_model(model, CompileOptions(cpu_features=CPUS[target])).module
    assert module.count(b"rotated_heads_") >= len(BRANCHES)
    assert b"_reduction_" not in module  # a norm of its own
    skip_unless_it_runs(target)
    results = Program.load(module).run(feeds)
    assert results.keys() == wants.keys()
    for name, want in wants.items():
        assert error(results[name], want) <= BENIGN[np.dtype(dtype).name], name


CPU = Target("cpu", vector_bits=256)


def kinds(branch: Branch, target: Target = CPU) -> dict[str, Any]:
    """What becomes of a rotary embedding: the kinds of nodes, and the made node's attributes."""
    model, _, _ = build([branch], np.float16)
    before = model.SerializeToString()
    found = rotate_heads(SpecializedGraph(model, infer_types(model)), VERSIONS, target).proto.graph.node
    assert model.SerializeToString() == before
    made = [node for node in found if node.op_type == "RotatedHeads"]
    given = {one.name: helper.get_attribute_value(one) for node in made for one in node.attribute}
    return given | {"kinds": {node.op_type for node in found}, "x": made[0].input[0] if made else ""}


def test_heads_are_read_where_they_lie() -> None:
    found = kinds(Branch("mrope", cast=True, gate=True, attributes=MROPE))
    assert (found["x"], found["start"], found["stride"]) == ("x", 0, 2 * D)
    assert not {"Cast", "SimplifiedLayerNormalization", "MRotaryEmbedding"} & found["kinds"]


def test_without_a_norm() -> None:
    found = kinds(Branch("rows", normed=False))
    assert "epsilon" not in found
    assert found["kinds"] == {"Split", "RotatedHeads"}


@pytest.mark.parametrize(
    ("branch", "target"),
    [
        (Branch("rows", tokens=1), CPU),
        (Branch("rows"), Target("vulkan", is_gpu=True)),
        (Branch("rows", attributes={"interleaved": 1}), CPU),
        (Branch("rows", rotated=12), CPU),  # vectors do not divide six
    ],
)
def test_left_alone(branch: Branch, target: Target) -> None:
    assert "RotatedHeads" not in kinds(branch, target)["kinds"]
