"""Mixtures of experts as nodes of one model: many cases for one compile, each node with inputs of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from linattn.dialect_patterns.experts.contract import Experts, parse
from linattn.dialect_patterns.experts.reference import reference
from linattn.runtime import Program
from onnx import helper, numpy_helper

from tests.harness import node_for, spec
from tests.tolerances import BENIGN, error

Array = np.ndarray[Any, Any]
MOE = {"fc1": (2, 3), "fc2": (4, 5), "fc3": (6, 7)}
QMOE = {"fc1": (2, 4, 3, 11), "fc2": (5, 7, 6, 12), "fc3": (8, 10, 9, 13)}


@dataclass(frozen=True)
class Case:
    """A node.

    ``router`` is ``random``, ``ties`` (all alike), ``pairs`` (ties in part), ``one`` (the first experts get all) or
    ``few`` (scattered as lfm2 does: all but k at -10000).
    """

    name: str
    tokens: int
    experts: int = 8
    k: int = 2
    hidden: int = 64
    inner: int = 48
    activation: str = "swiglu"
    fusion: int = 1
    bits: int = 0
    block: int = 0
    zeros: bool = False
    bias: bool = True
    fc3: bool = False
    router: str = "random"
    router_weights: bool = False
    wide_scales: bool = False
    lead: tuple[int, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def op_type(self) -> str:
        return "QMoE" if self.bits else "MoE"

    @property
    def all_attributes(self) -> dict[str, Any]:
        given: dict[str, Any] = {"k": self.k, "activation_type": self.activation}
        if self.activation in ("swiglu", "geglu"):
            given["swiglu_fusion"] = self.fusion
        if self.bits:
            given["expert_weight_bits"] = self.bits
        if self.block:
            given["block_size"] = self.block
        return {**given, **self.attributes}

    @property
    def fused(self) -> bool:
        return self.activation in ("swiglu", "geglu") and self.fusion > 0

    def inputs(self, dtype: Any) -> list[Array | None]:
        """All inputs by number."""
        rng = np.random.default_rng(len(self.name) + self.tokens)
        lead = self.lead or (self.tokens,)
        values: list[Array | None] = [None] * (15 if self.bits else 8)
        values[0] = rng.standard_normal((*lead, self.hidden)).astype(dtype)
        values[1] = self._router(rng).astype(dtype)
        if self.router_weights:
            values[14] = rng.random((self.tokens, self.experts)).astype(dtype)
        columns = self.inner * (2 if self.fused else 1)
        layers = [("fc1", columns, self.hidden), ("fc2", self.hidden, self.inner)]
        for name, n, depth in [*layers, *([("fc3", self.inner, self.hidden)] if self.fc3 else [])]:
            ports = (QMOE if self.bits else MOE)[name]
            if self.bits:
                packed, scales, points = self._quantised(rng, n, depth)
                scale_dtype = np.float32 if self.wide_scales else dtype
                values[ports[0]], values[ports[2]], values[ports[3]] = packed, scales.astype(scale_dtype), points
            else:
                scale = 1 / np.sqrt(depth)
                values[ports[0]] = (scale * rng.standard_normal((self.experts, n, depth))).astype(dtype)
            if self.bias:
                values[ports[1]] = rng.standard_normal((self.experts, n)).astype(dtype)
        while values[-1] is None:
            values.pop()
        return values

    def _router(self, rng: np.random.Generator) -> Array:
        shape = (self.tokens, self.experts)
        if self.router == "ties":
            return np.ones(shape)
        if self.router == "pairs":
            return rng.integers(0, 3, shape).astype(float)
        if self.router == "one":
            return np.broadcast_to(-np.arange(self.experts, dtype=float), shape)
        values = rng.standard_normal(shape)
        if self.router == "few":
            chosen = np.argsort(values)[:, -self.k :]
            out = np.full(shape, -10000.0)
            np.put_along_axis(out, chosen, np.log(1 / (1 + np.exp(-np.take_along_axis(values, chosen, 1)))), 1)
            return out
        return values

    def _quantised(self, rng: np.random.Generator, n: int, depth: int) -> tuple[Array, Array, Array | None]:
        packed = rng.integers(0, 256, (self.experts, n, depth * self.bits // 8)).astype(np.uint8)
        blocks = (depth // self.block,) if self.block else ()
        spread = (1 << self.bits) * np.sqrt(depth)
        scales = (0.5 + rng.random((self.experts, n, *blocks))) * 4 / spread
        if not self.zeros:
            return packed, scales, None
        shape = (n, -(-blocks[0] * self.bits // 8)) if self.block else (-(-n * self.bits // 8),)
        return packed, scales, rng.integers(0, 256, (self.experts, *shape)).astype(np.uint8)

    def contract(self, inputs: list[Array | None]) -> Experts:
        """What the frontend makes of the node."""
        node = node_for("com.microsoft", self.op_type, 1, [spec(a) for a in inputs], self.all_attributes, 1)
        return parse(node)


def model_of(cases: list[Case], dtype: Any, open_tokens: bool = False) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of all cases, and what to feed it."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes, inputs, outputs, weights = [], [], [], []
    feeds: dict[str, Array] = {}
    for i, case in enumerate(cases):
        names: list[str] = []
        for port, array in enumerate(case.inputs(dtype)):
            names.append(f"in{i}_{port}" if array is not None else "")
            if array is None:
                continue
            if port in (0, 1, 14):
                feeds[names[-1]] = array
                shape = ["tokens", *array.shape[1:]] if open_tokens else array.shape
                inputs.append(helper.make_tensor_value_info(names[-1], element, shape))
            else:
                weights.append(numpy_helper.from_array(array, names[-1]))
        shape = feeds[f"in{i}_0"].shape
        shape = ["tokens", *shape[1:]] if open_tokens else shape
        outputs.append(helper.make_tensor_value_info(f"y{i}", element, shape))
        node = helper.make_node(case.op_type, names, [f"y{i}"], case.name, domain="com.microsoft")
        node.attribute.extend(helper.make_attribute(k, v) for k, v in case.all_attributes.items())
        nodes.append(node)
    graph = helper.make_graph(nodes, "experts", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


def check_program(program: Program, cases: list[Case], feeds: dict[str, Array], dtype: Any) -> None:
    """Every case against the reference in float64."""
    results = program.run(feeds)
    found: dict[str, float] = {}
    for i, case in enumerate(cases):
        inputs = case.inputs(dtype)
        found[case.name] = error(results[f"y{i}"], reference(case.contract(inputs), inputs))
    limit = BENIGN[np.dtype(dtype).name]
    assert not {name: value for name, value in found.items() if not value <= limit}, found
