"""llama.cpp as a peer: its own `llama-bench`, started anew for each turn, of the GGUF file beside an ONNX model."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linattn.runtime.errors import InputError, LinattnError, TargetError

from .load import Watch
from .machine import core_count

PROGRAM = "llama-bench"
_BACKENDS = {"cuda": "CUDA", "vulkan": "Vulkan"}
_PROMPTS = 3


class LlamaCpp:
    """A subject of `linattn-bench model`, with what it can tell: times, and neither logits nor tokens.

    Args:
        model: Path of the GGUF file.
        target: `cpu`, `cuda` or `vulkan`; for the last two llama.cpp must have been built.
        threads: CPU threads; None: as many as there are cores.
    """

    def __init__(self, model: str, target: str, threads: int | None = None) -> None:
        found = shutil.which(PROGRAM)
        if found is None:
            raise TargetError(f"no {PROGRAM}", where="llama.cpp", hint="build llama.cpp, and have it on the PATH")
        if not Path(model).is_file():
            hint = "samples/benchmark_gguf.py writes it of the benchmarks' model, llama.cpp's converter of others"
            raise InputError("no such file", where="llama.cpp", got=model, hint=hint)
        where = ["-ngl", "0", "-dev", "none"] if target == "cpu" else ["-ngl", "99"]
        self._command = [found, "-m", model, "-t", str(threads or core_count()), *where, "-o", "json"]
        self._watches: dict[int, Watch] = {}
        start = time.perf_counter()
        self._is = self._measured(1, 0, 0, 1)
        self._load_s = time.perf_counter() - start
        has, needed = str(self._is["backends"]), _BACKENDS.get(target, "")
        if needed not in has:
            raise TargetError(f"{PROGRAM} was built without it", where="llama.cpp", got=has, expected=needed)

    def describe(self) -> dict[str, Any]:
        """How long one token took with all of the start; its commit and the type of the weights, as its strategy."""
        kind, is_it = str(self._is["model_type"]).split()[-1], self._is["build_commit"]
        return {"load_s": self._load_s, "memory_bytes": _UNKNOWN, "strategy": f"{is_it}, {kind}"}

    def repeat(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        """One turn: a prompt, and steps after as many tokens, each with a warm-up of its own.

        Args:
            prompt: Only its length counts: llama-bench draws its own tokens.
            count: Steps; it tells one time of all, so `steps_s` has their mean.
        """
        length = len(prompt)
        with self._watches.setdefault(length, Watch()).watching():
            prompts = self._measured(length, 0, 0, _PROMPTS)["samples_ns"]
            steps = self._measured(0, count, length, 1)["samples_ns"]
        times = {"prefill_s": statistics.median(prompts) / 1e9, "steps_s": [steps[0] / count / 1e9]}
        return times | {"overheads_s": [], "bare_s": [], "generated_s": [], "tokens": [], "memory_bytes": _UNKNOWN}

    def watched(self, length: int) -> dict[str, Any]:
        """What the CPU did during the turns with a prompt of a length, starts and warm-ups included."""
        return self._watches[length].summary()

    def _measured(self, prompt: int, steps: int, depth: int, times: int) -> dict[str, Any]:
        asked = ["-p", prompt, "-n", steps, "-d", depth, "-r", times]
        done = subprocess.run([*self._command, *map(str, asked)], capture_output=True, text=True, check=False)
        try:
            (row,) = json.loads(done.stdout)
            return {key: row[key] for key in ("build_commit", "backends", "model_type", "samples_ns")}
        except (ValueError, KeyError, TypeError) as error:
            said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            hint = f"it said: {said[-1][:200]}" if said else None
            got = f"status {done.returncode}"
            raise LinattnError(f"{PROGRAM} failed", where="llama.cpp", got=got, hint=hint) from error


_UNKNOWN = {"now": None, "peak": None}
