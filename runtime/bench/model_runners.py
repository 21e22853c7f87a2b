"""What runs in a subject's process for whole models: one prompt, then greedy steps, the states kept where they are."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from linattn.runtime.binding import Sizes
from linattn.runtime.device import HostArray, numpy_dtype
from linattn.runtime.drivers import has_worker_threads
from linattn.runtime.engine import engine_of
from linattn.runtime.errors import InputError
from linattn.runtime.feeds import block_inputs, complete_inputs
from linattn.runtime.generation.feeding import token_input
from linattn.runtime.generation.loop import generate
from linattn.runtime.generation.sampling import index_of_largest
from linattn.runtime.held import zeros
from linattn.runtime.loading import read_manifest
from linattn.runtime.manifest import EntryPoint, Manifest, OutputSpec
from linattn.runtime.module import Module
from linattn.runtime.program import Program
from linattn.runtime.state import state_shape

from .device_times import cuda_kernels
from .lazy import need
from .load import Watch
from .machine import core_count, resident_bytes
from .op_runners import open_ort, view_ort

_PROMPTS, _SHORT = 5, 0.05
"""A prompt is timed so often in a turn, while that takes no longer: the first one finds the caches of the host as the
others' turns have left them, which is half of what a GPU takes for 512 tokens."""


class ModelRunner:
    """A subject: `reset`, then `step` for the prompt and each token."""

    load_s = 0.0

    def __init__(self) -> None:
        self._watches: dict[int, Watch] = {}

    def reset(self) -> None:
        """Starts a fresh sequence."""
        raise NotImplementedError

    def step(self, ids: HostArray) -> HostArray:
        """Appends ids [1, T]; returns the last position's logits, [V]."""
        raise NotImplementedError

    def beyond(self) -> float | None:
        """Seconds that the last step took beyond the module's calls and waiting for the device; None: not known."""
        return None

    def bare(self, count: int) -> list[float]:
        """The same of as many calls of the last step in a loop of nothing else; none if that is not known."""
        return []

    def describe(self) -> dict[str, Any]:
        """Load time in seconds, and the memory of the process after loading."""
        return {"load_s": self.load_s, "memory_bytes": resident_bytes()}

    def check(self, prompt: Sequence[int], forced: Sequence[int]) -> HostArray:
        """Logits after the prompt and after each of some given tokens, [1 + n, V] in f32; a warm-up besides."""
        self.reset()
        rows = [self.step(np.array([prompt]))] + [self.step(np.array([[token]])) for token in forced]
        return np.stack(rows).astype(np.float32)

    def repeat(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        """One timed prompt and greedy generation.

        Args:
            prompt: Token ids.
            count: Steps after the prompt, of one token each.

        Returns:
            `prefill_s` (until the first token is known; of a short prompt the median of several times), `steps_s` (each
            until the next is known), `overheads_s` (of each what it took beyond the call itself, if that is known),
            `bare_s` (the same of a loop of nothing but the call), `generated_s` (the same of each token of `generate`,
            a call's tokens alike), the `tokens` (1 + count of them), and the memory of the process.
        """
        with self._watches.setdefault(len(prompt), Watch()).watching():
            found = self._repeat(prompt, count)
            bare = self.bare(count)
            generated = self.generated(prompt, count)
        return found | {"bare_s": bare, "generated_s": generated, "memory_bytes": resident_bytes()}

    def generated(self, prompt: Sequence[int], count: int) -> list[float]:
        """Seconds of each token that generating some took beyond the calls themselves; none if that is not known."""
        return []

    def watched(self, length: int) -> dict[str, Any]:
        """What the CPU did during the timed turns with a prompt of a length."""
        return self._watches[length].summary()

    def margin(self, prompt: Sequence[int], tokens: Sequence[int], one: int, other: int) -> float:
        """How much likelier one token is than another one after a prompt and some tokens, in norms of the logits.

        Args:
            prompt: Token ids.
            tokens: What came after it.
            one: A token.
            other: Another one.

        Returns:
            The difference of their logits over the root mean square of all.
        """
        self.reset()
        logits = self.step(np.array([prompt])).astype(np.float64)
        for token in tokens:
            logits = self.step(np.array([[token]])).astype(np.float64)
        return float((logits[one] - logits[other]) / np.sqrt(np.mean(logits**2)))

    def _repeat(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        prompts, tokens = list[float](), list[int]()
        while not prompts or (len(prompts) < _PROMPTS and sum(prompts) < _SHORT):
            self.reset()
            start = time.perf_counter()
            tokens = [index_of_largest(self.step(np.array([prompt])))]
            prompts.append(time.perf_counter() - start)
        steps: list[float] = []
        overheads: list[float] = []
        for _ in range(count):
            start = time.perf_counter()
            logits = self.step(np.array([[tokens[-1]]]))
            tokens.append(index_of_largest(logits))
            steps.append(time.perf_counter() - start)
            if (beyond := self.beyond()) is not None:
                overheads.append(beyond)
        return {"prefill_s": statistics.median(prompts), "steps_s": steps, "overheads_s": overheads, "tokens": tokens}


class IreeModel(ModelRunner):
    """A module compiled by linattn.

    Args:
        module: Path of the `.vmfb`.
        device: Where to run it; None: where it was compiled for.
        threads: CPU worker threads; None: as IREE decides.
        all_logits: Whether a call gives the logits of all positions; else of the last one only.
    """

    def __init__(
        self, module: str, device: str | None = None, threads: int | None = None, *, all_logits: bool = False
    ) -> None:
        super().__init__()
        where = device or read_manifest(Module(Path(module))).target.device
        start = time.perf_counter()
        self._program = Program.load(module, device, threads=threads if has_worker_threads(where) else None)
        self.load_s = time.perf_counter() - start
        self._session = self._program.session(batch=1)
        self._name = token_input(self._session)
        self._wanted: Literal["all", "last"] = "all" if all_logits else "last"
        self._logits = logits_output(self._program.manifest).name
        self._dtype = next(spec.dtype for spec in self._program.inputs if spec.name == self._name)
        self._inside = self._beyond = 0.0
        self._time_calls()

    def _time_calls(self) -> None:
        """Adds up what the calls themselves take: of IREE's context on a CPU, on a GPU the wait for its queue too."""
        module = engine_of(self._program).module

        def timed(call: Callable[..., None]) -> Callable[..., None]:
            def run(*arguments: Any) -> None:
                start = time.perf_counter()
                call(*arguments)
                self._inside += time.perf_counter() - start

            return run

        parts = vars(module)
        if self._program.device.has_queue:
            parts["_invoke"] = timed(module._invoke)  # pyright: ignore[reportPrivateUsage]
            return
        for name in ("_context", "_alone"):
            if parts[name] is not None:
                parts[name] = SimpleNamespace(invoke=timed(parts[name].invoke))

    def beyond(self) -> float | None:
        """See `ModelRunner.beyond`."""
        return self._beyond

    def bare(self, count: int) -> list[float]:
        """See `ModelRunner.bare`: where arguments are packed. The states are as before, for a step is done again."""
        lane, found = self._session._lane, list[float]()  # pyright: ignore[reportPrivateUsage]
        call = None if lane is None else lane.last_call()
        for _ in range(count if call is not None else 0):
            assert call is not None
            start, inside = time.perf_counter(), self._inside
            call()
            found.append(time.perf_counter() - start - (self._inside - inside))
        return found

    def reset(self) -> None:
        """See `ModelRunner.reset`."""
        self._session.reset()

    def step(self, ids: HostArray) -> HostArray:
        """See `ModelRunner.step`."""
        feed, inside, start = {self._name: ids.astype(self._dtype)}, self._inside, time.perf_counter()
        found = self._session.run(feed, logits=self._wanted)
        self._beyond = time.perf_counter() - start - (self._inside - inside)
        return found[self._logits][0, -1]

    def generated(self, prompt: Sequence[int], count: int) -> list[float]:
        """See `ModelRunner.generated`: where the module chooses the tokens, and waits for each call."""
        if self._program.device.has_queue or engine_of(self._program).row_chooser(draws=False) is None:
            return []
        self.reset()
        found, since, tokens = list[float](), 0.0, 0
        inside = self._inside
        for _ in generate(self._session, prompt, count + 1):
            now = time.perf_counter()
            if self._inside != inside:  # the first token of a call
                found += [(now - since - (self._inside - inside)) / max(tokens, 1)] * tokens
                since, inside, tokens = now, self._inside, 0
            tokens += 1
        return found[1:]  # without the prompt's

    def kernels(self, symbol: str, position: int, calls: int) -> list[list[tuple[str, float]]]:
        """The kernels of calls of one entry point on a CUDA device, see `cuda_kernels`.

        Args:
            symbol: The entry point; of two that differ in the logits that they return the one with the last ones.
            position: Tokens committed.
            calls: How many calls, on `profiled_inputs` and states of zeros.
        """
        engine = engine_of(self._program)
        m = engine.manifest
        entry = next(entry for entry in m.entry_points if entry.symbol == symbol)
        inputs = profiled_inputs(m, entry, position)
        states, into = (zeros(m, engine.pool, m.batch or 1).arrays(m) for _ in range(2))

        def call() -> None:
            engine.call(entry, inputs, states, position, last=True, into=into)

        call()  # the first call of a process allocates
        return cuda_kernels(call, calls)


class OrtModel(ModelRunner):
    """The ONNX model in ONNX Runtime on the CPU; states go back in as they came out, without a copy.

    Args:
        model: Path of the ONNX model.
        manifest: What linattn found out about it (inputs, roles, states), as JSON.
        threads: Of one operator; None: as many as there are cores.
        exact: With products of int4 that do not round activations to int8, whatever the model allows.
    """

    def __init__(self, model: str, manifest: str, threads: int | None = None, *, exact: bool = False) -> None:
        super().__init__()
        self._ort = need("onnxruntime", "bench")
        self._manifest = Manifest.from_json(manifest)
        others = [spec.name for spec in self._manifest.inputs if spec.role == "other"]
        if others:
            raise InputError("does not know what to feed", where="onnxruntime", got=", ".join(others))
        if any(spec.dtype == "bfloat16" for spec in (*self._manifest.states, *self._manifest.outputs)):
            raise InputError("is not fed with bfloat16 states", where="onnxruntime")
        start = time.perf_counter()
        if exact:
            data, folder = _without_rounding(model), Path(model).parent
            self._session = open_ort(self._ort, data, threads or core_count(), folder)
        else:
            self._session = open_ort(self._ort, model, threads or core_count())
        self.load_s = time.perf_counter() - start
        self._tokens = next(spec for spec in self._manifest.inputs if spec.role == "tokens")
        self._logits = logits_output(self._manifest).name
        self._position = 0
        self._states: dict[str, Any] = {}
        self.reset()

    def reset(self) -> None:
        """See `ModelRunner.reset`."""
        m = self._manifest
        self._position = 0
        for spec in m.states:
            zeros = np.zeros(state_shape(m, spec, 1, 0), numpy_dtype(spec.dtype))
            self._states[spec.name] = self._ort.OrtValue.ortvalue_from_numpy(zeros)

    def step(self, ids: HostArray) -> HostArray:
        """See `ModelRunner.step`."""
        m, count = self._manifest, ids.shape[1]
        arrays: Mapping[str, HostArray] = {self._tokens.name: ids.astype(self._tokens.dtype)}
        sizes = Sizes(m, past=self._position, batch=1, tokens=count, total=self._position + count)
        binding = self._session.io_binding()
        for name, array in complete_inputs(m, arrays, sizes, 1, self._position, count).items():
            binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
        for spec in m.states:
            binding.bind_ortvalue_input(spec.name, self._states[spec.name])
        names = [self._logits, *(spec.output for spec in m.states)]
        for name in names:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        self._states = dict(zip((spec.name for spec in m.states), outputs[1:], strict=True))
        self._position += count
        return view_ort(outputs[0])[0, -1].copy()


def _without_rounding(model: str) -> bytes:
    """The graph with every MatMulNBits at accuracy_level 0; its weights stay where they are."""
    proto = need("onnx", "compile").load_model(model, load_external_data=False)
    for node in (node for nodes in (proto.graph, *proto.functions) for node in nodes.node):
        kept = [attribute for attribute in node.attribute if attribute.name != "accuracy_level"]
        if node.op_type == "MatMulNBits" and len(kept) < len(node.attribute):
            del node.attribute[:]
            node.attribute.extend(kept)
    return proto.SerializeToString()


def profiled_inputs(manifest: Manifest, entry: EntryPoint, position: int) -> list[HostArray]:
    """Inputs for calls of an entry point where only their time counts: random tokens, everything else as it must be.

    Args:
        manifest: The module's.
        entry: The entry point; one that takes any number of tokens gets 64.
        position: Tokens committed.
    """
    tokens, batch = entry.tokens or 64, manifest.batch or 1
    sizes = Sizes(manifest, past=position, batch=batch, tokens=tokens, total=position + tokens)
    random, vocabulary = np.random.default_rng(0), vocabulary_of(manifest)
    feeds: dict[str, HostArray] = {}
    for spec in manifest.inputs:
        shape = [dim if isinstance(dim, int) else sizes.get(manifest.dims[dim]) or 1 for dim in spec.shape]
        if spec.role == "tokens":
            feeds[spec.name] = random.integers(0, vocabulary, shape).astype(spec.dtype)
        elif spec.role == "other":
            feeds[spec.name] = np.zeros(shape, numpy_dtype(spec.dtype))
    feeds = complete_inputs(manifest, feeds, sizes, batch, position, tokens)
    return block_inputs(manifest, feeds, position, 0, tokens)


def vocabulary_of(manifest: Manifest) -> int:
    """How many tokens there are; 256 where the shape of the logits does not tell."""
    size = logits_output(manifest).shape[-1]
    return size if isinstance(size, int) else 256


def logits_output(manifest: Manifest) -> OutputSpec:
    """The output with the logits.

    Raises:
        InputError: There is none, or several.
    """
    found = [spec for spec in manifest.outputs if spec.role == "logits"]
    if len(found) != 1:
        raise InputError("no single output of logits", got=", ".join(spec.name for spec in found) or "none")
    return found[0]
