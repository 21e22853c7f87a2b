"""Models that spell Mamba-1's recurrence out, as exporters do, and the operator as a Scan for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.spelled_out import Graph, model_of

CHANNELS, STATES, RANK = 12, 8, 3
HALF, SINGLE = TensorProto.FLOAT16, TensorProto.FLOAT


@dataclass
class Parts:
    """Values of a graph: x, step [B, T, D], key, query [B, T, N], rate [D, N], skip [D]; all f32."""

    x: str
    step: str
    key: str
    query: str
    rate: str
    skip: str


def parts(g: Graph, x: str, *, half: bool = False, norms: bool = False) -> Parts:
    """The projections before the recurrence; ``norms`` as Jamba has them."""
    rng = np.random.default_rng(1)
    dtype = np.float16 if half else np.float32

    def weight(name: str, *shape: int) -> str:
        return g.weight(name, (0.5 * rng.standard_normal(shape)).astype(dtype))

    projected = g.op("MatMul", x, weight("x_proj", CHANNELS, RANK + 2 * STATES))
    split = [f"{name}_raw" for name in ("dt", "b", "c")]
    g.op("Split", projected, g.ints(RANK, STATES, STATES), outputs=split, axis=-1)
    if norms:
        split = [_norm(g, name, size, half=half) for name, size in zip(split, (RANK, STATES, STATES), strict=True)]
    dt = g.op("Add", g.op("MatMul", split[0], weight("dt_proj", RANK, CHANNELS)), weight("dt_bias", CHANNELS))

    def single(value: str) -> str:
        return g.op("Cast", value, to=SINGLE) if half else value

    rate = g.op("Neg", g.op("Exp", single(weight("A_log", CHANNELS, STATES))))
    step = g.op("Softplus", single(dt))
    return Parts(single(x), step, single(split[1]), single(split[2]), rate, single(weight("D", CHANNELS)))


def _norm(g: Graph, x: str, size: int, *, half: bool) -> str:
    """As mobius writes it for Jamba."""
    wide = g.op("Cast", x, to=SINGLE) if half else x
    mean = g.op("ReduceMean", g.op("Mul", wide, wide), g.ints(-1), keepdims=1)
    normed = g.op("Div", wide, g.op("Sqrt", g.op("Add", mean, g.number(1e-5))))
    weight = g.weight(f"{x}_weight", np.linspace(0.5, 1.5, size, dtype=np.float32))
    return g.op("CastLike", g.op("Mul", normed, weight), x)


Change = Callable[[Graph, str], str]


def step_model(
    *, half: bool = False, norms: bool = False, matmul: bool = False, after: Change | None = None,
    decayed: Change | None = None, written: Change | None = None,
) -> onnx.ModelProto:  # fmt: skip
    """One token a call, as mobius 0.1 writes Mamba and Jamba; ``matmul`` reads the state as transformers does."""
    g, t, kind = Graph(), "T", HALF if half else SINGLE
    p = parts(g, "x", half=half, norms=norms)
    step = g.op("Unsqueeze", p.step, g.ints(-1))
    decay = g.op("Exp", g.op("Mul", step, g.op("Unsqueeze", p.rate, g.ints(0, 1))))
    update = g.op("Mul", step, g.op("Unsqueeze", p.key, g.ints(2)))
    update = g.op("Mul", update, g.op("Unsqueeze", p.x, g.ints(-1)))
    decay, update = (g.op("Squeeze", value, g.ints(1)) for value in (decay, update))
    decay = decay if decayed is None else decayed(g, decay)
    update = update if written is None else written(g, update)
    past = g.op("Cast", "past", to=SINGLE) if half else "past"
    wide = "next" if half else "present"
    g.op("Add", g.op("Mul", decay, past), update, outputs=[wide])
    query = g.op("Squeeze", p.query, g.ints(1))
    if matmul:
        y = g.op("Squeeze", g.op("MatMul", wide, g.op("Unsqueeze", query, g.ints(2))), g.ints(-1))
    else:
        y = g.op("ReduceSum", g.op("Mul", wide, g.op("Unsqueeze", query, g.ints(1))), g.ints(-1), keepdims=0)
    y = g.op("Add", y, g.op("Mul", p.skip, g.op("Squeeze", p.x, g.ints(1))))
    y = g.op("Unsqueeze", y, g.ints(1))
    if half:
        y = g.op("CastLike", y, "x")
        g.op("CastLike", wide, "past", outputs=["present"])
    g.op("Identity" if after is None else "Neg", y if after is None else after(g, y), outputs=["y"])
    state: list[int | str] = ["B", CHANNELS, STATES]
    sizes = {"x": ["B", t, CHANNELS], "past": state}
    return model_of(g, sizes, {"y": ["B", t, CHANNELS], "present": state}, kind)


def value_model(*, scale: float = 1.0, half: bool = False, per_channel: bool = False) -> onnx.ModelProto:
    """LinearAttention with a value a head, as mobius has written it since."""
    g, kind = Graph(), HALF if half else SINGLE
    p = parts(g, "x", half=half)
    rate = g.op("Unsqueeze", p.rate, g.ints(0, 1))
    decay = g.op("Mul", g.op("Unsqueeze", p.step, g.ints(-1)), rate)

    def repeated(value: str) -> str:
        value = g.op("Tile", g.op("Unsqueeze", value, g.ints(2)), g.ints(1, 1, CHANNELS, 1))
        if per_channel:
            value = g.op("Mul", value, rate)
        return g.op("Reshape", value, g.ints(0, 0, CHANNELS * STATES))

    past = g.op("Cast", "past", to=SINGLE) if half else "past"
    g.op(
        "LinearAttention", repeated(p.query), repeated(p.key), g.op("Mul", p.step, p.x),
        g.op("Unsqueeze", past, g.ints(-1)), g.op("Reshape", decay, g.ints(0, 0, CHANNELS * STATES)),
        outputs=["out", "state"], domain="com.microsoft", update_rule="gated", scale=scale, q_num_heads=CHANNELS,
        kv_num_heads=CHANNELS,
    )  # fmt: skip
    y = g.op("Add", "out", g.op("Mul", p.x, p.skip))
    g.op("CastLike", y, "x", outputs=["y"])
    g.op("CastLike", g.op("Squeeze", "state", g.ints(-1)), "past", outputs=["present"])
    state: list[int | str] = ["B", CHANNELS, STATES]
    model = model_of(g, {"x": ["B", "T", CHANNELS], "past": state}, {"y": ["B", "T", CHANNELS], "present": state}, kind)
    model.opset_import.add(domain="com.microsoft", version=1)
    return model


def scan_model(
    *, rate: str = "carried", zero: bool = False, before: bool = False, turned: bool = False, axis: int = 0
) -> onnx.ModelProto:
    """A Scan over tokens.

    Args:
        rate: ``carried`` from token to token as mobius does, or ``captured`` from around the body.
        zero: Whether it begins with zeros.
        before: Whether decays and updates are computed before the loop, as transformers does.
        turned: Whether states are [B, N, D].
        axis: Of the tokens in the inputs and outputs of the loop.
    """
    g, body = Graph(), Graph("body_")
    p = parts(g, "x")
    places = (1, 2) if turned else (2, 1)  # where channels lack elements, where elements lack channels

    def first(value: str, rank: int) -> str:
        return value if axis else g.op("Transpose", value, perm=[1, 0, *range(2, rank)])

    def matrix(h: Graph, value: str, place: int, more: int) -> str:
        return h.op("Unsqueeze", value, h.ints(place + more))

    turn = g.op("Transpose", p.rate, perm=[1, 0]) if turned else p.rate

    def decay_of(h: Graph, step: str, rate_: str, more: int) -> str:
        return h.op(
            "Exp", h.op("Mul", matrix(h, step, places[0], more), h.op("Unsqueeze", rate_, h.ints(*range(more + 1))))
        )

    def update_of(h: Graph, step: str, x: str, key: str, more: int) -> str:
        value = h.op("Mul", step, x)
        return h.op("Mul", matrix(h, value, places[0], more), matrix(h, key, places[1], more))

    carried: list[tuple[str, str]] = [("state", "past")]
    if before:
        decays, updates = decay_of(g, p.step, turn, 1), update_of(g, p.step, p.x, p.key, 1)
        scanned = {"decay_t": first(decays, 4), "update_t": first(updates, 4), "query_t": first(p.query, 3)}
        decay, update = "decay_t", "update_t"
    else:
        scanned = {f"{name}_t": first(getattr(p, name), 3) for name in ("step", "x", "key", "query")}
        carried += [("rate_in", turn)] if rate == "carried" else []
        decay = decay_of(body, "step_t", "rate_in" if rate == "carried" else turn, 0)
        update = update_of(body, "step_t", "x_t", "key_t", 0)
    state = body.op("Add", body.op("Mul", "state", decay), update)
    read = body.op("Mul", state, matrix(body, "query_t", places[1], 0))
    y = body.op("ReduceSum", read, body.ints(1 if turned else 2), keepdims=0)
    results = [body.op("Identity", state), *(body.op("Identity", name) for name, _ in carried[1:]), y]
    names = [*(name for name, _ in carried), *scanned]
    infos = [helper.make_tensor_value_info(n, SINGLE, None) for n in (*names, *results)]
    inner = helper.make_graph(body.nodes, "step", infos[: len(names)], infos[len(names) :])
    if zero:
        sizes = g.op("Concat", g.op("Shape", "x", start=0, end=1), g.ints(CHANNELS, STATES), axis=0)
        carried[0] = ("state", g.op("ConstantOfShape", sizes))
    more: dict[str, Any] = {"scan_input_axes": [1] * len(scanned), "scan_output_axes": [1]} if axis else {}
    outputs = ["present", *(f"{name}_out" for name, _ in carried[1:]), "read"]
    g.op("Scan", *(value for _, value in carried), *scanned.values(), outputs=outputs, body=inner,
         num_scan_inputs=len(scanned), **more)  # fmt: skip
    read = "read" if axis else g.op("Transpose", "read", perm=[1, 0, 2])
    g.op("Add", read, g.op("Mul", p.skip, p.x), outputs=["y"])
    shape: list[int | str] = ["B", STATES, CHANNELS] if turned else ["B", CHANNELS, STATES]
    inputs = {"x": ["B", "T", CHANNELS]} | ({} if zero else {"past": shape})
    return model_of(g, inputs, {"y": ["B", "T", CHANNELS], "present": shape})


def by_scan(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with each SelectiveScan as a Scan, which ONNX Runtime can run."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.op_type != "SelectiveScan":
            nodes.append(node)
            continue
        body, g = Graph("step_"), Graph(f"{node.name}_")
        decay = body.op("Exp", body.op("Mul", body.op("Unsqueeze", "s", body.ints(-1)), node.input[2]))
        update = body.op("Mul", body.op("Unsqueeze", "v", body.ints(-1)), body.op("Unsqueeze", "k", body.ints(1)))
        state = body.op("Add", body.op("Mul", decay, "h"), update)
        y = body.op(
            "ReduceSum", body.op("Mul", state, body.op("Unsqueeze", "q", body.ints(1))), body.ints(2), keepdims=0
        )
        results = [body.op("Identity", state), y]
        infos = [helper.make_tensor_value_info(n, SINGLE, None) for n in ("h", "v", "s", "k", "q", *results)]
        inner = helper.make_graph(body.nodes, "step", infos[:5], infos[5:])
        past = node.input[5] if len(node.input) > 5 else ""
        if not past:
            size = g.op("Shape", node.input[0], start=0, end=1)
            past = g.op("ConstantOfShape", g.op("Concat", size, g.op("Shape", node.input[2]), axis=0))
        operands = [node.input[i] for i in (0, 1, 3, 4)]
        g.op("Scan", past, *operands, outputs=[node.output[1] or f"{node.name}_last", node.output[0]], body=inner,
             num_scan_inputs=4, scan_input_axes=[1] * 4, scan_output_axes=[1])  # fmt: skip
        nodes += g.nodes
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result
