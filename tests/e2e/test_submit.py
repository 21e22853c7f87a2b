"""Calls that are submitted: futures, turns a block each, cancelled between blocks."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
from linattn.runtime import InputError, Session, StateError
from linattn.runtime.engine import engine_of

from tests.e2e.test_steps import general
from tests.stepped import IDS, program


def test_futures_in_order_and_as_run() -> None:
    """Many sessions at once, several calls of each: all as if they had run one by one."""
    loaded = program("cpu")
    sessions = [loaded.session() for _ in range(8)]
    futures = [[s.submit({"input_ids": IDS[:, i : i + 20]}, "last") for i, s in enumerate(sessions)]]
    futures += [[s.submit({"input_ids": IDS[:, at : at + 1]}) for s in sessions] for at in (40, 41, 42)]
    for index in range(8):
        alone = loaded.session()
        alone.run({"input_ids": IDS[:, index : index + 20]})
        for call, at in zip(futures[1:], (40, 41, 42), strict=True):
            want = alone.run({"input_ids": IDS[:, at : at + 1]})["logits"]
            np.testing.assert_array_equal(call[index].result(60)["logits"], want)
        assert sessions[index].position == 23


def test_asyncio() -> None:
    async def work() -> list[Any]:
        session = program("cpu").session()
        return [
            (await asyncio.wrap_future(session.submit({"input_ids": IDS[:, at : at + 1]})))["logits"] for at in range(4)
        ]

    np.testing.assert_array_equal(np.concatenate(asyncio.run(work()), 1), general(program("cpu").session(), 0, 4))


def test_a_long_prompt_holds_up_nobody_for_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = program("cpu")
    engine, order, started, go = engine_of(loaded), list[str](), threading.Event(), threading.Event()
    call, slow, quick = engine.call, loaded.session(), loaded.session()
    quick.run({"input_ids": IDS[:, :9]})

    def noted(entry: Any, *args: Any) -> Any:
        order.append(entry.symbol)
        started.set()
        assert go.wait(60)
        return call(entry, *args)

    monkeypatch.setattr(engine, "call", noted)
    long = slow.submit({"input_ids": IDS[:, :80]}, "last")
    assert started.wait(60)
    step = quick.submit({"input_ids": IDS[:, 9:10]})
    while len(engine.turns._line) < 2:
        time.sleep(0.001)
    step.add_done_callback(lambda _: order.append("step"))
    go.set()
    long.result(60), step.result(60)
    assert order.index("step") <= 2
    assert order.count("prefill_8") == 10


def test_cancel_between_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call that is under way raises, what was submitted behind it too; the session is as before."""
    loaded = program("cpu")
    engine, session, calls = engine_of(loaded), loaded.session(), list[int]()
    before = session.run({"input_ids": IDS[:, :3]})["logits"]
    call = engine.call

    def cancelling(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            other = threading.Thread(target=session.cancel)
            other.start()
            other.join()
        return call(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "call", cancelling)
        first = session.submit({"input_ids": IDS[:, 3:43]})
        second = session.submit({"input_ids": IDS[:, 43:44]})
        with pytest.raises(StateError, match="cancelled"):
            first.result(60)
        with pytest.raises(StateError, match="a call that was submitted before it has failed"):
            second.result(60)
    assert (len(calls), session.position) == (2, 3)
    session.cancel()  # nothing is under way
    assert before.shape == (1, 3, 256)
    np.testing.assert_array_equal(session.submit({"input_ids": IDS[:, 3:4]}).result(60)["logits"],
                                  general_after(3))  # fmt: skip


def general_after(position: int) -> np.ndarray:
    session: Session = program("cpu").session()
    session.run({"input_ids": IDS[:, :position]})
    return session.run({"input_ids": IDS[:, position : position + 1]})["logits"]


def test_errors_come_with_the_future() -> None:
    session = program("cpu").session()
    with pytest.raises(InputError, match="index out of range, got 999"):
        session.submit({"input_ids": [[999]]}).result(60)
    with pytest.raises(InputError, match=r"all \| last"):
        session.submit({"input_ids": [[1]]}, "none")  # type: ignore[arg-type]
    assert session.position == 0
