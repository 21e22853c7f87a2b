"""flash-linear-attention as a peer on CUDA: the kernels as PyTorch users call them, and as CUDA graphs."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from linattn.runtime.device import HostArray, numpy_dtype
from linattn.runtime.errors import InputError, TargetError

from .lazy import need
from .op_runners import Feeds, Runner

FORMS = ("chunk", "recurrent")
_FUNCTIONS = {
    "gated_delta": ("fla.ops.gated_delta_rule", "gated_delta_rule"),
    "delta": ("fla.ops.delta_rule", "delta_rule"),
    "gated": ("fla.ops.simple_gla", "simple_gla"),
    "linear": ("fla.ops.linear_attn", "linear_attn"),
}
_BY_KEY = {"gated_delta": ("fla.ops.kda", "kda"), "gated": ("fla.ops.gla", "gla")}
"""With a decay a dimension of the keys."""
_REPLAYED = 16


def missing_fla() -> str | None:
    """Why flash-linear-attention cannot be measured here; None if it may work."""
    for module in ("torch", "fla"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed (pip install flash-linear-attention)"
    return None


def function_of(rule: str, form: str, *, by_key: bool) -> tuple[str, str, str]:
    """The module and function for an update rule, and what it calls the decays.

    Args:
        rule: The update rule.
        form: See :class:`FlaRunner`.
        by_key: Whether there is a decay a dimension of the keys.
    """
    module, name = (_BY_KEY if by_key else _FUNCTIONS)[rule]
    prefix = "chunk_" if form == "chunk" else "fused_recurrent_"
    return module, prefix + name, "gk" if (name, form) == ("gla", "recurrent") else "g"


class FlaRunner(Runner):
    """One form of flash-linear-attention.

    Args:
        form: `chunk` or `recurrent`.

    Raises:
        TargetError: Not installed, or no CUDA device.
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self._form = form
        self._torch = need("torch", package="torch")
        need("fla", package="flash-linear-attention")
        if not self._torch.cuda.is_available():
            raise TargetError("no CUDA device for PyTorch", where="fla")

    def prepare(self, key: str, model: str, feeds: Feeds, attributes: Mapping[str, Any] | None = None) -> None:
        """See `Runner.prepare`; `attributes` are the node's."""
        torch, node = self._torch, dict(attributes or {})
        rule, heads = node["update_rule"], node["kv_num_heads"]
        if node["q_num_heads"] != heads:
            raise InputError("measured for equal heads only", where="fla")
        by_key = "decay" in feeds and feeds["decay"].shape[2] != heads
        module, name, decay = function_of(rule, self._form, by_key=by_key)
        function = getattr(need(module, package="flash-linear-attention"), name)

        def tensor(array: HostArray) -> Any:
            if array.dtype == numpy_dtype("bfloat16"):
                return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).cuda().view(torch.bfloat16)
            return torch.from_numpy(np.ascontiguousarray(array)).cuda()

        batch, tokens = feeds["query"].shape[:2]
        arguments: dict[str, Any] = {
            short: tensor(feeds[long]).view(batch, tokens, heads, -1)
            for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
        }
        arguments |= {
            short: tensor(feeds[long]) for short, long in ((decay, "decay"), ("beta", "beta")) if long in feeds
        }
        if by_key:
            arguments[decay] = arguments[decay].view(batch, tokens, heads, -1)
        arguments |= {"initial_state": tensor(feeds["past_state"]), "output_final_state": True}
        arguments["scale"] = arguments["q"].shape[-1] ** -0.5
        if rule == "linear":
            arguments["normalize"] = False

        def call() -> Any:
            with torch.no_grad():
                results = function(**arguments)[:2]
            torch.cuda.synchronize()
            return results

        call()  # Triton compiles and tunes here
        self._calls[key] = call
        self._calls[f"{key}-kernel"] = self._graph(lambda: function(**arguments))

    def kernel(self, key: str) -> list[float]:
        """Seconds of the kernels alone: a CUDA graph of sixteen calls, replayed, by sixteen."""
        replay = self._calls[f"{key}-kernel"]
        samples: list[float] = []
        for _ in range(5):
            start = time.perf_counter()
            replay()
            self._torch.cuda.synchronize()
            samples.append((time.perf_counter() - start) / _REPLAYED)
        return samples[1:]

    def results(self, key: str) -> dict[str, HostArray]:
        """See `Runner.results`."""
        output, state = self._last[key]
        found = (output.flatten(2).float().cpu().numpy(), state.float().cpu().numpy())
        return dict(zip(("output", "present_state"), found, strict=True))

    def _graph(self, call: Callable[[], Any]) -> Callable[[], Any]:
        torch = self._torch
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            for _ in range(_REPLAYED):
                call()
        return graph.replay
