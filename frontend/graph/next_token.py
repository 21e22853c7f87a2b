"""One more entry point for whoever generates: a step that hands back the next token instead of all logits.

Its kernels are those of ``decode``, and one or two more. Logits leave the device no more, so that the next step can be
submitted before this one is done.
"""

from __future__ import annotations

import onnx
from linattn.dialect_patterns.draw_token.contract import DRAW_TOKEN, SETTINGS
from linattn.dialect_patterns.next_token import NEXT_TOKEN
from linattn.dialect_patterns.node import FLOATS, TensorSpec
from linattn.dialect_patterns.op import INTERNAL

from .schema import spec_of_type, type_of_spec
from .specialize import SpecializedGraph

DRAW_INPUT = "linattn.draw"
"""The input that says how tokens are drawn, [B, 8] f32: see ``DrawToken``."""


def choose_next(graph: SpecializedGraph, output: str, ids: str, *, draws: bool = False) -> SpecializedGraph | None:
    """The graph with a token in place of the logits: the largest logit's index, or one that is drawn.

    Args:
        graph: An entry point's graph, of one token; not changed.
        output: The output with the logits.
        ids: The input that takes the token ids, [B, 1].
        draws: Whether it is drawn, as one more input says.

    Returns:
        The graph, or None where the logits are not [B, 1, V] of known sizes.
    """
    logits, tokens = spec_of_type(graph.types.get(output)), spec_of_type(graph.types.get(ids))
    if logits is None or tokens is None or logits.dtype not in FLOATS or not logits.shape or None in logits.shape:
        return None
    if logits.shape[:-1] != tokens.shape or tokens.dtype not in ("i64", "i32"):
        return None
    model, types = graph.copied(), dict(graph.types)
    values, index = f"{output}.values", f"{output}.index"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [values if name == output else name for name in names]
    chosen = output if tokens.dtype == "i64" else index
    name, inputs = (DRAW_TOKEN, [values, DRAW_INPUT]) if draws else (NEXT_TOKEN, [values])
    nodes = [onnx.helper.make_node(name, inputs, [chosen], f"{output}.next_token", domain=INTERNAL)]
    if draws:
        types[DRAW_INPUT] = type_of_spec(TensorSpec((logits.shape[0], SETTINGS), "f32"))
        model.graph.input.append(onnx.ValueInfoProto(name=DRAW_INPUT, type=types[DRAW_INPUT]))
    if chosen == index:
        kind = graph.types[ids].tensor_type.elem_type
        nodes.append(onnx.helper.make_node("Cast", [index], [output], f"{output}.next_token.cast", to=kind))
        types[index] = type_of_spec(TensorSpec(tokens.shape, "i64"))
    model.graph.node.extend(nodes)
    types[values], types[output] = graph.types[output], graph.types[ids]
    return SpecializedGraph(model, types)
