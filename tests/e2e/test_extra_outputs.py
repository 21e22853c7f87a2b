"""`--extra-output`: a hidden state is an output like any other, and what the graph does not have is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.cli import main
from linattn.frontend.compile import compile_model
from linattn.runtime import Program, Session

from tests.tolerances import MODEL_LOGITS, error

HIDDEN = "/model/layers.4/final_norm_layernorm/output_0"
INNER = "/model/layers.3/mlp/down_proj/MatMul/output_0"


def test_hidden_states(shared_models: Path, tmp_path: Path) -> None:
    """Of a prompt in blocks and of steps, beside ONNX Runtime's of the same graph; the model is the same for states."""
    source, ids = shared_models / "genai-fp32-cpu" / "model.onnx", np.random.default_rng(0).integers(0, 1000, (1, 20))
    options = CompileOptions(target="cpu", max_context=64, prefill_blocks=(8,), extra_outputs=(HIDDEN, INNER))
    program = Program.load(compile_model(source, options).module)
    assert [spec.name for spec in program.outputs] == ["logits", HIDDEN, INNER]
    session = program.session()
    parts = [session.run({"input_ids": ids[:, :18]}, logits="last")]
    parts += [session.run({"input_ids": ids[:, at : at + 1]}, outputs=[HIDDEN, INNER]) for at in (18, 19)]
    proto = onnx.load(source)
    types = {value.name: value for value in proto.graph.value_info}
    proto.graph.output.extend([types[HIDDEN], types[INNER]])
    onnx.save(proto, tmp_path / "model.onnx")
    ort = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    feeds = {"input_ids": ids, "attention_mask": np.ones((1, 20), np.int64)}
    for spec in ort.get_inputs():
        shape = [
            size if isinstance(size, int) else {"batch_size": 1, "kv_cache_dim": 64}.get(size, 0) for size in spec.shape
        ]
        feeds.setdefault(spec.name, np.zeros(shape, np.float32))
    feeds["position_ids"] = np.broadcast_to(np.arange(20), (3, 1, 20)).copy()
    for name, want in zip((HIDDEN, INNER), ort.run([HIDDEN, INNER], feeds), strict=True):
        assert error(np.concatenate([part[name] for part in parts], 1), want) < MODEL_LOGITS["f32"]
    plain = compile_model(source, CompileOptions(target="cpu", max_context=64, prefill_blocks=()))
    session.save(tmp_path / "state")
    assert Session.load(Program.load(plain.module), tmp_path / "state").position == 20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/model/layers.4/final_norm/output_0", f"the graph computes no such value, expected {HIDDEN}"),
        ("logits", "--extra-output logits: is an output already"),
        ("input_ids", "--extra-output input_ids: the graph computes no such value"),
    ],
)
def test_what_the_graph_does_not_have(
    name: str, message: str, shared_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(shared_models / "genai-fp32-cpu" / "model.onnx")
    assert main([source, "--extra-output", name, "-o", str(tmp_path / "m.vmfb"), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
