"""What spells Mamba-1's recurrence out becomes SelectiveScan, with ONNX Runtime's outputs; anything else stays."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import onnx
import pytest
from linattn.frontend.compile import CompileOptions, compile_model
from linattn.frontend.graph.raising.raise_operators import Raising, raise_operators
from linattn.frontend.graph.raising.tokens import mixes_tokens
from linattn.frontend.graph.states import find_states
from linattn.runtime import Program
from onnx import TensorProto, helper

from tests import selective_models
from tests.selective_models import CHANNELS, by_scan, scan_model, step_model, value_model
from tests.spelled_out import Graph, feeds_of, run
from tests.tolerances import BENIGN, error
from tests.unit.frontend.test_raised_recurrences import mutate

TOKENS = 5


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def raised(model: onnx.ModelProto) -> Raising:
    done = raise_operators(model)
    assert not done.misses, done.misses
    if done.tokens is not None:
        assert mixes_tokens(model, done.tokens) is None
    assert "SelectiveScan" in kinds(model), done.notes
    assert not {"Scan", "LinearAttention", "Tile"} & set(kinds(model))
    assert kinds(model).count("Exp") == 1  # of A_log
    return done


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    for name, value in want.items():
        assert error(got[name], value) <= BENIGN[value.dtype.name], name


def stepped(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A model for one token a call, token after token."""
    outputs, state = list[np.ndarray](), feeds["past"]
    for t in range(feeds["x"].shape[1]):
        one = run(model, {"x": feeds["x"][:, t : t + 1], "past": state})
        outputs, state = [*outputs, one["y"]], one["present"]
    return {"y": np.concatenate(outputs, axis=1), "present": state}


@pytest.mark.parametrize("form", [{}, {"norms": True}, {"matmul": True}, {"half": True, "norms": True}])
def test_a_step_takes_a_prompt_as_its_tokens_one_after_the_other(form: dict[str, Any]) -> None:
    model = step_model(**form)
    feeds = feeds_of(model, {"B": 2, "T": TOKENS})
    want = stepped(model, feeds)
    done = raised(model)
    assert done.notes == [f"raised: step '{next(n for n in done.notes[0].split(chr(39))[1:])}' -> SelectiveScan"]
    compare(run(by_scan(model), feeds), want)
    (pair,) = find_states(model.graph)
    assert (pair.past, pair.present, pair.shaped_by_node) == ("past", "present", True)


@pytest.mark.parametrize("form", [{}, {"half": True}, {"scale": 0.5}, {"scale": 0.0}])
def test_a_value_a_head(form: dict[str, Any]) -> None:
    model = value_model(**form)
    feeds = feeds_of(model, {"B": 2, "T": TOKENS})
    want = run(model, feeds)
    raised(model)
    compare(run(by_scan(model), feeds), want)
    (pair,) = find_states(model.graph)
    assert (pair.past, pair.present) == ("past", "present")


@pytest.mark.parametrize(
    "form",
    [
        {"zero": True}, {"rate": "captured"}, {"before": True}, {"turned": True}, {"before": True, "axis": 1},
        {"axis": 1, "turned": True, "rate": "captured"},
    ],
)  # fmt: skip
def test_a_loop(form: dict[str, Any]) -> None:
    model = scan_model(**form)
    feeds = feeds_of(model, {"B": 2, "T": TOKENS})
    want = run(model, feeds)
    raised(model)
    compare(run(by_scan(model), feeds), want)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"decayed": lambda g, v: g.op("Add", v, g.number(0.0))}, "exponential of a product"),
        ({"decayed": lambda g, v: g.op("Mul", v, v)}, "exponential of a product"),
        ({"decayed": lambda g, v: g.op("Sigmoid", v)}, "exponential of a product"),
        ({"written": lambda g, v: g.op("Relu", v)}, "no value of a channel times a key"),
    ],
)
def test_another_step_stays(change: dict[str, Any], why: str) -> None:
    model = step_model(**change)
    before = copy.deepcopy(model)
    done = raise_operators(model)
    assert model == before
    assert why in done.notes[0], done.notes
    assert "may mix tokens" in str(mixes_tokens(model, str(done.tokens)))


@pytest.mark.parametrize(
    "mix",
    [
        lambda g, y: g.op("Softmax", y, axis=1),
        lambda g, y: g.op("Transpose", g.op("Relu", g.op("Reshape", y, g.ints(0, CHANNELS, -1))), perm=[0, 2, 1]),
        lambda g, y: g.op("MatMul", g.op("MatMul", y, g.op("Transpose", y, perm=[0, 2, 1])), y),
        lambda g, y: g.op("Add", y, g.op("ReduceMean", y, g.ints(1))),
        lambda g, y: g.op("CumSum", y, g.ints(1)),
        lambda g, y: g.op("Attention", y, y, y, is_causal=1, q_num_heads=1, kv_num_heads=1),  # without a past
    ],
)
def test_what_mixes_tokens_takes_one_a_call(mix: Any) -> None:
    """For one token the graph is what it was; for a prompt it would be something else than token after token."""
    model = step_model(after=mix)
    feeds = feeds_of(model, {"B": 2, "T": 1})
    want = run(model, feeds)
    done = raise_operators(model)
    assert "may mix tokens" in str(mixes_tokens(model, str(done.tokens)))
    compare(run(by_scan(model), feeds), want)


def grown(g: Graph, y: str, *, causal: int) -> str:
    """Attention over a cache, with a state of the graph as one."""
    past = g.op("Unsqueeze", "past", g.ints(1))
    names = [g.op("Transpose", value, perm=[0, 1, 3, 2]) for value in (past, past)]
    given: Any = {"is_causal": causal, "q_num_heads": 1, "kv_num_heads": 1}
    return g.op("Attention", y, y, y, "", *names, outputs=["read", "keys", "values"], **given)


@pytest.mark.parametrize(("causal", "mixes"), [(1, False), (0, True)])
def test_causal_attention_over_a_cache_is_token_after_token(causal: int, mixes: bool) -> None:
    model = step_model(after=lambda g, y: grown(g, y, causal=causal))
    done = raise_operators(model)
    assert ("Attention" in str(mixes_tokens(model, str(done.tokens)))) is mixes


def masked(g: Graph, y: str, *, compare: str = "GreaterOrEqual", seen: float = 0.0, first: int = 0) -> str:
    """Attention over a cache with a mask as mobius computes it."""
    counts = g.op("CumSum", "attention_mask", g.op("Constant", value_int=1))
    total = g.op("Shape", "attention_mask", start=1, end=2)
    start = g.op("Sub", total, g.op("Shape", "x", start=1, end=2))
    start = g.op("Add", start, g.ints(first)) if first else start
    own = g.op("Unsqueeze", g.op("Slice", counts, start, total, g.ints(1)), g.ints(2))
    visible = g.op(compare, own, g.op("Unsqueeze", counts, g.ints(1)))
    given = g.op("Cast", g.op("Unsqueeze", "attention_mask", g.ints(1)), to=TensorProto.BOOL)
    mask = g.op("Where", g.op("And", given, visible), g.number(seen), g.number(-3e38))
    cache = g.op("Unsqueeze", "past", g.ints(1))
    caches = [g.op("Transpose", value, perm=[0, 1, 3, 2]) for value in (cache, cache)]
    more: Any = {"q_num_heads": 1, "kv_num_heads": 1, "outputs": ["read", "keys", "values"]}
    return g.op("Attention", y, y, y, g.op("Unsqueeze", mask, g.ints(1)), *caches, **more)


@pytest.mark.parametrize(
    ("change", "mixes"),
    [({}, False), ({"compare": "LessOrEqual"}, True), ({"seen": 1.0}, True), ({"first": -1}, True)],
)
def test_attention_with_a_causal_mask_is_token_after_token(change: dict[str, Any], mixes: bool) -> None:
    model = step_model(after=lambda g, y: masked(g, y, **change))
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["B", "total"])
    model.graph.input.append(mask)
    done = raise_operators(model)
    assert (mixes_tokens(model, str(done.tokens)) is not None) is mixes
    reads = next(n for n in model.graph.node if n.op_type == "Shape" and n.input[0] == "x")
    model.graph.output.append(helper.make_tensor_value_info(reads.output[0], TensorProto.INT64, [1]))
    assert mixes_tokens(model, str(done.tokens)) is not None  # the number of tokens is read elsewhere too


def test_what_is_raised_computes_the_same_whatever_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs with an operator, an operand or an axis changed, of sizes that coincide: left alone, or equal."""
    for name, size in (("CHANNELS", 4), ("STATES", 4), ("RANK", 2)):
        monkeypatch.setattr(selective_models, name, size)
    builders = (step_model, value_model, scan_model, lambda: scan_model(before=True), lambda: step_model(matmul=True))
    counts = {"changed": 0, "prompts": 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        model = builders[seed % 5]()
        bodies = [a.g for n in model.graph.node for a in n.attribute if a.name == "body"]
        original = mutated(model, rng.choice([model.graph, *bodies]), rng)
        if original is None:
            continue
        changed, done = original != builders[seed % 5](), raise_operators(model)
        if not any("-> SelectiveScan" in note for note in done.notes):
            continue
        feeds = feeds_of(model, {"B": 4, "T": 1 if done.tokens else 4})
        compare(run(by_scan(model), feeds), run(original, feeds))
        counts["changed"] += changed
        if done.tokens and mixes_tokens(model, done.tokens) is None:
            feeds = feeds_of(model, {"B": 4, "T": 4})
            compare(run(by_scan(model), feeds), stepped(original, feeds))
            counts["prompts"] += 1
    assert min(counts.values()) >= 5, counts


def mutated(model: onnx.ModelProto, graph: onnx.GraphProto, rng: np.random.Generator) -> onnx.ModelProto | None:
    """A copy of a model after a change to one of its graphs; None where ONNX Runtime has no numbers of it."""
    try:
        mutate(graph, rng)
        results = run(model, feeds_of(model, {"B": 4, "T": 1}))
    except Exception:  # what ONNX Runtime refuses says nothing
        return None
    return copy.deepcopy(model) if all(np.isfinite(value).all() for value in results.values()) else None


def test_states_that_no_kernel_takes_run_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable form loops over tokens, and IREE cannot tell the memory of such a function."""
    monkeypatch.setattr(selective_models, "STATES", 6)
    model = step_model()
    compiled = compile_model(model, CompileOptions(prefill_blocks=(TOKENS,)))
    assert [row.strategy for row in compiled.report.nodes] == ["recurrent"]
    feeds = feeds_of(model, {"B": 1, "T": TOKENS})
    compare(Program.load(compiled.module).run(feeds), stepped(model, feeds))


def test_keys_for_each_channel_stay() -> None:
    model = value_model(per_channel=True)
    done = raise_operators(model)
    assert "for each channel" in done.notes[0]
    assert "LinearAttention" in kinds(model)
