"""Several steps a call on CPUs: tokens, states and errors are those of single steps, whatever comes in between."""

from __future__ import annotations

from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions
from linattn.frontend.compile import compile_model
from linattn.runtime import (
    InputError,
    Program,
    Sampling,
    Session,
    StateError,
    TargetError,
    generate,
    greedy,
    greedy_rows,
)
from linattn.runtime.ahead import Series
from linattn.runtime.describe import describe, describe_text
from linattn.runtime.device import Device, DeviceArray
from linattn.runtime.engine import engine_of
from linattn.runtime.follower import LONGEST_SECONDS, Follower
from linattn.runtime.held import Caches
from linattn.runtime.integrity import SEAL_BYTES, sealed
from linattn.runtime.manifest import STEPS_KEY
from linattn.runtime.module import Module
from linattn.runtime.step_loop import MOST_STEPS, StepLoop

from samples.benchmark_model import Shape, write
from samples.tiny_hybrid import build
from tests.stepped import CONTEXT, IDS, Counted, program

HOW = Sampling(0.8, top_k=40, top_p=0.95, seed=5)
PROMPT = IDS[:, :9]


@pytest.fixture(autouse=True)
def _any_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy does not make series shorter."""
    monkeypatch.setattr("linattn.runtime.follower.LONGEST_SECONDS", 1e9)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Of the module, for several steps."""
    counted = Counted(Module.call_loop)
    monkeypatch.setattr(Module, "call_loop", counted)
    return counted


def one_by_one(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("linattn.runtime.follower.MOST_STEPS", 1)


@cache
def expected(how: Sampling) -> tuple[list[int], list[dict[str, bytes]]]:
    """60 tokens by single steps, and the states behind each of them."""
    with pytest.MonkeyPatch.context() as patch:
        one_by_one(patch)
        session, tokens, states = program("cpu").session(), list[int](), list[dict[str, bytes]]()
        for token in generate(session, PROMPT, 60, how):
            tokens.append(token)
            states.append(bits(session))
    return tokens, states


def bits(session: Session) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in session.states.numpy().items()}


@pytest.mark.parametrize("how", [Sampling(), HOW], ids=["greedy", "drawn"])
def test_series_are_single_steps(how: Sampling, calls: Counted) -> None:
    """Tokens, position and the bits of all states; from the fourth token on in calls of 2, 4, 8 and so on."""
    session = program("cpu").session()
    assert list(generate(session, PROMPT, 60, how)) == expected(how)[0]
    assert calls.calls == 6  # of 2, 4, 8, 16, 16 and 12 tokens
    assert session._series is None
    assert session.position == 9 + 59
    assert bits(session) == expected(how)[1][-1]


@pytest.mark.parametrize("how", [Sampling(), HOW], ids=["greedy", "drawn"])
def test_an_end_anywhere(how: Sampling, calls: Counted) -> None:
    """A generation that is closed behind any token: the session holds what was yielded, and goes on from there."""
    tokens, states = expected(how)
    for end in range(1, 36):
        session = program("cpu").session()
        steps = generate(session, PROMPT, 60, how)
        assert list(islice(steps, end)) == tokens[:end]
        steps.close()
        before = calls.calls
        assert session.position == 9 + end - 1
        assert bits(session) == states[end - 1]
        assert calls.calls - before <= 1  # what was taken of the series, once more
        assert session._series is None
        if how == Sampling():
            assert list(greedy(session, [tokens[end - 1]], 4)) == tokens[end : end + 4]


def test_a_stop_ends_a_series_where_it_stands(calls: Counted) -> None:
    """No step is done behind it, so that none is done again."""
    tokens, states = expected(HOW)
    for end in range(1, 40):
        stop = tokens[end]
        if stop in tokens[:end]:
            continue
        session, before = program("cpu").session(), calls.calls
        assert list(generate(session, PROMPT, 60, HOW, stop=[1 << 40, -3, stop])) == tokens[: end + 1]
        assert session._series is None
        done = calls.calls
        assert bits(session) == states[end]
        assert (session.position, calls.calls) == (9 + end, done)
        assert done - before <= 5


@pytest.mark.parametrize("between", ["snapshot", "fork", "states", "run", "save", "rows"])
def test_whatever_comes_between_two_tokens_of_a_series(between: str, tmp_path: Path) -> None:
    """It sees what was yielded and fed; the tokens that follow are the same, and from then on one by one."""
    tokens, states = expected(Sampling())
    session, found = program("cpu").session(), list[int]()
    for at, token in enumerate(generate(session, PROMPT, 60)):
        found.append(token)
        assert session.position == 9 + at
        if at in (11, 12, 40):
            if between == "snapshot":
                assert bits(program("cpu").session(session.snapshot())) == states[at]
            elif between == "fork":
                assert list(greedy(session.fork(), [token], 8)) == tokens[at + 1 : at + 9]
            elif between == "states":
                assert bits(session) == states[at]
            elif between == "save":
                session.save(tmp_path / "s")
                assert bits(Session.load(program("cpu"), tmp_path / "s")) == states[at]
            elif between == "rows":
                session.rows([0])
            elif at != 12:  # the next token by hand, and back
                kept = session.snapshot()
                session.run({"input_ids": [[token]]})
                session.restore(kept)
            assert session._series is None
    assert found == tokens
    assert bits(session) == states[-1]


def test_a_reset_does_nothing_again(calls: Counted) -> None:
    session = program("cpu").session()
    list(islice(generate(session, PROMPT, 60), 10))
    assert session._series is not None
    before = calls.calls
    session.reset()
    assert (session.position, calls.calls, session._series) == (0, before, None)
    assert list(greedy(session, PROMPT, 60)) == expected(Sampling())[0]


@pytest.mark.parametrize("error", [TargetError("injected"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failure_at_every_boundary_of_series(
    error: BaseException, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was yielded is held, nothing else; also where the steps that were taken fail to be done again."""
    tokens, states = expected(Sampling())
    for owner, name in ((Module, "call_loop"), (StepLoop, "run"), (Caches, "extend"), (Session, "_take")):
        for failing in (1, 2, 4):
            session, found, left = program("cpu").session(), list[int](), [failing]
            right: Any = getattr(owner, name)

            def broken(*args: Any, right: Any = right, left: list[int] = left) -> Any:
                left[0] -= 1
                if left[0] == 0 and when == "before":
                    raise error
                result = right(*args)
                if left[0] == 0:
                    raise error
                return result

            steps = generate(session, PROMPT, 40)
            found += islice(steps, 2)
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, broken)
                with pytest.raises(type(error)):
                    found += steps
            if name == "_take" and when == "after":  # committed, and Ctrl-C came before anybody was told
                found.append(tokens[len(found)])
            assert found == tokens[: len(found)]
            assert session.position == 9 + len(found) - 1
            assert bits(session) == states[len(found) - 1]
    session = program("cpu").session()
    steps = generate(session, PROMPT, 60)
    assert list(islice(steps, 10)) == tokens[:10]
    for name in ("call_loop", "call_loop"):
        with monkeypatch.context() as patch:
            patch.setattr(Module, name, Counted(lambda *_: (_ for _ in ()).throw(error)))
            with pytest.raises(type(error)):
                session.snapshot()
            assert session.position == 9 + 9
    assert bits(session) == states[9]
    assert list(steps) == tokens[10:]


def test_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in the memory that states are written to is nowhere in them."""
    right = Device.empty

    def poisoned(self: Device, shape: Any, dtype: str) -> DeviceArray:
        array = right(self, shape, dtype)
        view = self.host_view(array)
        if view is not None:
            view.reshape(-1).view(np.uint8).fill(0xFF)  # NaN
        return array

    tokens, states = expected(HOW)
    program("cpu").trim()
    monkeypatch.setattr(Device, "empty", poisoned)
    monkeypatch.setattr(program("cpu").device, "clears_new", False)
    session = program("cpu").session()
    steps = generate(session, PROMPT, 60, HOW)
    assert list(islice(steps, 25)) == tokens[:25]
    assert bits(session) == states[24]
    assert list(steps) == tokens[25:]
    assert bits(session) == states[-1]


def test_the_end_of_the_context() -> None:
    """The last token that there is room for comes, and the one behind it is refused, as by single steps."""
    ends: list[tuple[list[int], int, dict[str, bytes]]] = []
    for most in (MOST_STEPS, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linattn.runtime.follower.MOST_STEPS", most)
            session, found = program("cpu").session(), list[int]()
            with pytest.raises(StateError, match="context full"):
                found += greedy(session, IDS[:, : CONTEXT - 41], 100)
            ends.append((found, session.position, bits(session)))
    assert ends[0] == ends[1]
    assert (len(ends[0][0]), ends[0][1]) == (42, CONTEXT)


def test_logits_that_are_nan_end_a_series() -> None:
    session = program("cpu").session()
    steps = generate(session, PROMPT, 60)
    list(islice(steps, 4))
    name = next(spec.name for spec in program("cpu").states if spec.kind == "recurrent")
    session.set_state(name, np.full(session.states[name].shape, np.nan, np.float32))
    with pytest.raises(StateError, match="the logits are NaN"):
        next(steps)


def test_who_takes_no_series(calls: Counted) -> None:
    """A window keeps the states of each step, a guard looks at them, a penalty and a draft are the host's."""
    tokens = expected(Sampling())[0]
    assert list(generate(program("cpu").session(window=2), PROMPT, 20)) == tokens[:20]
    assert list(generate(program("cpu").session(guard="nan"), PROMPT, 20)) == tokens[:20]
    list(generate(program("cpu").session(), PROMPT, 20, Sampling(repeat_penalty=1.1)))
    assert list(generate(program("cpu").session(), PROMPT, 20, draft=lambda known, count: [3] * count)) == tokens[:20]
    assert calls.calls == 0


def test_how_many_steps() -> None:
    """As many as take no longer than is agreed; a session that is asked for something else gets single ones."""
    follower = Follower(program("cpu").session())
    for seconds in (1e-4, 3e-3, 1e-2, 0.04, 0.3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linattn.runtime.follower.LONGEST_SECONDS", LONGEST_SECONDS)
            many = 1
            for _ in range(8):
                follower.took(many, many * seconds)
                assert follower._many <= max(2 * many, 1)
                many = follower._many
            assert many * seconds <= LONGEST_SECONDS or many == 1
            assert many == max(1, min(MOST_STEPS, int(LONGEST_SECONDS / seconds * (1 + 1e-9))))


def test_half_numbers_and_rows(calls: Counted) -> None:
    """f16, two rows of one length, the likeliest tokens."""
    options = CompileOptions(max_context=64, prefill_blocks=(), sampler="greedy", batch=2)
    loaded = Program.load(compile_model(build("f16"), options).module)
    assert loaded.manifest.entry_points[0].steps == "decode_token_steps"
    prompts, ends = IDS[:, :10].reshape(2, 5), list[Any]()
    for most in (1, MOST_STEPS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linattn.runtime.follower.MOST_STEPS", most)
            session = loaded.session()
            steps = greedy_rows(session, prompts, 40)
            found = list(islice(steps, 20))
            middle = bits(session)
            found += steps
            ends.append((found, middle, bits(session), session.position))
    assert ends[0] == ends[1]
    assert calls.calls > 3


def test_int4_without_caches(tmp_path: Path, calls: Counted) -> None:
    write(Shape(layers=3, hidden=128, heads=1, mlp=128, vocabulary=256, dtype="int4"), tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    unused = [node for node in proto.graph.node if "attn_mask_reformat" in node.name]
    for values in (proto.graph.input, proto.graph.node):  # without attention nobody reads the mask
        for value in [one for one in values if one.name == "attention_mask" or one in unused]:
            cast(Any, values).remove(value)
    model = compile_model(proto, CompileOptions(prefill_blocks=(), sampler="draw"))
    loaded, ends = Program.load(model.module), list[Any]()
    assert not any(spec.in_place for spec in loaded.states)
    for most in (1, MOST_STEPS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linattn.runtime.follower.MOST_STEPS", most)
            session = loaded.session()
            steps = generate(session, PROMPT % 200, 40, HOW)
            found = list(islice(steps, 20))
            middle = bits(session)
            found += steps
            ends.append((found, middle, bits(session), session.position))
    assert ends[0] == ends[1]
    assert calls.calls > 3


def test_tokens_without_a_row_in_the_table(calls: Counted) -> None:
    """Logits of more tokens than the table has rows: such a token comes out, and is refused where it is fed."""
    proto = build()
    head = next(node.input[1] for node in reversed(proto.graph.node) if node.op_type == "MatMul")
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == head)
    array = onnx.numpy_helper.to_array(weight)
    wide = np.concatenate([array, array[:, 200:205] * 1.5], 1)  # 256 to 260, likely now and then
    weight.CopyFrom(onnx.numpy_helper.from_array(wide, head))
    proto.graph.output[0].type.tensor_type.shape.dim[2].dim_value = wide.shape[1]
    del proto.graph.value_info[:]
    options = CompileOptions(max_context=64, prefill_blocks=(), sampler="draw")
    loaded, ends = Program.load(compile_model(proto, options).module), list[Any]()
    for most in (1, MOST_STEPS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("linattn.runtime.follower.MOST_STEPS", most)
            for seed in range(4):
                session, found = loaded.session(), list[int]()
                with pytest.raises(InputError, match="input_ids"):
                    found += generate(session, PROMPT, 55, Sampling(1.0, seed=seed))
                ends.append((found, session.position, bits(session)))
                assert found[-1] >= 256
    assert ends[:4] == ends[4:]
    assert calls.calls > 3


def test_what_a_module_says_of_it(tmp_path: Path) -> None:
    """It is described; a function that does not call the one that it should is refused."""
    options = CompileOptions(max_context=CONTEXT, prefill_blocks=(), sampler="draw")
    data = compile_model(build(), options).module
    path = tmp_path / "m.vmfb"
    path.write_bytes(data)
    assert "decode_draw_steps: several steps of it" in describe_text(describe(path))
    assert engine_of(Program.load(path)).loop(1) is not None
    assert "decode_packed: with its position in memory" in describe_text(describe(path))
    assert data.count(STEPS_KEY.encode()) == 2
    other = sealed(data[:-SEAL_BYTES].replace(STEPS_KEY.encode(), STEPS_KEY.upper().encode()))
    with pytest.raises(TargetError, match="'decode_draw_steps' calls another function, got none, expected decode_draw"):
        Program.load(other)
    manifest, name = engine_of(Program.load(path)).manifest, "decode_packed"
    assert [(entry.symbol, entry.packed) for entry in manifest.entry_points] == [("decode", name)]


def test_a_series_that_was_done_again_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    session = program("cpu").session()
    list(islice(generate(session, PROMPT, 60), 10))
    series = session._series
    assert isinstance(series, Series)
    series.tokens[1] = [(series.tokens[1][0] + 1) % 256]
    with pytest.raises(TargetError, match="done again chose other tokens"):
        session.snapshot()
