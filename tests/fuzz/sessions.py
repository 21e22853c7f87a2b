"""Random calls of `Program` and `Session`, right ones and wrong ones, against the recurrence in numpy.

What must hold: a call that raises leaves position and states as they were; after any calls the states are those of all
tokens that were committed, and the logits those of the last ones.
"""

from __future__ import annotations

import functools
import random
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from linattn.runtime import Program, Snapshot
from linattn.runtime.errors import LinattnError
from linattn.runtime.session import Session
from tiny_hybrid import Hybrid, open_form, reference

NAMES = ("past.0.rec", "past.0.conv", "past.1.kv")


@dataclass
class Twin:
    """A session and what it must hold."""

    session: Session
    ids: np.ndarray = field(default_factory=lambda: np.zeros((1, 0), np.int64))
    snapshots: list[tuple[Snapshot, np.ndarray]] = field(default_factory=list[tuple[Snapshot, np.ndarray]])

    def check(self) -> None:
        """Position and states are those of `ids`."""
        assert self.session.position == self.ids.shape[1], (self.session.position, self.ids.shape)
        if self.ids.shape[1] == 0:
            return
        states = self.session.states.numpy()
        for name, want in reference(self.ids)[1].items():
            np.testing.assert_allclose(states[name], want, rtol=1e-5, atol=1e-5, err_msg=name)


@functools.cache
def prepare() -> list[Program]:
    forms = [Hybrid(), Hybrid(batch=2), open_form(Hybrid())]
    return [Program.load(form.compile(), uri) for form in forms for uri in ("local-sync", "local-task")]


def _odd(rng: random.Random, batch: int, tokens: int) -> dict[str, Any]:
    """Inputs that are wrong in some way, or only look so."""
    ids = np.ones((batch, tokens), np.int64)
    values: list[Any] = [
        ids.astype(np.float32), ids.astype(np.int32), ids[0], ids[None], ids[:, :0], ids.tolist(), None, 5, "abc", b"x",
        ids.astype(object), np.array(["a"]), ids.astype(complex), np.ma.array(ids), [[1, 2], [3]], np.array(1), {}, [],
        np.ones((batch + 1, tokens), np.int64), np.ones((batch, 300), np.int64), ids[::-1], np.full((1, 1), 1 << 62),
        np.asfortranarray(np.ones((batch, tokens), np.int64)), np.broadcast_to(np.int64(1), (batch, tokens)),
    ]  # fmt: skip
    feeds: dict[str, Any] = {"input_ids": rng.choice([ids, rng.choice(values)])}
    for name in rng.sample(["attention_mask", "position_ids", "past.0.rec", "past.1.kv", "nope", ""], rng.randrange(3)):
        feeds[name] = rng.choice(values)
    if rng.random() < 0.1:
        del feeds["input_ids"]
    return feeds


def _step(rng: random.Random, twin: Twin) -> None:
    """One call, and what it must have changed."""
    session, batch = twin.session, twin.ids.shape[0]
    kind = rng.randrange(14)
    if kind < 5:
        tokens = rng.choice([0, 1, 1, 2, 3, 5, 9])
        new = np.array([rng.randrange(50) for _ in range(batch * tokens)], np.int64).reshape(batch, tokens)
        last = rng.random() < 0.3
        try:
            found = session.run({"input_ids": new}, logits="last" if last else "all")["logits"]
        except LinattnError:
            assert twin.ids.shape[1] + new.shape[1] > 24, "refused without a reason"
            return
        twin.ids = np.concatenate([twin.ids, new], 1)
        if new.shape[1]:
            want = reference(twin.ids)[0][:, -1:] if last else reference(twin.ids)[0][:, -new.shape[1] :]
            np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    elif kind == 5:
        before = session.position
        try:
            session.run(
                _odd(rng, batch, rng.choice([1, 2, 3])), logits=rng.choice(["all", "all", "last", "none", None])
            )
        except LinattnError:
            assert session.position == before
        else:  # it was right after all: which tokens went in is not known any more
            session.reset()
            twin.ids = twin.ids[:, :0]
    elif kind == 6:
        session.reset()
        twin.ids = twin.ids[:, :0]
    elif kind == 7:
        with suppress(LinattnError):
            session.states[rng.choice([*NAMES, "present.0.rec", "nope", ""])].numpy()
    elif kind == 8:
        with suppress(LinattnError):
            session.program.run(_odd(rng, batch, rng.choice([1, 3])))
    elif kind == 9:
        twin.snapshots.append((session.snapshot(), twin.ids))
    elif kind == 10 and twin.snapshots:
        snapshot, twin.ids = rng.choice(twin.snapshots)
        if rng.random() < 0.5:
            session.restore(snapshot)
        else:
            twin.session = session.program.session(snapshot, window=rng.choice([0, 1, 3]))
    elif kind == 11:
        other = session.fork()
        if rng.random() < 0.5:
            twin.session, other = other, session
        with suppress(LinattnError):  # the one that is gone goes on first
            other.run({"input_ids": np.ones((batch, 2), np.int64)})
    elif kind == 12:
        tokens = rng.randrange(4)
        try:
            session.rollback(tokens)
        except LinattnError:
            assert tokens
        else:
            twin.ids = twin.ids[:, : twin.ids.shape[1] - tokens]
    else:
        twin.check()


def _drive(rng: random.Random, twin: Twin, failures: list[BaseException]) -> None:
    try:
        for _ in range(rng.randrange(3, 12)):
            _step(rng, twin)
        twin.check()
    except BaseException as error:
        failures.append(error)


def case(rng: random.Random, folder: Path) -> str:
    """Some sessions of one program, one after the other or in threads."""
    del folder
    program = rng.choice(prepare())
    batch = program.manifest.batch or rng.choice([1, 3])
    twins = [
        Twin(program.session(batch=batch, window=rng.choice([0, 2])), np.zeros((batch, 0), int))
        for _ in range(rng.choice([1, 1, 2, 4]))
    ]
    failures: list[BaseException] = []
    seeds = [random.Random(rng.random()) for _ in twins]
    if rng.random() < 0.5:
        for seed, twin in zip(seeds, twins, strict=True):
            _drive(seed, twin, failures)
    else:
        threads = [threading.Thread(target=_drive, args=(s, t, failures)) for s, t in zip(seeds, twins, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise AssertionError("a session went wrong") from failures[0]
    return "sessions"
