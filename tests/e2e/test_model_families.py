"""Tiny exports of other model families: ONNX Runtime's logits and tokens, in a session that carries every state."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.compile import CompiledModel
from linattn.runtime import Program
from onnx import helper

from tests.families.compare import LENGTHS, Family, compare

RAISED = "nemotron_h--mobius-onnx-standard-f32"
"""Its recurrences are Scans, its convolutions Conv between Concat and Slice."""
SELECTIVE = "mamba_m--mobius-default-f32"
"""Mamba-1, for one token a call; with its steps as operators it takes prompts."""
EXPERTS = "lfm2_moe--genai-cpu-int4"
"""Experts of int4 behind a router of sigmoid, TopK and ScatterElements, a table of int4."""
FAMILIES = ("nemotron_h--mobius-qnn-f32", SELECTIVE, RAISED, EXPERTS)


@cache
def compiled(family: str, target: str = "cpu") -> CompiledModel:
    return compile_model(Family(family).model, CompileOptions(target=target, prefill_blocks=(8,)))


@pytest.mark.usefixtures("shared_models")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_greedy_tokens(family: str, length: int) -> None:
    found = compare(Program.load(compiled(family).module), Family(family), length)
    assert found.is_right(Family(family)), found


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
@pytest.mark.vulkan
def test_an_open_context_begins_with_caches_of_no_rows() -> None:
    """IREE's GPU drivers take no empty memory: neither in a session nor where the caller hands in no rows."""
    family = Family("nemotron_h--mobius-qnn-f32")
    with Program.load(compiled(family.name, "vulkan").module) as program:
        assert program.manifest.max_context is None
        found = compare(program, family, 5)
        assert found.is_right(family), found
        prompt = {"input_ids": family.expected["ids_5"][:, :1]}
        alone = program.run({**prompt, **program.session().states.numpy()})["logits"]
        assert np.array_equal(alone, program.session().run(prompt)["logits"])


@pytest.mark.usefixtures("shared_models")
def test_the_report_says_what_the_graph_does_not_show() -> None:
    model = onnx.load(Family(SELECTIVE).model)
    for decay in [n for n in model.graph.node if n.op_type == "Exp" and "Mul" in n.input[0]]:  # not Mamba-1's any more
        place, name = list(model.graph.node).index(decay), decay.output[0]
        decay.output[0] = f"{name}.signed"
        model.graph.node.insert(place + 1, helper.make_node("Abs", [decay.output[0]], [name]))
    done = compile_model(model, CompileOptions(prefill_blocks=(8,)))
    notes = "\n".join(done.report.notes)
    assert "paired by name alone" in notes
    assert "past_states.1.ssm_state = present.1.ssm_state" in notes
    assert "takes one token a call" in notes
    assert [entry.symbol for entry in done.manifest.entry_points] == ["decode"]
    found = compare(Program.load(done.module), Family(SELECTIVE), 5)
    assert found.is_right(Family(SELECTIVE)), found
    assert "open context" in "\n".join(compiled("nemotron_h--mobius-qnn-f32").report.notes)


@pytest.mark.usefixtures("shared_models")
def test_a_selective_scan_takes_prompts() -> None:
    done = compiled(SELECTIVE)
    assert sum("-> SelectiveScan" in note for note in done.report.notes) == 2
    assert [entry.symbol for entry in done.manifest.entry_points] == ["decode", "prefill_8"]
    assert {row.strategy for row in done.report.nodes} == {"fused_simd"}


@pytest.mark.usefixtures("shared_models")
def test_operators_in_other_words_get_the_kernels_of_the_operators() -> None:
    report = compiled(RAISED).report
    assert sum("-> LinearAttention (gated)" in note for note in report.notes) == 2
    assert sum("-> CausalConvWithState (silu)" in note for note in report.notes) == 2
    direct = compiled("nemotron_h--mobius-default-f32").report
    strategies = [sorted((n.op, n.rule, n.dtypes, n.strategy) for n in r.nodes) for r in (report, direct)]
    assert strategies[0] == strategies[1]
    assert report.others == direct.others
