"""Models that real exporters wrote give the logits and tokens of ONNX Runtime and of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program, Session

from tests.conftest import MODELS
from tests.tolerances import INT4_OWN_NOISE, MODEL_LOGITS, relative_norm

F32_MODELS = ("genai-fp32-cpu", "mobius-f32-default", "mobius-f32-cpu")
# What is compiled more than once: mobius-f32-cpu has the operators of the other two, and types are tried in one form.
TWO_MODELS = F32_MODELS[:2]
ON_CUDA = ("genai-fp16-cuda", "genai-int4-cpu", "mobius-f32-default")
LENGTHS = (1, 5, 64, 65, 200)
CONTEXT = 256  # the longest prompt and 32 tokens fit


@dataclass(frozen=True)
class Form:
    """How a model's sizes are bound."""

    prefill_blocks: tuple[int, ...] | None = (64, 8)
    max_context: int | None = CONTEXT
    batch: int | None = 1


STATIC, ONE_BLOCK, OPEN = Form(), Form((64,)), Form(None, None, None)  # a block more is half a module more


@cache
def program(name: str, target: str, form: Form = STATIC) -> Program:
    options = CompileOptions(
        target=target, batch=form.batch, max_context=form.max_context, prefill_blocks=form.prefill_blocks
    )
    return Program.load(compile_model(MODELS / name / "model.onnx", options).module)


def expected(name: str | None) -> np.lib.npyio.NpzFile:
    return np.load(MODELS / (f"{name}/ort_expected.npz" if name else "transformers_expected.npz"))


def prefill(run: Program, length: int) -> np.ndarray:
    return run.session().run({"input_ids": expected(None)[f"ids_{length}"]})["logits"]


def onnx_runtime_logits(model: onnx.ModelProto, ids: np.ndarray) -> np.ndarray:
    """The logits of a prompt from empty states."""
    batch, tokens = ids.shape
    sizes = {"batch_size": batch, "past_sequence_length": 0, "kv_cache_dim": 64}
    feeds: dict[str, np.ndarray] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["position_ids"] = np.tile(np.arange(tokens), (3, batch, 1))
    for value in model.graph.input:
        dims = [sizes.get(d.dim_param, d.dim_value) for d in value.type.tensor_type.shape.dim]
        feeds.setdefault(value.name, np.zeros(dims, np.float32))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["logits"], feeds)[0]


def greedy(session: Session, logits: np.ndarray, count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        token = logits[:, -1].argmax(-1)
        tokens.append(int(token[0]))
        logits = session.run({"input_ids": token[:, None].astype(np.int64)})["logits"]
    return tokens


def check(name: str, run: Program, length: int, tokens: int) -> None:
    """Prefill logits near both references, and the same greedy tokens."""
    session = run.session()
    logits = session.run({"input_ids": expected(None)[f"ids_{length}"]})["logits"]
    for reference in (expected(None), expected(name)):
        assert relative_norm(logits, reference[f"logits_{length}"]) < MODEL_LOGITS["f32"]
    generated = greedy(session, logits, tokens)
    for reference in (expected(None), expected(name)):
        assert generated == reference[f"greedy_{length}"].ravel()[:tokens].tolist()
    assert session.position == length + tokens


def check_int4(folder: Path, options: CompileOptions, lengths: Sequence[int]) -> None:
    """Where nothing is rounded, int4 weights are as exact as any others: against ONNX Runtime run here."""
    model = onnx.load(MODELS / "genai-int4-cpu" / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(model, folder / "model.onnx")
    run = Program.load(compile_model(folder / "model.onnx", options).module)
    for length in lengths:
        ids = expected(None)[f"ids_{length}"]
        assert relative_norm(prefill(run, length), onnx_runtime_logits(model, ids)) < MODEL_LOGITS["f32"]


@pytest.mark.usefixtures("shared_models")
class TestCpu:
    @pytest.mark.parametrize(
        ("name", "form"),
        [
            (F32_MODELS[0], STATIC),
            *((name, ONE_BLOCK) for name in F32_MODELS[1:]),
            *((name, OPEN) for name in TWO_MODELS),
        ],
        ids=lambda value: {STATIC: "static", ONE_BLOCK: "one-block", OPEN: "open"}.get(value, value),
    )
    def test_f32(self, name: str, form: Form) -> None:
        for length in LENGTHS:
            check(name, program(name, "cpu", form), length, 32)

    def test_f16(self) -> None:
        name = "genai-fp16-cuda"
        for length in LENGTHS:
            logits = prefill(program(name, "cpu", ONE_BLOCK), length)
            assert relative_norm(logits, expected(name)[f"logits_{length}"]) < MODEL_LOGITS["f16"]

    @pytest.mark.parametrize("form", [ONE_BLOCK, OPEN], ids=["one-block", "open"])
    def test_int4(self, form: Form) -> None:
        name = "genai-int4-cpu"
        for length in LENGTHS:
            logits = prefill(program(name, "cpu", form), length)
            limit = MODEL_LOGITS["int4"] if length < 64 else INT4_OWN_NOISE
            assert relative_norm(logits, expected(name)[f"logits_{length}"]) < limit

    def test_int4_without_rounded_activations(self, tmp_path: Path) -> None:
        check_int4(tmp_path, CompileOptions(max_context=CONTEXT, prefill_blocks=(64,)), LENGTHS)

    @pytest.mark.parametrize(
        ("form", "names"), [(Form((8,), CONTEXT, 3), F32_MODELS[:1]), (OPEN, TWO_MODELS)], ids=["static", "open"]
    )
    def test_batch_of_three(self, form: Form, names: Sequence[str]) -> None:
        for name in names:
            run = program(name, "cpu", form)
            session = run.session(batch=3) if form.batch is None else run.session()
            logits = session.run({"input_ids": expected(None)["ids_b3"]})["logits"]
            assert relative_norm(logits, expected(None)["logits_b3"]) < MODEL_LOGITS["f32"]


@pytest.mark.usefixtures("shared_models")
@pytest.mark.vulkan
@pytest.mark.slow
class TestVulkan:
    @pytest.mark.parametrize("name", TWO_MODELS)
    def test_f32(self, name: str) -> None:
        run = program(name, "vulkan", ONE_BLOCK)
        for length in (5, 65):
            check(name, run, length, 8)

    def test_int4(self, tmp_path: Path) -> None:
        check_int4(tmp_path, CompileOptions(target="vulkan", max_context=CONTEXT, prefill_blocks=(64,)), (65,))


@pytest.mark.usefixtures("shared_models")
@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CUDA)
def test_compiles_for_cuda(name: str) -> None:
    options = CompileOptions(target="cuda", prefill_blocks=(64,), max_context=CONTEXT)
    compiled = compile_model(MODELS / name / "model.onnx", options)
    assert len(compiled.module) > 100_000
    assert [e.symbol for e in compiled.manifest.entry_points] == ["decode", "prefill_64"]
