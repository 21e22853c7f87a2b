"""ONNX's own node tests of Attention, on the CPU and on Vulkan.

There are some eighty. All pass that do not ask for ``qk_matmul_output``; those here are one a feature, and compiled
together, which takes a tenth of the time.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import harness
import iree.runtime as rt
import numpy as np
import onnx
import onnx.backend.test.case.node.attention
import pytest
from attention_runs import to_device, to_host
from iree.compiler.api import Session
from onnx.backend.test.case.node import _NodeTestCases
from onnx.backend.test.runner import Runner

CASES = {case.name: case for case in _NodeTestCases}
ATTENTIONS = (
    "4d_causal_nonpad_negative_offset_structural_empty",
    "4d_causal_padded_kv_bf16",
    "4d_diff_heads_mask4d_padded_kv",
    "4d_gqa_with_past_and_present_fp16",
    "4d_softcap_neginf_mask_poison",
    "bidirectional_window",
    "causal_boolmask_nan_robustness",
    "local_window_ext_cache_float16_mask",
    "local_window_rank1_boolean_mask",
    "local_window_with_past",
)


def _array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _attention(name: str) -> tuple[Any, onnx.NodeProto, list[np.ndarray | None]]:
    """The case, its node and the node's operands."""
    case = CASES[f"test_attention_{name}"]
    (node,) = case.model.graph.node
    given = dict(zip((v.name for v in case.model.graph.input), map(_array, case.data_sets[0][0]), strict=True))
    return case, node, [given.get(n) for n in node.input]


@cache
def _attention_functions(target: str) -> list[Any]:
    nodes = []
    for name in ATTENTIONS:
        case, node, inputs = _attention(name)
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        used = tuple(bool(n) for n in node.output) + (False,) * (3 - len(node.output))
        version = case.model.opset_import[0].version
        nodes.append(harness.node_for("", "Attention", version, [harness.spec(a) for a in inputs], attributes, 3, used))
    session = Session()
    session.set_flags(*harness.FLAGS[target], "--iree-input-type=none")
    module = harness.lowered_all(nodes, target, context=session.context)
    context = rt.SystemContext(config=harness.device_config(target))
    context.add_vm_module(rt.VmModule.copy_buffer(context.instance, harness.compile_module(module, session, target)))
    return [context.modules.module[f"main{i or ''}"] for i in range(len(nodes))]


@pytest.mark.parametrize("target", ["cpu", pytest.param("lavapipe", marks=pytest.mark.vulkan)])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str, target: str) -> None:
    case, _, inputs = _attention(name)
    function = _attention_functions(target)[ATTENTIONS.index(name)]
    got = function(*[to_device(a, target) for a in inputs if a is not None])
    expected = [_array(e) for e in case.data_sets[0][1]]
    got = got if isinstance(got, tuple | list) else [got]
    outputs = [to_host(one, target, e.dtype) for one, e in zip(got, expected, strict=True)]
    Runner.assert_similar_outputs(expected, outputs, case.rtol, case.atol)
