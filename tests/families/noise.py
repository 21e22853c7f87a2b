"""How far ONNX Runtime's own logits move when nothing but roundings changes.

int4: with `accuracy_level` 4 it rounds activations to int8, so that a change of 1e-7 moves a logit by a percent as soon
as one rounding flips. The noise of an export: ONNX Runtime on this machine against the shipped results (which are
another machine's), with every f32 weight (norms, scales) moved by up to 1e-7 of itself, in eight ways; the largest
distance.

bf16: in f32, but with every weight and every result of a node rounded to bf16, which is what a graph in bf16 says.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from linattn.frontend.graph.schema import infer_types
from linattn.runtime import Program
from onnx import TensorProto, helper, numpy_helper

from tests.families.compare import LENGTHS, TOKENS, Family
from tests.tolerances import relative_norm

SEEDS = 8
MOVED_BY = 1e-7
INT4_FACTOR = 1.5
"""How much of that noise is ours."""


def own_noise(family: Family, program: Program) -> float:
    """The largest distance, as `compare` measures it, of an int4 export; the compiled one tells inputs and states."""
    return max(_distance(family, _session(family, seed), program) for seed in range(SEEDS))


def rounded_distance(family: Family, program: Program) -> float:
    """The distance of an f32 export with everything rounded to bf16; ``program`` is it in bf16."""
    model = onnx.load(family.model)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            narrow = numpy_helper.to_array(tensor).astype(ml_dtypes.bfloat16)
            tensor.CopyFrom(numpy_helper.from_array(narrow.astype(np.float32), tensor.name))
    types, nodes = infer_types(model), list[onnx.NodeProto]()
    for node in model.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in types and types[name].tensor_type.elem_type == TensorProto.FLOAT:
                node.output[i] = f"{name}.wide"
                nodes.append(helper.make_node("Cast", [f"{name}.wide"], [f"{name}.bf16"], to=TensorProto.BFLOAT16))
                nodes.append(helper.make_node("Cast", [f"{name}.bf16"], [name], to=TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return _distance(family, _runtime(model), program)


def _session(family: Family, seed: int) -> onnxruntime.InferenceSession:
    model = onnx.load(family.model)
    random = np.random.default_rng(seed)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            moved = array * (1 + MOVED_BY * random.uniform(-1, 1, array.shape))
            tensor.CopyFrom(numpy_helper.from_array(moved.astype(np.float32), tensor.name))
    return _runtime(model)


def _runtime(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _distance(family: Family, runtime: onnxruntime.InferenceSession, program: Program) -> float:
    want, errors = family.expected, []
    presents = [state.output for state in program.states]
    kinds = {i.name: np.float16 if i.type == "tensor(float16)" else np.float32 for i in runtime.get_inputs()}
    for length in LENGTHS:
        states, past = program.session().states.numpy(), 0
        states = {name: state.astype(kinds[name]) for name, state in states.items()}
        prompt, tokens = want[f"ids_{length}"], want[f"greedy_{length}"].ravel()[:TOKENS]
        for i, ids in enumerate([prompt, *tokens.reshape(-1, 1, 1)]):
            feeds = _feeds(family, program, ids, past) | states
            logits, *following = runtime.run(["logits", *presents], feeds)
            states = dict(zip(states, following, strict=True))
            past += ids.shape[1]
            reference = want[f"logits_{length}"] if i == 0 else want[f"steps_{length}"][i - 1][None, None]
            errors.append(relative_norm(logits, reference))
    return max(errors)


def _feeds(family: Family, program: Program, ids: np.ndarray, past: int) -> dict[str, np.ndarray]:
    total = past + ids.shape[1]
    feeds = dict(family.feed(ids))
    for spec in program.inputs:
        if spec.role == "attention_mask":
            feeds[spec.name] = np.ones((1, total), np.int64)
        elif spec.role == "position_ids":
            positions = np.arange(past, total)[None]
            feeds[spec.name] = np.tile(positions, (3, 1, 1)) if len(spec.shape) == 3 else positions
    return feeds
