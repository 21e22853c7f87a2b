"""The manifest: what a compiled module says about itself (README.md has the format).

The frontend builds a `Manifest` and embeds `to_json()`; the runtime reads it back with `Manifest.from_json`, which
trusts nothing: sizes, names, roles and references are checked before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .device import DTYPE_NAMES
from .errors import TargetError
from .manifest_reader import Reader
from .manifest_rules import check
from .manifest_target import Target, read_target

FORMAT = 2
REFLECTION_KEY = "linattn.manifest"
DISPATCHES_KEY = "linattn.dispatches"
"""Reflection attribute with a table of the module's dispatches, for profiling; nothing at run time depends on it."""
RESULTS_KEY = "linattn.results"
"""Reflection attribute of functions that take memory as last arguments: for each result that is not written into an
input, and for their intermediate values. It lists `[dtype, shape]` of each result, null for one in an input."""
IN_ORDER_KEY = "linattn.in_order"
"""Reflection attribute of an asynchronous function that is one submission to a device's queue with a barrier at its
end: what the queue is given after it begins behind it, whatever it waits for."""
STEPS_KEY = "linattn.steps"
"""Reflection attribute of a function of several steps, or of packed ones: the name of the function that it calls."""

Dim = int | str
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class InputSpec:
    """A graph input that is not a state.

    Attributes:
        name: ONNX name.
        dtype: numpy name, or `bfloat16`.
        shape: Sizes; symbolic names stay in even where the compiled size is fixed.
        role: `tokens` | `attention_mask` | `position_ids` | `other`.
        bounds: Least and greatest value that the graph's tables take as an index; None: any, or not known.
    """

    name: str
    dtype: str
    shape: Shape
    role: str = "other"
    bounds: tuple[int, int] | None = None


@dataclass(frozen=True)
class OutputSpec:
    """A graph output that is not a state.

    Attributes:
        name: ONNX name.
        dtype: numpy name, or `bfloat16`.
        shape: Sizes, as in `InputSpec`.
        role: `logits` | `other`.
        token_axis: The axis along which the blocks of a prompt are joined; None: the last block's value counts.
    """

    name: str
    dtype: str
    shape: Shape
    role: str = "other"
    token_axis: int | None = None


@dataclass(frozen=True)
class StateSpec:
    """A state: a graph input (past) and the graph output (present) that becomes the next past.

    Attributes:
        name: ONNX name of the past input.
        output: ONNX name of the present output.
        kind: `recurrent` | `conv` | `kv_cache`.
        dtype: numpy name, or `bfloat16`.
        shape: Sizes, as in `InputSpec`.
        length_axis: The axis of a KV cache that counts tokens; None for the other kinds.
        in_place: The call writes into the caller's buffer and returns that same buffer (KV caches only).
    """

    name: str
    output: str
    kind: str
    dtype: str
    shape: Shape
    length_axis: int | None = None
    in_place: bool = False


@dataclass(frozen=True)
class EntryPoint:
    """An exported function.

    Attributes:
        symbol: Its name in the module.
        kind: `decode` | `prefill` | `main`.
        tokens: Number of tokens it takes; None: any number.
        last: A function that does the same but returns the logits of the last position only; None: there is none.
        token: A function that does the same but returns in place of the logits the index of the largest one of each
            row, [B, 1], of the dtype of the token ids, -1 where there is a NaN; None: there is none.
        draw: A function that returns a token of each row likewise, and takes one argument more behind the states: how
            it is drawn, [B, 8] f32 (README.md has the order); None: there is none.
        steps: A function that calls `draw`, or where there is none `token`, several times, each with the token that the
            last one chose (README.md has its arguments); None: there is none. Optional in the JSON.
        packed: A function that does what `symbol` does for one token, and takes memory with the position in place of
            it (README.md has its arguments), so that a list of arguments serves many calls; None: there is none.
            Optional in the JSON.
        alone: Committed tokens below which the calling thread is done sooner by itself than CPU workers, who have to be
            woken for each kernel; 0: never. Optional in the JSON.
    """

    symbol: str
    kind: str
    tokens: int | None
    last: str | None = None
    token: str | None = None
    draw: str | None = None
    steps: str | None = None
    packed: str | None = None
    alone: int = 0

    @property
    def symbols(self) -> list[str]:
        """The names of all its functions that do what it does, each once."""
        return [name for name in (self.symbol, self.last, self.token, self.draw) if name]


@dataclass(frozen=True)
class Parameters:
    """Weights in a file of their own.

    Attributes:
        scope: IREE parameter scope.
        file: File name, without a folder: it lies beside the module.
    """

    scope: str
    file: str


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime needs to know about a module.

    Attributes:
        model_name: Name of the model.
        model_sha256: Hash of the graph and of what all weights hold, hex.
        target: What it was compiled for.
        batch: Compiled batch size; None: open.
        max_context: Capacity of the KV caches, in tokens; None: open, or no KV cache.
        context_limit: Positions that the model itself supports (tokens), None if unknown.
        inputs: Graph inputs that are not states, in ABI order.
        outputs: Graph outputs that are not states, in ABI order.
        states: States, in ABI order.
        entry_points: Exported functions.
        dims: Role of each symbolic name in the shapes: `batch` | `tokens` | `past` | `total` | `open`.
        nodes: Rows of the compile report, opaque to the runtime.
        parameters: Weights beside the module, or None.
        finite: A function that takes the states and counts (i32) for each one of floats what is not finite: over the
            last axis of those that are written in place, in parts of the others. Optional in the JSON.
        row_masks: Whether the rows of a batch may be of different lengths: what the mask hides from a row, it does not
            see. Optional in the JSON.
        producer: Versions that made it.
        format: Version of this format.
    """

    model_name: str
    model_sha256: str
    target: Target
    batch: int | None
    max_context: int | None
    context_limit: int | None
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    states: tuple[StateSpec, ...]
    entry_points: tuple[EntryPoint, ...]
    dims: Mapping[str, str]
    nodes: tuple[Any, ...] = ()
    parameters: Parameters | None = None
    finite: str | None = None
    row_masks: bool = False
    producer: Mapping[str, str] | None = None
    format: int = FORMAT

    @property
    def takes_position(self) -> bool:
        """Whether every entry point takes the number of committed tokens as its last argument."""
        return self.max_context is not None and any(state.kind == "kv_cache" for state in self.states)

    @property
    def token_limit(self) -> int | None:
        """Most tokens that a session can hold; None: no limit."""
        limits = [limit for limit in (self.max_context, self.context_limit) if limit is not None]
        return min(limits) if limits else None

    def role(self, dim: Dim) -> str | None:
        """The role of a symbolic dim, None for a number."""
        return self.dims[dim] if isinstance(dim, str) else None

    def to_json(self) -> str:
        """The JSON text that goes into the module; checked by reading it back.

        Raises:
            TargetError: This manifest breaks a rule of the format.
        """
        text = json.dumps(
            {
                "format": self.format,
                "producer": dict(self.producer or {}),
                "model": {"name": self.model_name, "sha256": self.model_sha256},
                "target": asdict(self.target),
                "batch": self.batch,
                "max_context": self.max_context,
                "context_limit": self.context_limit,
                "inputs": [asdict(spec) for spec in self.inputs],
                "outputs": [asdict(spec) for spec in self.outputs],
                "states": [asdict(spec) for spec in self.states],
                "entry_points": [asdict(entry) for entry in self.entry_points],
                "dims": dict(self.dims),
                "finite": self.finite,
                "row_masks": self.row_masks,
                "nodes": list(self.nodes),
                "parameters": asdict(self.parameters) if self.parameters else None,
            },
            separators=(",", ":"),
            allow_nan=False,
        )
        Manifest.from_json(text)
        return text

    @staticmethod
    def from_json(text: str, where: str = "manifest") -> Manifest:
        """Reads and checks a manifest.

        Args:
            text: The JSON text.
            where: What the errors name, for example the module's file.

        Raises:
            TargetError: Not JSON, an unknown format version, or a broken rule (one line says which).
        """
        try:
            raw: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            message = str(error).splitlines()[0] if isinstance(error, ValueError) else "nested too deep"
            raise TargetError("the manifest is not JSON", where=where, hint=message) from error
        top = Reader(raw, where, "manifest")
        version = top.whole("format", 0)
        if version != FORMAT:
            hint = "use the linattn.runtime version that fits the compiler"
            raise TargetError("unknown manifest format", where=where, got=version, expected=FORMAT, hint=hint)
        manifest = _build(top, where)
        check(manifest, where)
        return manifest


def _build(top: Reader, where: str) -> Manifest:
    model, producer = top.child("model"), top.raw_object("producer")
    parameters = None if top.get("parameters") is None else top.child("parameters")
    return Manifest(
        model_name=model.text("name"),
        model_sha256=model.text("sha256"),
        target=read_target(top.child("target"), where),
        batch=top.optional_whole("batch", 1),
        max_context=top.optional_whole("max_context", 1),
        context_limit=top.optional_whole("context_limit", 1),
        inputs=tuple(
            InputSpec(
                row.text("name"),
                row.choice("dtype", DTYPE_NAMES),
                row.shape("shape"),
                row.choice("role", ("tokens", "attention_mask", "position_ids", "other")),
                row.optional_interval("bounds"),
            )
            for row in top.rows("inputs")
        ),
        outputs=tuple(
            OutputSpec(
                row.text("name"),
                row.choice("dtype", DTYPE_NAMES),
                row.shape("shape"),
                row.choice("role", ("logits", "other")),
                row.optional_whole("token_axis", 0),
            )
            for row in top.rows("outputs")
        ),
        states=tuple(
            StateSpec(
                row.text("name"),
                row.text("output"),
                row.choice("kind", ("recurrent", "conv", "kv_cache")),
                row.choice("dtype", DTYPE_NAMES),
                row.shape("shape"),
                row.optional_whole("length_axis", 0),
                row.flag("in_place"),
            )
            for row in top.rows("states")
        ),
        entry_points=tuple(
            EntryPoint(
                row.text("symbol"),
                row.choice("kind", ("decode", "prefill", "main")),
                row.optional_whole("tokens", 0),
                row.optional_text("last"),
                row.optional_text("token"),
                row.optional_text("draw"),
                row.optional_text("steps"),
                row.optional_text("packed"),
                row.optional_whole("alone", 0, missing_ok=True) or 0,
            )
            for row in top.rows("entry_points")
        ),
        dims={name: str(role) for name, role in top.raw_object("dims").items()},
        nodes=tuple(top.array("nodes")),
        parameters=Parameters(parameters.text("scope"), parameters.text("file")) if parameters else None,
        finite=top.optional_text("finite"),
        row_masks=top.flag("row_masks", missing_ok=True),
        producer={name: str(version) for name, version in producer.items()},
    )
