"""Program: a compiled module with its weights on a device, shared by any number of sessions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from numpy.typing import ArrayLike

from . import binding
from .arrays import as_array
from .batch import Batch, read_prompts
from .binding import Sizes
from .choice import Choice
from .collect import Collector, find_wanted, kept
from .cpu import chosen_level
from .device import Device
from .engine import Engine
from .errors import require, require_whole
from .feeds import block_inputs, check_room, complete_inputs, take_inputs
from .loading import load
from .manifest import InputSpec, Manifest, OutputSpec, StateSpec
from .module import Module
from .owned import Owned
from .session import Session
from .snapshot import Snapshot
from .state import read_state, state_shape, upload_state
from .usage import MemoryUse


class Program(Owned):
    """A loaded model; immutable, so threads may share it (calls are let in one at a time).

    Get it from `Program.load`. Its memory is freed when nobody holds it or a session of it any more, or by `close`,
    which the end of a `with` block calls.
    """

    _copy_hint = "threads may share it; another process must load it again"

    def __init__(self, module: Module, manifest: Manifest, choice: Choice | None = None) -> None:
        self._engine = Engine(module, manifest)
        self._choice = choice

    @staticmethod
    def load(
        source: str | os.PathLike[str] | bytes,
        device: str | None = None,
        parameters: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        verify: bool = False,
    ) -> Program:
        """Loads a compiled model onto a device.

        A `.vmfb` is code that runs with the rights of this process: load only what you trust.

        Args:
            source: Path of the `.vmfb` (memory-mapped: leave the file alone while it is loaded), its bytes, or the
                folder of a bundle, of which the module for the best device is taken: CUDA, then Vulkan on hardware,
                then the CPU; `choice` says which and why, and a warning tells of a better one that failed to load.
            device: `cpu`, `cuda`, `vulkan` or an IREE device URI; None: what the model was compiled for. On `cpu` the
                calling thread runs by itself what is too small for workers; `local-task` has them do all, `local-sync`
                nothing.
            parameters: The `.irpa` file with the weights; None: the file that the manifest names, beside the `.vmfb`.
            threads: CPU worker threads, shared by all programs of the process: the first to be loaded on the CPU
                decides. None: one for each physical core. A bundle that runs on a GPU does not need them.
            verify: Read and check every byte of the weights too. Sizes, code and tables are always checked.

        Raises:
            TargetError: No such file or device, not a linattn module, a damaged one, compiled for something else,
                weights missing or another model's.
            InputError: `threads` for a device without worker threads, or another number than that of the process.
        """
        require(source, (str, os.PathLike, bytes, bytearray, memoryview), "source", "a path, or a module's bytes")
        require(parameters, (str, os.PathLike, type(None)), "parameters", "a path")
        if threads is not None:
            require_whole(threads, "threads")
        require(device, (str, type(None)), "device", "a name, such as 'cpu' or 'cuda'")
        loaded = load(source, device, parameters, threads, verify)
        return Program(loaded.module, loaded.manifest, loaded.choice)

    def __repr__(self) -> str:
        """Model, device and entry points, as in `<Program tiny on local-task: decode, prefill_64>`."""
        m = self._engine.manifest
        return f"<Program {m.model_name} on {self.device.uri}: {', '.join(entry.symbol for entry in m.entry_points)}>"

    def close(self) -> None:
        """Frees the code, the weights and the states of all sessions and snapshots, once the call under way has ended.

        Every later call of the program or of a session of it raises a StateError; closing twice is fine. In a child
        process that was forked it frees nothing: the memory is the parent's.
        """
        self._engine.close()

    def __enter__(self) -> Self:
        """The program, to be closed at the end of the block."""
        self._engine.check_usable()
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes it."""
        self.close()

    @property
    def manifest(self) -> Manifest:
        """What the module says about itself."""
        return self._engine.manifest

    @property
    def file(self) -> Path | None:
        """The `.vmfb` it was loaded from (one of a bundle's, if it was a bundle); None if from bytes."""
        return self._engine.module.file

    @property
    def cpu_level(self) -> str | None:
        """Which code of a portable CPU module (`linattn-compile --cpu-features portable`) runs here, else None."""
        return chosen_level(self._engine.manifest.target)

    @property
    def device(self) -> Device:
        """Where it runs."""
        return self._engine.module.device

    @property
    def choice(self) -> Choice | None:
        """What was taken from a bundle, and why not the rest; None for a single module."""
        return self._choice

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The graph inputs that are not states."""
        return self._engine.manifest.inputs

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """The graph outputs that are not states."""
        return self._engine.manifest.outputs

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """The states, each a graph input and the graph output that replaces it."""
        return self._engine.manifest.states

    def memory(self) -> MemoryUse:
        """What the program and its sessions take now: files, weights, workspace and states, in bytes."""
        return self._engine.memory()

    def trim(self) -> None:
        """Frees the memory of sessions and snapshots that are gone, which is kept for the next ones.

        At most 512 MiB of a program are, none after `close`, and none where the device has no other left.
        """
        self._engine.check_usable()
        self._engine.device.enter()
        self._engine.pool.trim()

    def session(
        self,
        snapshot: Snapshot | None = None,
        *,
        batch: int | None = None,
        window: int = 0,
        guard: Literal["nan"] | None = None,
    ) -> Session:
        """Starts a sequence (or a batch of them) with states of its own: an empty one, or where a snapshot was taken.

        Args:
            snapshot: Where to go on from; None: an empty sequence.
            batch: B for a model with an open batch; None: the snapshot or the first call decides.
            window: How many calls `Session.rollback` can take back; each keeps the recurrent and conv states before it.
            guard: `nan`: a call whose states are not finite is not committed, and refused; every call reads its states.

        Raises:
            InputError: A batch that the model does not have, a negative window, or an unknown guard.
            StateError: The snapshot is of another program or another batch.
        """
        return Session(self, batch, window, snapshot, guard)

    def batch(self, prompts: Sequence[ArrayLike]) -> Batch:
        """Reads prompts of different lengths and puts them into one batch, which goes on together.

        Each row is as if it were alone: `session, logits = program.batch([[1, 2, 3], [4, 5]])`, then
        `session.run({"input_ids": [[6], [7]]})` and so on. Shorter rows stand at the end of the columns, behind masked
        ones; `session.position` counts the columns. With an open batch each prompt is read by itself; with a fixed one
        all are, as long as the longest.

        Args:
            prompts: Token ids of each row, at least one token.

        Raises:
            InputError: No prompt, an empty one, or another number than the fixed batch.
            StateError: Different lengths in a model whose attention goes by the number of tokens and not by the mask
                (GroupQueryAttention), or more tokens than fit.
            TargetError: A call failed on the device.
        """
        return read_prompts(self, prompts)

    def run(
        self, inputs: Mapping[str, Any], *, outputs: Sequence[str] | None = None, device_outputs: bool = False
    ) -> dict[str, Any]:
        """Runs the graph once, without a session: everything in and out by ONNX name and in ONNX shape.

        States that are left out are zeros (a KV cache: no rows); so is the past that an `attention_mask` and
        `position_ids` are filled for when they are left out. The arrays given are never changed.

        Args:
            inputs: Graph inputs by name, states included (KV caches with P rows, P at most the capacity): what
                `Session.run` takes.
            outputs: Names of those that are wanted; None: all.
            device_outputs: They stay on the device, as `DeviceTensor`s.

        Returns:
            The graph outputs by name, present states included (KV caches with P+T rows).

        Raises:
            InputError: A wrong name, dtype or shape, an index outside the model's tables, a mask with zeros for a
                model with recurrent or conv states, or no entry point for this number of tokens.
            StateError: P+T is more than the capacity.
            TargetError: The call failed on the device.
        """
        self._engine.check_usable()
        m = self._engine.manifest
        optional = {spec.name for spec in m.inputs if spec.role in ("attention_mask", "position_ids")}
        required = [spec.name for spec in m.inputs if spec.name not in optional]
        binding.check_names(inputs, [spec.name for spec in (*m.inputs, *m.states)], required)
        available = [*(spec.name for spec in m.outputs), *(spec.output for spec in m.states)]
        wanted = find_wanted(available, outputs, stays=device_outputs)
        specs = (*m.inputs, *m.states)
        arrays, placed = take_inputs(m, self.device, inputs)
        arrays |= {spec.name: as_array(spec, inputs[spec.name]) for spec in m.states if spec.name in inputs}

        sizes = Sizes(m)
        for spec in sorted(specs, key=lambda spec: isinstance(spec, InputSpec) and spec.role == "attention_mask"):
            has_cache = any(state.kind == "kv_cache" for state in m.states)
            if isinstance(spec, InputSpec) and spec.role == "attention_mask" and has_cache:
                past = sizes.set_default("past", 0)
                sizes.set_default("total", past + binding.count_tokens(m, sizes, arrays))
            if spec.name in arrays:
                sizes.bind(spec.name, spec.shape, arrays[spec.name])
        past = sizes.set_default("past", 0)
        batch = sizes.set_default("batch", 1)
        tokens = sizes.set_default("tokens", binding.count_tokens(m, sizes, arrays))
        entry = binding.pick_entry(m, tokens)
        check_room(m, past, tokens)

        feeds = complete_inputs(m, arrays, sizes, batch, past, tokens)
        for spec in m.inputs:
            if spec.role == "attention_mask":
                binding.refuse_padding(m, spec, feeds[spec.name])
        binding.check_indices(m, feeds)
        states = [
            upload_state(m, self.device, spec, arrays[spec.name])
            if spec.name in arrays
            else self.device.zeros(state_shape(m, spec, batch, m.max_context or 0), spec.dtype)
            for spec in m.states
        ]
        block = block_inputs(m, feeds, past, 0, tokens)
        collector = Collector(m, self.device, wanted, tokens)
        with self._engine.exclusive():
            given = [placed.get(spec.name, array) for spec, array in zip(m.inputs, block, strict=True)]
            found, states = self._engine.call(entry, given, states, past)
            collector.take(found, tokens)
        results = collector.results()
        for spec, state in zip(m.states, states, strict=True):
            if spec.output not in wanted.names:
                continue
            axis = spec.length_axis if m.max_context is not None else None
            if device_outputs:
                results[spec.output] = kept(self.device, state, axis, past + tokens)
            else:
                results[spec.output] = read_state(m, self.device, spec, state, past + tokens)
        return results
