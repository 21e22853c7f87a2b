"""Generation, the simplest loop over a session: a step, a choice, and the choice is the next step's input."""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..calling import advance, follow, settle
from ..device import HostArray
from ..engine import engine_of
from ..errors import InputError, require, require_list, require_whole
from ..follower import Follower
from ..program import Program
from ..session import Session
from .feeding import Embed, Feeder, prompt_ids
from .sampling import Sampler, Sampling, index_of_largest, nan_logits
from .speculative import Draft, Speculation, block_of, drafted_by


def greedy(session: Session, ids: ArrayLike, count: int, *, embed: Embed | None = None) -> Iterator[int]:
    """Generates tokens of one row, each the one with the largest logit (the first of equals).

    The session keeps what was generated, but for the last token, which has not been fed back.

    Args:
        session: Where to go on from; reset it for a fresh sequence.
        ids: Prompt, [T] or [1, T], at least one token.
        count: Number of tokens to generate.
        embed: As of `generate`.

    Yields:
        The next token id.

    Raises:
        InputError: An empty prompt, several rows, or a model without token ids and logits.
        StateError: The context is full, or the logits are NaN.
    """
    return generate(session, ids, count, embed=embed)


def greedy_rows(session: Session, ids: ArrayLike, count: int) -> Iterator[tuple[int, ...]]:
    """`greedy` for B rows of equal length at once.

    Args:
        session: Where to go on from.
        ids: Prompts, [B, T], at least one token each.
        count: Number of tokens to generate for each row.

    Yields:
        The next token id of every row.

    Raises:
        InputError: An empty prompt, or a model without token ids and logits.
        StateError: The context is full, or the logits are NaN.
    """
    _check_count(count)
    feeder, output = Feeder(session), _logits(session)
    feed = prompt_ids(feeder, ids)
    follower = None if engine_of(session.program).device.has_queue else Follower(session)
    try:
        for turn in range(count):
            if turn:
                best = _greedy_step(session, feed, count - turn, follower)
            else:
                best = _largest(session.run(feeder.first(feed), logits="last")[output])
            feed = best.astype(feed.dtype)
            yield tuple(int(token) for token in feed[:, 0])
    finally:
        settle(session)


def generate(
    session: Session,
    ids: ArrayLike,
    count: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
    seen: Collection[int] = (),
    *,
    embed: Embed | None = None,
    prompt: Mapping[str, Any] | None = None,
    draft: Draft | Program | None = None,
) -> Generator[int]:
    """Generates tokens of one row until one of them stops it.

    The session keeps what was generated, but for the last token, which has not been fed back. With a `draft` it does so
    when the generation has ended, and is not to be used before.

    Args:
        session: Where to go on from; reset it for a fresh sequence.
        ids: Prompt, [T] or [1, T], at least one token.
        count: Most tokens to generate.
        sampling: How a token is chosen; None: the largest logit.
        stop: Tokens after which there is nothing more to say, such as the model's end of text; the one that is chosen
            is the last that is yielded.
        seen: Tokens that the session has had before this prompt, for the repetition penalty.
        embed: For a model that takes embeddings (`inputs_embeds`): the table [V, D] in the input's dtype, or a function
            from ids [B, T] to embeddings [B, T, D].
        prompt: Further inputs of the prompt's call, such as embeddings with an image's among them, or `position_ids`
            ([3, B, T] where an image's are not counted one by one): the tokens that follow count on from the largest.
            Left out, positions count the tokens.
        draft: Guesses tokens, of which one call of the model verifies as many as its smallest prefill block takes: a
            function that is given all tokens from the prompt on and how many are wanted, or a smaller model of the same
            vocabulary. What comes out is what would have come out without it, as far as a block's logits and those of
            single steps, which are rounded differently, have the same order.

    Yields:
        The next token id.

    Raises:
        InputError: An empty prompt, several rows, a model without token ids and logits, or a draft for one that takes
            one token a call.
        StateError: The context is full, or the logits are NaN.
    """
    require(sampling, (Sampling, type(None)), "sampling", "a Sampling, such as Sampling(temperature=0.7)")
    require_list(stop, "stop", "token ids")
    require_list(seen, "seen", "token ids")
    require(prompt, (Mapping, type(None)), "prompt", "a dict of inputs by name")
    if not callable(draft):
        require(draft, (Program, type(None)), "draft", "a function or a Program")
    _check_count(count)
    feeder, output = Feeder(session, embed, prompt), _logits(session)
    feed = prompt_ids(feeder, ids)
    if feed.shape[0] != 1:
        hint, got = "greedy_rows generates for several", list(feed.shape)
        raise InputError("one row is generated", where=feeder.ids.name, got=got, expected="[T]", hint=hint)
    known = [int(token) for token in feed[0]]
    sampler = Sampler(sampling or Sampling(), [*seen, *known])
    drawn_from = _drawn_from(session)
    if draft is not None and count > 0:
        block_of(session.program.manifest)
        if not feeder.is_plain:
            raise InputError(
                "guesses are verified as token ids alone", where="draft", expected="neither embed nor positions"
            )
        token = sampler.choose(session.run(feeder.first(feed), logits="last", outputs=[output])[output][0, -1])
        yield token
        if token not in stop:
            guess = drafted_by(draft, greedy) if isinstance(draft, Program) else draft
            yield from Speculation(session, [*known, token], sampler, guess).run(count - 1, stop)
        return
    try:
        chooses = sampler.is_plain and (sampler.is_greedy or drawn_from is not None)
        settings = None if sampler.is_greedy else partial(sampler.settings, drawn_from or 0)
        chooses = chooses and not engine_of(session.program).device.has_queue
        quick = Follower(session, settings, stop) if chooses else None
        token = known[-1]
        for turn in range(count):
            if turn == 0 or not feeder.is_plain:
                call = feeder.step(feed) if turn else feeder.first(feed)
                token = sampler.choose(session.run(call, logits="last", outputs=[output])[output][0, -1])
            elif (chosen := quick.row(token, count - turn) if quick is not None else None) is not None:
                token = sampler.take(chosen)
            else:
                token = _step(session, token, feed.dtype, sampler, drawn_from, turn + 1 < count)
            if not feeder.is_plain:
                feed = np.full((1, 1), token, feed.dtype)
            yield token
            if token in stop:
                return
    finally:
        settle(session)


def _check_count(count: int) -> None:
    require_whole(count, "count")
    if count < 0:
        raise InputError("out of range", where="count", got=count, expected="0 or more")


def _step(
    session: Session, token: int, dtype: np.dtype[Any], sampler: Sampler, drawn_from: int | None, more: bool
) -> int:
    """The token behind one: chosen by the module where it can, else here."""
    is_greedy = sampler.is_greedy
    if sampler.is_plain and (is_greedy or drawn_from is not None):
        draw = None if is_greedy else sampler.settings(drawn_from or 0, 0)
        later = None if is_greedy else sampler.settings(drawn_from or 0, 1)
        tokens = follow(session, np.full((1, 1), token, dtype), more, draw, later)
        if tokens is not None:
            return sampler.take(int(tokens[0, 0]))
    feed = np.full((1, 1), token, dtype)
    if sampler.is_plain and is_greedy:
        return advance(session, feed, lambda logits: sampler.choose(logits[0, -1]))
    return sampler.choose(advance(session, feed, np.copy)[0, -1])  # the program's other sessions go on while it chooses


def chosen_where(program: Program, sampling: Sampling) -> str:
    """Whether `generate` has the module choose tokens, for people; where not, why."""
    engine, batch = engine_of(program), program.manifest.batch or 1
    step = engine.take_chooser(batch, draws=bool(sampling.temperature))
    if step is None:
        return "on the host"
    engine.give_back(batch, step)
    if sampling.repeat_penalty != 1.0:
        return "on the host, which knows what a repeat penalty asks for"
    return "in the module"


def _drawn_from(session: Session) -> int | None:
    """How many logits the module draws a token from; None where it does not draw."""
    manifest = session.program.manifest
    size = next(spec.shape[-1] for spec in manifest.outputs if spec.role == "logits")
    draws = any(entry.draw for entry in manifest.entry_points)
    return size if draws and isinstance(size, int) else None


def _greedy_step(session: Session, feed: HostArray, wanted: int, follower: Follower | None) -> HostArray:
    """The next token of every row, [B, 1]: chosen by the module where it can, several steps a call, else here."""
    found = None if follower is None else follower.rows(feed[:, 0].tolist(), wanted)
    start = time.perf_counter()
    tokens = follow(session, feed, wanted > 1) if found is None else np.array(found)[:, None]
    if found is None and tokens is not None and follower is not None:
        follower.took(1, time.perf_counter() - start)
    if tokens is None:
        return advance(session, feed, _largest)
    if tokens.min() < 0:
        raise nan_logits()
    return tokens


def _logits(session: Session) -> str:
    """The name of the logits."""
    outputs = [spec.name for spec in session.program.outputs if spec.role == "logits"]
    if len(outputs) != 1:
        raise InputError("no single output of logits", got=", ".join(outputs) or "none")
    return outputs[0]


def _largest(logits: HostArray) -> HostArray:
    """Index of the largest logit of each row, [B, 1, V] -> [B, 1]."""
    rows = logits[:, -1, :]
    best = np.array([index_of_largest(row) for row in rows])
    if any(row[index] != row[index] for row, index in zip(rows, best, strict=True)):
        raise nan_logits()
    return best[:, None]
