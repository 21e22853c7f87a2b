"""Whether rows may be of different lengths: only where the mask alone decides what a row sees."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from linattn.frontend.graph.row_masks import has_row_masks
from linattn.frontend.graph.states import StatePair

from samples.tiny_hybrid import build


def pairs_of(graph: onnx.GraphProto) -> list[StatePair]:
    """States by name; caches are keys and values."""
    names = [value.name for value in graph.input if "past" in value.name]
    kinds = ["kv_cache" if name.endswith(("key", "value")) else "recurrent" for name in names]
    return [StatePair(name, "", kind, "", (), 0) for name, kind in zip(names, kinds, strict=True)]


@pytest.mark.parametrize(
    ("model", "wanted"), [("genai-fp32-cpu", False), ("mobius-f32-cpu", False), ("mobius-f32-default", True)]
)
def test_exported_models(model: str, wanted: bool, shared_models: Path) -> None:
    graph = onnx.load(shared_models / model / "model.onnx", load_external_data=False).graph
    assert has_row_masks(graph, pairs_of(graph)) is wanted


def attention(graph: onnx.GraphProto) -> onnx.NodeProto:
    return next(node for node in graph.node if node.op_type == "Attention")


def drop_mask(graph: onnx.GraphProto) -> None:
    attention(graph).input[3] = ""


def mask_by_shape(graph: onnx.GraphProto) -> None:
    """The mask is only asked how long it is."""
    for node in graph.node:
        if "attention_mask" in node.input:
            node.op_type = "Shape"


def other_operator(graph: onnx.GraphProto) -> None:
    attention(graph).op_type = "GroupQueryAttention"


def drop_positions(graph: onnx.GraphProto) -> None:
    graph.input.remove(next(value for value in graph.input if value.name == "position_ids"))


def test_the_sample() -> None:
    graph = build().graph
    assert has_row_masks(graph, pairs_of(graph))


@pytest.mark.parametrize("change", [drop_mask, mask_by_shape, other_operator, drop_positions], ids=lambda f: f.__name__)
def test_what_does_not_hide_rows(change: object) -> None:
    graph = build().graph
    change(graph)  # type: ignore[operator]
    assert not has_row_masks(graph, pairs_of(graph))


def test_without_caches() -> None:
    graph = build().graph
    states = [pair for pair in pairs_of(graph) if pair.kind != "kv_cache"]
    drop_mask(graph)
    assert has_row_masks(graph, states)  # positions are counted by the mask
    graph.input.remove(next(value for value in graph.input if value.name == "attention_mask"))
    assert not has_row_masks(graph, states)
    drop_positions(graph)
    assert has_row_masks(graph, states)
