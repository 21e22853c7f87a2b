"""Damaged models end in our own errors before anything is compiled, whatever was damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import onnx
import pytest
from linattn.frontend import compile as compiler
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.runtime.errors import LinattnError

from samples.tiny_hybrid import build

Damage = Callable[[random.Random, onnx.GraphProto], None]


def attribute(rng: random.Random, graph: onnx.GraphProto) -> None:
    node = rng.choice([n for n in graph.node if n.attribute])
    chosen = rng.choice(node.attribute)
    chosen.i = rng.choice([0, -1, 1 << 40, -(1 << 62), 7])
    chosen.f = rng.choice([float("nan"), 1e38, -1.0])
    chosen.s = rng.choice([b"", b"\xff\xfe", b"gated"])
    if rng.random() < 0.3:
        chosen.type = rng.randrange(15)


def operand(rng: random.Random, graph: onnx.GraphProto) -> None:
    node = rng.choice(graph.node)
    other = rng.choice(graph.node).output[0]
    node.input[rng.randrange(len(node.input))] = rng.choice(["", "nope", "logits", "input_ids", other])


def operator(rng: random.Random, graph: onnx.GraphProto) -> None:
    rng.choice(graph.node).op_type = rng.choice(graph.node).op_type


def fewer_inputs(rng: random.Random, graph: onnx.GraphProto) -> None:
    node = rng.choice(graph.node)
    del node.input[rng.randrange(len(node.input)) :]


def initializer(rng: random.Random, graph: onnx.GraphProto) -> None:
    chosen = rng.choice([t for t in graph.initializer if t.dims])
    chosen.dims[0] = rng.choice([0, 1, -1, 1 << 33, 5])


def declared_size(rng: random.Random, graph: onnx.GraphProto) -> None:
    value = rng.choice([*graph.input, *graph.output])
    rng.choice(value.type.tensor_type.shape.dim).dim_value = rng.choice([0, -3, 1 << 40, 2])


def declared_type(rng: random.Random, graph: onnx.GraphProto) -> None:
    rng.choice([*graph.input, *graph.output]).type.tensor_type.elem_type = rng.choice([0, 1, 7, 8, 10, 16, 99])


def result(rng: random.Random, graph: onnx.GraphProto) -> None:
    node = rng.choice(graph.node)
    node.output[rng.randrange(len(node.output))] = rng.choice(["", "x", rng.choice(graph.node).output[0]])


def order(rng: random.Random, graph: onnx.GraphProto) -> None:
    node = onnx.NodeProto()
    index = rng.randrange(len(graph.node))
    node.CopyFrom(graph.node[index])
    del graph.node[index]
    graph.node.insert(rng.randrange(len(graph.node)), node)


DAMAGES: list[Damage] = [
    attribute,
    operand,
    operator,
    fewer_inputs,
    initializer,
    declared_size,
    declared_type,
    result,
    order,
]


class Planned(BaseException):
    """The model was found good and would be compiled now."""


def stop(*_: Any) -> None:
    raise Planned


@pytest.mark.parametrize("damage", DAMAGES, ids=[d.__name__ for d in DAMAGES])
def test_damage(damage: Damage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "Compiler", stop)
    rng = random.Random(damage.__name__)
    refused: list[str] = []
    for _ in range(16):
        model = build()
        damage(rng, model.graph)
        try:
            compile_model(model, CompileOptions(prefill_blocks=(4,), max_context=32))
        except LinattnError as error:
            refused.append(str(error))
        except Planned:
            pass
    assert refused
    assert not [text for text in refused if "\n" in text or "bug in linattn" in text]
