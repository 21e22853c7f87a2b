"""Tiny exports of other model families: ONNX Runtime's logits and tokens, in a session that carries every state."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.compile import CompiledModel
from linattn.runtime import Program

from tests.conftest import MODELS
from tests.tolerances import MODEL_LOGITS, relative_norm

TOKENS = 16
# Family -> what stands between its states: a Concat of caches; nothing at all, the states are found by name.
FAMILIES = ("nemotron_h--mobius-qnn-f32", "mamba_m--mobius-default-f32")


@cache
def compiled(family: str) -> CompiledModel:
    return compile_model(MODELS / "families" / family / "model.onnx", CompileOptions(prefill_blocks=(8,)))


def expected(family: str) -> np.lib.npyio.NpzFile:
    folder = MODELS / "families" / family
    own = folder / "ort_expected.npz"
    return np.load(own if own.exists() else folder / "sibling_expected.npz")


@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize("length", [1, 5, 65])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_greedy_tokens(family: str, length: int) -> None:
    program, want = Program.load(compiled(family).module), expected(family)
    session = program.session()
    logits = session.run({"input_ids": want[f"ids_{length}"]})["logits"]
    assert relative_norm(logits, want[f"logits_{length}"]) < MODEL_LOGITS["f32"]
    tokens = []
    for _ in range(TOKENS):
        tokens.append(int(logits[0, -1].argmax()))
        logits = session.run({"input_ids": np.array([[tokens[-1]]])})["logits"]
    assert tokens == want[f"greedy_{length}"].ravel()[:TOKENS].tolist()


@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_session_is_the_stateless_form_step_by_step(family: str) -> None:
    program = Program.load(compiled(family).module)
    session, states = program.session(), {}
    for token in (3, 1, 4, 1, 5):
        ids = {"input_ids": np.array([[token]])}
        outputs = program.run({**ids, **states})
        assert np.array_equal(session.run(ids)["logits"], outputs["logits"])
        states = {state.name: outputs[state.output] for state in program.states}
    assert states  # no state was left to the caller


@pytest.mark.usefixtures("shared_models")
def test_the_report_says_what_the_graph_does_not_show() -> None:
    notes = "\n".join(compiled("mamba_m--mobius-default-f32").report.notes)
    assert "paired by name alone" in notes
    assert "past_states.1.ssm_state = present.1.ssm_state" in notes
    assert "takes one token a call" in notes
    assert [entry.symbol for entry in compiled("mamba_m--mobius-default-f32").manifest.entry_points] == ["decode"]
    assert "open context" in "\n".join(compiled("nemotron_h--mobius-qnn-f32").report.notes)
