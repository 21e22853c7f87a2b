"""Damaged models of one operator: ONNX's own test models and the small shared cases, compiled to code."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import onnx
from damage import damage_bytes, damage_graph
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.graph.schema import is_supported
from onnx.backend.test.loader import load_model_tests

SHARED = Path(__file__).resolve().parents[3] / "shared"


@functools.cache
def prepare() -> list[onnx.ModelProto]:
    found: list[onnx.ModelProto] = []
    for test in load_model_tests(kind="node"):
        proto = test.model or onnx.load(Path(test.model_dir) / "model.onnx")
        versions = {o.domain: o.version for o in proto.opset_import}
        nodes = proto.graph.node
        if all(is_supported(node.domain, node.op_type, versions.get(node.domain, 1)) for node in nodes):
            state = any(node.op_type in ("LinearAttention", "CausalConvWithState", "Attention") for node in nodes)
            found += [proto] * (4 if state else 1)
    found += [onnx.load(path) for path in sorted(SHARED.glob("cases/*_min.onnx"))]
    return found


def case(rng: random.Random, folder: Path) -> str:
    """Damage one model and compile it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(rng.choice(prepare()))
    path = folder / "model.onnx"
    if rng.random() < 0.1:
        path.write_bytes(damage_bytes(rng, proto.SerializeToString()))
    else:
        damage_graph(rng, proto)
        path.write_bytes(proto.SerializeToString())
    compile_model(path, CompileOptions(cpu_features="generic", batch=None, max_context=None, prefill_blocks=None))
    return "compiled"
