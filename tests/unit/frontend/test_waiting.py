"""A compile that takes long says for how long: beside the line on a terminal, now and then elsewhere."""

from __future__ import annotations

import io

import pytest
from linattn.frontend.plan.report import Progress
from linattn.frontend.process import waiting
from linattn.frontend.process.waiting import Waiting


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    return clock


def on_a_terminal(text: str) -> list[str]:
    """The lines that one sees, without what stands beyond their ends."""
    lines: list[list[str]] = [[]]
    at = 0
    for letter in text:
        if letter == "\n":
            lines.append([])
            at = 0
        elif letter == "\b":
            at -= 1
        else:
            lines[-1][at : at + 1] = [letter]
            at += 1
    return ["".join(line).rstrip() for line in lines]


def shown(clock: Clock, is_live: bool, seconds: int) -> str:
    """A line of two parts, with some seconds before each next one."""
    said = io.StringIO()
    one = Waiting()

    def wait() -> None:
        for _ in range(seconds):
            clock.now += 1
            one.beat()

    wait()  # nothing is unfinished yet
    one.say("[1/2] generate code ... ", said.write, is_live)
    wait()
    one.say("lowered ... ", said.write, is_live)
    wait()
    if is_live:
        assert on_a_terminal(said.getvalue())[-1] == f"[1/2] generate code ... lowered ... {2 * seconds} s"
    one.say("9.9 s\n", said.write, is_live)
    wait()  # nor any more
    one.say("[2/2] write ... ", said.write, is_live)
    one.end("stopped")
    one.end("stopped")
    return said.getvalue()


def test_a_terminal_shows_each_second_and_keeps_none(clock: Clock) -> None:
    text = shown(clock, True, 7)
    assert on_a_terminal(text) == ["[1/2] generate code ... lowered ... 9.9 s", "[2/2] write ... stopped", ""]
    assert [f"{second} s\b" in text for second in (1, 7, 14, 15)] == [True, True, True, False]


def test_a_pipe_is_told_each_half_minute(clock: Clock) -> None:
    text = shown(clock, False, 65)
    first = "[1/2] generate code ... 30 s ... 60 s ... lowered ... 90 s ... 120 s ... 9.9 s\n"
    assert text == f"{first}[2/2] write ... stopped\n"
    assert shown(clock, False, 10) == "[1/2] generate code ... lowered ... 9.9 s\n[2/2] write ... stopped\n"


def test_what_has_ended_says_no_more(clock: Clock) -> None:
    said = io.StringIO()
    with Waiting() as one:
        one.say("half ", said.write, False)
    clock.now += 100
    one.beat()
    assert said.getvalue() == "half "


def test_progress_knows_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert [Progress(1, stream).is_live for stream in (None, io.StringIO(), Terminal())] == [False, False, True]
