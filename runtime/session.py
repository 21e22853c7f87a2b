"""Session: one sequence (or one batch of them) with its states on the device."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from . import held
from .ahead import Ahead, Series
from .arrays import as_array
from .calling import Calling
from .collect import find_wanted
from .device import DeviceArray, HostArray
from .engine import engine_of
from .errors import InputError, StateError, require, require_list, require_whole
from .lane import Lane
from .manifest import StateSpec
from .saved import load_states, save_states
from .snapshot import Snapshot
from .state import read_state, state_shape, upload_state
from .views import StateViews, find_state

if TYPE_CHECKING:
    from .program import Program

_Chosen = TypeVar("_Chosen")


class Session(Calling):
    """The states of one sequence, or of B rows of equal length.

    A call commits every state or none: when `run` raises, position and states are as they were. A session is for one
    thread at a time; sessions of one program may run in different threads.

    Get it from `Program.session`.
    """

    _copy_hint = "fork() goes on from here a second time, save() takes it to another process"

    def __init__(
        self,
        program: Program,
        batch: int | None = None,
        window: int = 0,
        snapshot: Snapshot | None = None,
        guard: Literal["nan"] | None = None,
    ) -> None:
        engine = engine_of(program)
        engine.check_usable()
        manifest = engine.manifest
        require_whole(window, "window")
        if batch is not None:
            require_whole(batch, "batch")
        if batch is not None and manifest.batch is not None and batch != manifest.batch:
            hint = "compile with --batch open for any"
            raise InputError("wrong batch", where="batch", got=batch, expected=manifest.batch, hint=hint)
        if batch is not None and batch < 1:
            raise InputError("wrong batch", where="batch", got=batch, expected="at least 1")
        if guard not in (None, "nan"):
            raise InputError("unknown choice", where="guard", got=repr(guard), expected="'nan' | None")
        if window < 0:
            raise InputError("wrong window", where="window", got=window, expected="a number of calls")
        self._program = program
        self._engine = engine
        self._manifest = manifest
        self._fixed_batch = batch if batch is not None else manifest.batch
        self._window = window
        self._guard: Literal["nan"] | None = guard
        self._takes_results = engine.takes_results
        self._free: list[None] = [None]  # empty while a thread is inside; taking it out is one operation
        # What is held now, last; before it what rollback goes back to.
        self._line = [self._empty() if snapshot is None else self._held_by(snapshot)]
        self._ahead: Ahead | None = None
        self._series: Series | None = None
        self._lane: Lane | None = None
        self._plain = engine.plain
        self._cancelled = False
        self._submitted: Future[dict[str, Any]] | None = None
        self._spare: list[list[DeviceArray]] = []  # memory of moving states that nobody needs any more
        engine.adopt(self, Session._release, Session._all_arrays)

    def __repr__(self) -> str:
        """Model, device and what it holds, as in `<Session of tiny on local-task: position 5, batch 1>`."""
        rows = "batch open" if self.batch is None else f"batch {self.batch}"
        name, uri = self._manifest.model_name, self._engine.device.uri
        return f"<Session of {name} on {uri}: position {self.position}, {rows}>"

    @property
    def program(self) -> Program:
        """The program it runs."""
        return self._program

    def reset(self) -> None:
        """Forgets everything: zero states (KV caches too, since 0 * NaN is NaN), position 0, nothing to roll back to.

        A batch size that a call or a snapshot had decided is forgotten too.
        """
        with self._exclusive(forget=True):
            self._replace([self._line[-1]])
            self._line = [held.nothing(self._engine.pool)]  # their memory goes to the pool, from where it comes again
            self._line = [self._empty()]

    def snapshot(self) -> Snapshot:
        """What the session holds now, as a value: nothing that it does later changes it.

        Costs no copy. The memory of its recurrent and conv states is not used again as long as it lives; rows of KV
        caches are copied when a second one goes on from it (`Session.restore`).
        """
        with self._exclusive():
            now = self._line[-1]
            now.shared = True
            return Snapshot(self._engine, now.again())

    def restore(self, snapshot: Snapshot) -> None:
        """Goes on from a snapshot; what the session held is gone, and so is what `rollback` went back to.

        Raises:
            StateError: The snapshot is of another program, even of the same model.
        """
        with self._exclusive():
            self._replace([self._held_by(snapshot)])

    def fork(self) -> Session:
        """A second session that goes on from here; the two share memory until they write."""
        return self._program.session(self.snapshot(), window=self._window, guard=self._guard)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes states, position and mask to a file (safetensors), whole or not at all; see `load`.

        Raises:
            StateError: The batch is open and nothing has run.
            InputError: There is no such folder, or something that may not be replaced.
            LinattnError: The package safetensors is missing, or the file cannot be written.
        """
        with self._exclusive():
            require(path, (str, os.PathLike), "path", "a path")
            save_states(Path(path), self._manifest, self._engine.device, self._started())

    @staticmethod
    def load(
        program: Program, path: str | os.PathLike[str], *, window: int = 0, guard: Literal["nan"] | None = None
    ) -> Session:
        """Goes on where a session was saved, with the same model on this or any other target.

        Args:
            program: Its graph and weights must be those of the session that was saved; its target, the capacity of its
                KV caches and the sizes of its blocks may be others.
            path: What `save` wrote. It is checked before anything in it is used, and holds no code.
            window: As of `Program.session`.
            guard: As of `Program.session`.

        Raises:
            StateError: No such file, another model's, more tokens than fit, or a damaged file.
            LinattnError: The package safetensors is missing.
        """
        engine = engine_of(program)
        require(path, (str, os.PathLike), "path", "a path")
        engine.check_usable()
        loaded = load_states(Path(path), engine.manifest, engine.pool)
        return program.session(Snapshot(engine, loaded), window=window, guard=guard)

    def rollback(self, tokens: int) -> None:
        """Takes back the last tokens: afterwards it is as if they had never been there.

        Goes back to the start of one of the last calls (as many as the session's `window`), or anywhere where the model
        has KV caches only.

        Args:
            tokens: How many, 0 or more.

        Raises:
            StateError: The states at that position are not kept; the message says which are.
        """
        with self._exclusive():
            require_whole(tokens, "tokens")
            line, position = self._line, self._line[-1].position - tokens
            kept = [one.position for one in line]
            if position in kept:
                self._replace(line[: len(line) - kept[::-1].index(position)])
            elif 0 <= position < kept[-1] and all(spec.in_place for spec in self._manifest.states):
                before = [one for one in line if one.position < position]
                self._replace([*before, line[-1].first(self._manifest, position)])
            else:
                steps = ", ".join(str(kept[-1] - other) for other in sorted(set(kept[:-1]), reverse=True))
                hint = "program.session(window=N) keeps the states before each of the last N calls"
                expected = f"{steps} tokens" if steps else "nothing to be taken back"
                raise StateError("cannot roll back", got=f"{tokens} tokens", expected=expected, hint=hint)

    def run(
        self,
        inputs: Mapping[str, Any],
        logits: Literal["all", "last"] = "all",
        *,
        outputs: Sequence[str] | None = None,
        device_outputs: bool = False,
        into: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Appends T tokens and returns the outputs; the tokens are cut into the blocks that the module has.

        Args:
            inputs: Graph inputs by ONNX name: token ids [B, T] (any T; 0 returns empty outputs; of one row also [T]),
                other inputs of the graph: numpy arrays, numbers, what speaks DLPack, `DeviceTensor`. `attention_mask`
                ([B, P+T], or [B, T] for the new tokens alone) and `position_ids` may be left out. States may not be
                passed: the session has them.
            logits: `last` returns the last position's logits only ([B, 1, vocabulary]); the rest stays on the device.
            outputs: Names of those that are wanted; None: all.
            device_outputs: They stay on the device, as `DeviceTensor`s.
            into: Memory for some of them, of their dtype and shape: numpy arrays or `DeviceTensor`s, also CUDA arrays
                that speak DLPack. What it holds after an error is undefined.

        Returns:
            The outputs by ONNX name, joined along their token axis: arrays on the host, or what was asked for. The
            states are not among them (see `states`).

        Raises:
            InputError: A wrong name, dtype or shape, an index outside the model's tables, a mask with zeros for a
                model with recurrent or conv states, or no blocks for this number of tokens.
            StateError: The context is full (nothing has run), a guard refuses the states, or another thread is inside.
            TargetError: The call failed on the device.
        """
        is_plain = outputs is None and into is None and not device_outputs and logits in ("all", "last")
        if is_plain:  # a step pays for it
            if (lane := self._lane) is not None and (found := lane.run(inputs)) is not None:
                return found
            if self._line[-1].batch == 1 and (step := self._engine.step(1)) is not None:
                token = step.token_of(inputs)
                found = None if token is None else self._append(step, token, step.read_all, opens=True)
                if found is None and token is not None and (lane := self._lane) is not None:
                    found = lane.run(inputs)
                if found is not None:
                    return found
            wanted = self._plain[logits]
        else:
            names = [spec.name for spec in self._manifest.outputs]
            wanted = find_wanted(names, outputs, logits, device_outputs, into)
        with self._exclusive():
            return self._run(inputs, wanted)

    def submit(
        self, inputs: Mapping[str, Any], logits: Literal["all", "last"] = "all", *, outputs: Sequence[str] | None = None
    ) -> Future[dict[str, Any]]:
        """`run` in a thread of the program's: comes back at once (`await asyncio.wrap_future(...)` waits for it).

        What is submitted for one session runs in that order; sessions take turns, a block each. The inputs must stay
        as they are until it is done. `Future.cancel` takes back what has not begun, `cancel` what has.

        Args:
            inputs: As of `run`.
            logits: Likewise.
            outputs: Likewise.

        Returns:
            The outputs; or what `run` raises, a StateError too where a call failed that it was waiting for.
        """
        names = [spec.name for spec in self._manifest.outputs]
        wanted = find_wanted(names, outputs, logits, False, None)
        before, turns = self._submitted, self._engine.turns
        before = None if before is None or before.done() else before

        def call() -> dict[str, Any]:
            if before is not None:
                wait([before])
                if before.cancelled() or before.exception() is not None:
                    raise StateError("a call that was submitted before it has failed", hint="see that one's error")
            with turns, self._exclusive():
                return self._run(inputs, wanted, turns.pause)

        self._engine.check_usable()
        self._submitted = self._engine.workers.submit(call)
        return self._submitted

    def cancel(self) -> None:
        """Ends the call that another thread has under way, before its next block; the session is as before that call.

        That call raises a StateError. Where nothing is under way, nothing happens.
        """
        self._cancelled = not self._free

    def rows(self, indices: Sequence[int]) -> None:
        """Makes these rows the batch: some dropped, some several times, in any order, copied on the device.

        What `rollback` went back to is gone.

        Args:
            indices: Which rows, from 0 on, at least one; as many as B where the module has a fixed batch.

        Raises:
            InputError: There is no such row, or another number of rows than the module has.
            StateError: The batch is open and nothing has run.
        """
        with self._exclusive():
            now = self._started()
            rows = self._check_rows(indices)
            if not rows or self._manifest.batch not in (None, len(rows)):
                expected = self._manifest.batch or "at least one row"
                raise InputError("wrong number of rows", where="indices", got=len(rows), expected=expected)
            self._gather([(now, row) for row in rows])

    def reset_rows(self, indices: Sequence[int]) -> None:
        """Starts these rows anew, beside others that go on; what `rollback` went back to is gone.

        Args:
            indices: Which rows, from 0 on.

        Raises:
            InputError: There is no such row.
            StateError: The model's rows must be of one length (see `Program.batch`), or nothing has run.
        """
        with self._exclusive():
            now = self._started()
            rows = self._check_rows(indices)
            self._gather([None if row in rows else (now, row) for row in range(now.batch or 0)])

    @property
    def states(self) -> StateViews:
        """The states by name: `states["past.0.recurrent"].numpy()` is a copy of one, `states.numpy()` of all."""
        return StateViews(self, self._read)

    def _read(self, spec: StateSpec) -> HostArray:
        """A copy of one state on the host, in ONNX form; see `StateView.numpy`."""
        with self._exclusive():
            now = self._started()
            array = now.arrays(self._manifest)[self._manifest.states.index(spec)]
            return read_state(self._manifest, self._engine.device, spec, array, now.position)

    def set_state(self, name: str, value: Any) -> None:
        """Replaces one state; snapshots and what `rollback` goes back to keep theirs.

        Args:
            name: Name of the past input or of the present output.
            value: In ONNX form, of exactly the state's dtype and shape (a KV cache has `position` rows): a numpy array,
                numbers, or an array on the CPU that speaks DLPack. It is copied.

        Raises:
            StateError: No such state, or an open batch before the first call.
            InputError: Another dtype or shape.
        """
        with self._exclusive():
            m, now, spec = self._manifest, self._started(), find_state(self._manifest, name)
            array = as_array(spec, value)
            shape = state_shape(m, spec, now.batch or 1, now.position)
            if array.shape != shape:
                raise InputError("wrong shape", where=spec.name, got=list(array.shape), expected=list(shape))
            self._put(now, spec, upload_state(m, self._engine.device, spec, array))

    def reset_state(self, name: str) -> None:
        """Makes one state zeros again, for all rows; position and the other states stay.

        Raises:
            StateError: No such state, or an open batch before the first call.
        """
        with self._exclusive():
            m, now, spec = self._manifest, self._started(), find_state(self._manifest, name)
            shape = state_shape(m, spec, now.batch or 1, m.max_context or now.position)
            self._put(now, spec, self._engine.device.zeros(shape, spec.dtype))

    def _check_rows(self, indices: Sequence[int]) -> list[int]:
        require_list(indices, "indices", "a list of rows")
        for row in indices:
            require_whole(row, "indices")
        rows, batch = [operator.index(row) for row in indices], self.batch or 0
        wrong = [row for row in rows if not 0 <= row < batch]
        if wrong:
            raise InputError("no such row", where="indices", got=wrong[0], expected=f"0 to {batch - 1}")
        return rows
