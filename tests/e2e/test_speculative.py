"""Speculative decoding: whatever the draft guesses, what comes out is what comes out without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
from linattn.runtime import InputError, Program, Sampling, Session, StateError, TextGenerator, generate, greedy

from tests.stepped import CONTEXT, IDS, program
from tests.tolerances import BENIGN, error

PROMPT = [int(token) for token in IDS[0, :9]]
COUNT = 500


@cache
def plain() -> list[int]:
    return list(greedy(program("cpu").session(), PROMPT, COUNT))


def drafts(want: list[int]) -> dict[str, Callable[[Sequence[int], int], Sequence[int]]]:
    whole, rng = [*PROMPT, *want], np.random.default_rng(0)

    def wrong_from(at: int) -> Callable[[Sequence[int], int], Sequence[int]]:
        return lambda tokens, count: [
            (token + (i >= at)) % 256 for i, token in enumerate(whole[len(tokens) : len(tokens) + count])
        ]

    def sometimes(tokens: Sequence[int], count: int) -> list[int]:
        right = whole[len(tokens) : len(tokens) + int(rng.integers(0, count + 3))]
        return [token if rng.random() < 0.8 else int(rng.integers(256)) for token in right]

    found = {"right": wrong_from(99), "wrong": wrong_from(0), "second": wrong_from(1), "sometimes": sometimes}
    return found | {"nothing": lambda tokens, count: []}


@pytest.mark.parametrize("name", ["right", "sometimes", "nothing", "wrong", "second"])
def test_500_tokens_are_those_of_plain_decoding(name: str) -> None:
    """Of the seeds here none has two logits that a block's rounding and a step's order differently."""
    want, session = plain(), program("cpu").session()
    asked, guess = list[int](), drafts(want)[name]

    def draft(tokens: Sequence[int], number: int) -> Sequence[int]:
        asked.append(len(tokens))
        assert list(tokens) == [*PROMPT, *want[: len(tokens) - 9]]
        return guess(tokens, number)

    assert list(generate(session, PROMPT, COUNT, draft=draft)) == want
    assert session.position == 9 + COUNT - 1
    assert session._window == 0
    assert name != "right" or len(asked) < COUNT / 7
    assert_goes_on(session, want, COUNT)


def assert_goes_on(session: Session, want: list[int], count: int) -> None:
    """The states are those of plain decoding: the logits after one more token are the same."""
    other = program("cpu").session()
    other.run({"input_ids": [[*PROMPT, *want[: count - 1]]]})
    one, two = (each.run({"input_ids": [[want[count - 1]]]})["logits"] for each in (session, other))
    assert error(one, two) < BENIGN["float32"]


def test_a_model_as_draft() -> None:
    """The model itself guesses right wherever it stands; up to the end of its context."""
    want = plain()
    assert list(generate(program("cpu").session(), PROMPT, 120, draft=program("cpu"))) == want[:120]
    session = program("cpu").session()
    assert list(generate(session, PROMPT, CONTEXT - 8, draft=program("cpu")))[:COUNT] == want
    assert session.position == CONTEXT
    with pytest.raises(StateError, match="context full"):
        list(generate(program("cpu").session(), PROMPT, CONTEXT, draft=program("cpu")))


def test_stops_and_what_follows() -> None:
    """A stop among right guesses, the last of the count, a closed generator: the states are those of what came out."""
    want = plain()
    guesses = drafts(want)
    for at in range(1, 20):
        session = program("cpu").session()
        stops = [want[at]] if want[at] not in want[:at] else []
        assert list(generate(session, PROMPT, at + 1, stop=stops, draft=guesses["right"])) == want[: at + 1]
        assert session.position == 9 + at
        assert_goes_on(session, want, at + 1)
        for name in ("second", "right"):
            session = program("cpu").session()
            tokens = generate(session, PROMPT, 100, draft=guesses[name])
            assert [next(tokens) for _ in range(at)] == want[:at]
            tokens.close()
            assert session.position == 9 + at - 1  # whatever else was right by then
            assert_goes_on(session, want, at)


def test_sampling_draws_what_it_draws_without() -> None:
    sampling = Sampling(temperature=1.2, top_k=40, top_p=0.95, repeat_penalty=1.1, seed=5)
    want = list(generate(program("cpu").session(), PROMPT, 300, sampling))
    guess = drafts(want)["sometimes"]
    assert list(generate(program("cpu").session(), PROMPT, 300, sampling, draft=guess)) == want


def test_what_goes_wrong() -> None:
    want = plain()
    guesses = drafts(want)
    session = program("cpu").session()
    tokens = generate(session, PROMPT, 50, draft=guesses["right"])
    next(tokens), next(tokens)
    session.run({"input_ids": [[1]]})
    with pytest.raises(StateError, match="the session was used while a draft is verified"):
        list(tokens)
    session = program("cpu").session()
    with pytest.raises(InputError, match=r"index out of range, got 700"):
        list(generate(session, PROMPT, 50, draft=lambda tokens, count: [700]))
    assert session.position == 9
    session, found = program("cpu").session(), list[int]()

    def fails(tokens: Sequence[int], count: int) -> Sequence[int]:
        if len(tokens) > 20:
            raise KeyboardInterrupt
        return guesses["second"](tokens, count)

    def collect() -> None:
        for token in generate(session, PROMPT, 50, draft=fails):
            found.append(token)

    with pytest.raises(KeyboardInterrupt):
        collect()
    assert session.position == 9 + len(found) - 1
    assert_goes_on(session, want, len(found))


class Ids:
    """A tokenizer whose texts are the ids."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f"{token} " for token in ids)

    def stream(self) -> Callable[[int], str]:
        return lambda token: f"{token} "

    def token_id(self, token: str) -> int | None:
        return None


@pytest.mark.parametrize("drafter", ["function", "model"])
def test_texts_with_a_draft(drafter: str) -> None:
    """200 tokens as without; the next prompt goes on from them, and from an answer that was cut off in a block."""
    seen, guesses = list[list[int]](), drafts(plain())

    def function(tokens: Sequence[int], count: int) -> Sequence[int]:
        seen.append(list(tokens))
        return guesses["right"](tokens, count)

    draft: Callable[[Sequence[int], int], Sequence[int]] | Program = program("cpu") if drafter == "model" else function
    with_draft, without = (TextGenerator(program("cpu"), Ids(), draft=given) for given in (draft, None))
    prompt = " ".join(map(str, PROMPT))
    answer = "".join(with_draft.generate(prompt, max_tokens=200))
    assert answer == "".join(without.generate(prompt, max_tokens=200)) == Ids().decode(plain()[:200])
    following = f"{prompt} {answer} 7 8 9"
    for generator in (with_draft, without):
        stream = generator.generate(following, max_tokens=12, stop=[f" {plain()[0]} nothing"])
        found = [next(stream) for _ in range(5)]
        assert stream.reused_tokens == 9 + 199
        stream.close()
        answers = list[str]()
        for other in (generator.fork(), generator):  # from the mark, and from the session
            goes_on = other.generate(f"{following} {''.join(found)} 5", max_tokens=12)
            answers.append("".join(goes_on))
            assert goes_on.reused_tokens == 9 + 200 + 3 + 4  # of the five the last is not in the states
        if generator is with_draft:
            kept = found, answers
    assert (found, answers) == kept
    assert all(tokens[:9] == PROMPT for tokens in seen)  # from the very start, whatever was reused
    fork = with_draft.fork()
    assert "".join(fork.generate(prompt, max_tokens=30)) == Ids().decode(plain()[:30])
