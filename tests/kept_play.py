"""Anything that is done with states, in any order, on a program and on one beside it that keeps no memory.

Both do the same calls, so logits, tokens and states are equal to the bit. The other one's states are new memory full of
zeros each time; what the first one has may come from others.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.runtime import LinattnError, Program, Sampling, Session, Snapshot, StateError, TargetError, generate
from linattn.runtime.device import Device
from linattn.runtime.engine import engine_of
from linattn.runtime.module import Module
from linattn.runtime.pool import ALL, Memory, Pool

_MOST = 4

Pair = tuple[Session, Session]


class NewMemory(Pool):
    """Keeps nothing, and gives zeros without saying so."""

    def __init__(self, device: Device) -> None:
        super().__init__(device, keeps=False)

    def take(self, shapes: Any) -> tuple[Memory, int]:
        return Memory(self, [self.device.zeros(shape, dtype) for shape, dtype in shapes]), ALL


class Play:
    """A game of its own for each seed.

    Args:
        program: The one that keeps memory.
        other: The one beside it, of the same module.
        ids: Tokens, [B, T].
        folder: For files.
        seed: Of the game.
    """

    def __init__(self, program: Program, other: Program, ids: np.ndarray, folder: Path, seed: int) -> None:
        self.program, self.other = program, other
        self._ids, self._folder, self._random = ids, folder, random.Random(seed)
        engine_of(other).pool = NewMemory(other.device)
        self.sessions: list[Pair] = []
        self.snapshots: list[tuple[Snapshot, Snapshot]] = []
        self.log: list[str] = []
        self.taken = 0
        self._limit = program.manifest.token_limit or 256
        take = engine_of(program).pool.take

        def counted(shapes: Any) -> tuple[Memory, int]:
            before = engine_of(program).pool.nbytes
            found = take(shapes)
            self.taken += before > engine_of(program).pool.nbytes
            return found

        engine_of(program).pool.take = counted  # type: ignore[method-assign]
        self._moves: list[Callable[[], None]] = [
            *[self._run] * 6,
            *[self._fork] * 3,
            *[self._end] * 3,
            *[self._generate] * 2,
            *[self._fail] * 2,
            *(self._new, self._snapshot, self._restore, self._go_on, self._forget, self._rollback, self._save),
            *(self._rows, self._set, self._reset, self._cancel, self._collect),
        ]

    def turn(self) -> None:
        """One thing more."""
        if not self.sessions:
            self._new()
        move = self._random.choice(self._moves)
        self.log.append(move.__name__)
        move()

    def check(self) -> None:
        """All states are equal, and what goes on from all sessions and snapshots."""
        for pair in self.sessions:
            self._compare(pair)
        for pair in self.snapshots:
            one = self.program.session(pair[0]), self.other.session(pair[1])
            self._compare(one)
            self._same(one, lambda session: session.run({"input_ids": self._ids[:, :1]})["logits"])

    def _compare(self, pair: Pair) -> None:
        assert pair[0].position == pair[1].position, self.log[-10:]
        if pair[0].batch is None:
            return
        one, other = (session.states.numpy() for session in pair)
        for name, state in one.items():
            np.testing.assert_array_equal(state, other[name], err_msg=f"{name} after {self.log[-10:]}")

    def _same(self, pair: Pair, call: Callable[[Session], Any]) -> None:
        """A call of both, whose answers or errors are equal."""
        found = []
        for session in pair:
            try:
                found.append(np.asarray(call(session)))
            except LinattnError as error:
                found.append(np.array([type(error).__name__]))
        np.testing.assert_array_equal(found[0], found[1], err_msg=str(self.log[-10:]))

    def _pick(self) -> Pair:
        return self._random.choice(self.sessions)

    def _room(self, pair: Pair) -> int:
        return self._limit - pair[0].position

    def _some(self, pair: Pair) -> np.ndarray:
        count = self._random.choice([1, 1, 1, 2, 3, 8, 9, 17, 40])
        count = max(min(count, self._room(pair)), 1)
        start = self._random.randrange(self._ids.shape[1] - count + 1)
        return self._ids[:, start : start + count]

    def _new(self) -> None:
        if len(self.sessions) < _MOST:
            window = self._random.choice([0, 0, 2])
            self.sessions.append((self.program.session(window=window), self.other.session(window=window)))

    def _run(self) -> None:
        pair = self._pick()
        ids, logits = self._some(pair), self._random.choice(["all", "last"])
        self._same(pair, lambda session: session.run({"input_ids": ids}, logits)["logits"])

    def _fork(self) -> None:
        if len(self.sessions) < _MOST:
            first, second = self._pick()
            self.sessions.append((first.fork(), second.fork()))
            self._run()

    def _end(self) -> None:
        self.sessions.remove(self._pick())

    def _collect(self) -> None:
        gc.collect()

    def _snapshot(self) -> None:
        first, second = self._pick()
        self.snapshots = [*self.snapshots, (first.snapshot(), second.snapshot())][-_MOST:]

    def _forget(self) -> None:
        self.snapshots = self.snapshots[1:]

    def _restore(self) -> None:
        if self.snapshots:
            pair, snapshots = self._pick(), self._random.choice(self.snapshots)
            for session, snapshot in zip(pair, snapshots, strict=True):
                session.restore(snapshot)
            self._compare(pair)

    def _go_on(self) -> None:
        if self.snapshots and len(self.sessions) < _MOST:
            first, second = self._random.choice(self.snapshots)
            self.sessions.append((self.program.session(first), self.other.session(second)))

    def _rollback(self) -> None:
        pair, tokens = self._pick(), self._random.choice([0, 1, 1, 2, 8])
        self._same(pair, lambda session: session.rollback(tokens) or 0)
        self._compare(pair)

    def _save(self) -> None:
        pair = self._pick()
        paths = [self._folder / f"{i}.state" for i in range(2)]
        for session, path in zip(pair, paths, strict=True):
            session.save(path)
        self.sessions.remove(pair)
        self.sessions.append((Session.load(self.program, paths[0]), Session.load(self.other, paths[1])))
        self._compare(self.sessions[-1])

    def _rows(self) -> None:
        pair = self._pick()
        rows = [self._random.randrange(pair[0].batch or 1) for _ in range(pair[0].batch or 1)]
        self._same(pair, lambda session: session.rows(rows) or 0)
        self._compare(pair)

    def _set(self) -> None:
        first, second = self._pick()
        spec = self._random.choice(self.program.states)
        if self._random.random() < 0.5:
            self._same((first, second), lambda session: session.reset_state(spec.name) or 0)
        else:
            value = first.states[spec.name].numpy() * np.float32(0.5)
            self._same((first, second), lambda session: session.set_state(spec.name, value) or 0)

    def _reset(self) -> None:
        pair = self._pick()
        self._same(pair, lambda session: session.reset() or 0)
        self._compare(pair)

    def _generate(self) -> None:
        """Some tokens, to the end or closed before."""
        pair = self._pick()
        count = min(self._random.choice([1, 5, 30]), self._room(pair) - 1)
        taken = self._random.choice([count, count // 2, 1])
        how = self._random.choice([Sampling(0.0), Sampling(0.9, seed=3)])
        first = self._ids[:1, :1]

        def some(session: Session) -> list[int]:
            stream = generate(session, first, count, sampling=how)
            found = [int(np.asarray(token).item()) for token, _ in zip(stream, range(taken), strict=False)]
            stream.close()
            return found

        if count > 0 and (pair[0].batch or 1) == 1:
            self._same(pair, some)

    def _fail(self) -> None:
        """A call that fails before or after the device did it."""
        pair, ids, when = self._pick(), self._some(self._pick()), self._random.choice(["before", "after"])
        error = self._random.choice([TargetError("injected"), KeyboardInterrupt()])
        owner, name = self._random.choice([(Module, "_invoke"), (Device, "move"), (Pool, "take_like")])
        for session in pair:
            right = getattr(owner, name)

            def broken(*args: Any, right: Any = right) -> Any:
                if when == "after":
                    right(*args)
                raise error

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(owner, name, broken)
                with suppress(TargetError, StateError, KeyboardInterrupt):
                    session.run({"input_ids": ids})
            error.__traceback__ = None
        if pair[0].position != pair[1].position:  # only one of them had something to take or to move
            self.sessions.remove(pair)
        else:
            self._compare(pair)

    def _cancel(self) -> None:
        """Before the second block of a call."""
        pair, ids = self._pick(), self._ids[:, :17]
        right = Module.call

        def cancelling(*args: Any, **options: Any) -> Any:
            session.cancel()
            return right(*args, **options)

        for session in pair:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Module, "call", cancelling)
                with suppress(StateError, TargetError):
                    session.run({"input_ids": ids})
        self._compare(pair)
