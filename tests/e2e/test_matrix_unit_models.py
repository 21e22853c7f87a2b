"""Whole models on the CPU's matrix unit, emulated where this CPU has none, keep ONNX Runtime's greedy tokens."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.runtime import Program
from test_exported_models import CONTEXT, expected, onnx_runtime_logits

from tests.conftest import MODELS
from tests.emulated_cpu import AMX, emulate
from tests.harness import HOST
from tests.tolerances import INT4_OWN_NOISE, MODEL_LOGITS, relative_norm

TOKENS = 16


def not_rounded(name: str) -> onnx.ModelProto:
    """The model with activations as they are: with its ``accuracy_level`` ONNX Runtime rounds them to int8."""
    model = onnx.load(MODELS / name / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize(
    ("name", "limit"), [("genai-fp16-cuda", MODEL_LOGITS["bf16"]), ("genai-int4-cpu", INT4_OWN_NOISE)]
)
def test_fast_models_keep_their_tokens(name: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of a prompt near those of what the model says, and a token of its greedy ones wherever two are no tie.

    In int4 activations are rounded to bf16, which is nearer to what is not rounded than ONNX Runtime's int8 (5.6e-2).
    """
    if not HOST.features >= AMX:
        emulate(monkeypatch, AMX)
    options = CompileOptions(max_context=CONTEXT, prefill_blocks=(64,), math="fast")
    compiled = compile_model(MODELS / name / "model.onnx", options)
    assert (b"_by_bf16_" if "fp16" in name else b"mat_mul_n_bits_fused_amx_bf16_") in compiled.module
    assert b"attention_fused_amx_" in compiled.module
    ids = expected(None)["ids_64"]
    session = Program.load(compiled.module).session()
    found = session.run({"input_ids": ids})["logits"]
    if "int4" in name:
        wanted = onnx_runtime_logits(not_rounded(name), ids)
        assert relative_norm(found, wanted) < limit < relative_norm(expected(name)["logits_64"], wanted)
    else:
        assert relative_norm(found, expected(name)["logits_64"]) < limit
    for token in expected(name)["greedy_64"].ravel()[:TOKENS]:
        last = found[0, -1].astype(np.float64)
        assert last.max() - last[token] <= 2 * limit * last.std(), f"{last.argmax()} instead of {token}"
        found = session.run({"input_ids": np.array([[token]])})["logits"]
