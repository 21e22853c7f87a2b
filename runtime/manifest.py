"""The manifest: what a compiled module says about itself (README.md has the format).

The frontend builds a `Manifest` and embeds `to_json()`; the runtime reads it back with `Manifest.from_json`, which
trusts nothing: sizes, names, roles and references are checked before anything is allocated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .device import DTYPE_NAMES, numpy_dtype
from .drivers import DEVICE_URIS
from .errors import TargetError
from .manifest_reader import Reader, bad

FORMAT = 2
REFLECTION_KEY = "linattn.manifest"
DISPATCHES_KEY = "linattn.dispatches"
"""Reflection attribute with a table of the module's dispatches, for profiling; nothing at run time depends on it."""
RESULTS_KEY = "linattn.results"
"""Reflection attribute of functions that take memory as last arguments: for each result that is not written into an
input, and for their intermediate values. It lists `[dtype, shape]` of each result, null for one in an input."""
STEPS_KEY = "linattn.steps"
"""Reflection attribute of a function of several steps: the name of the function of one that it calls."""
MAX_ARRAY_BYTES = 1 << 40
_MAX_NAME = 255

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
    alone: int = 0

    @property
    def symbols(self) -> list[str]:
        """The names of all its functions that do what it does, each once."""
        return [name for name in (self.symbol, self.last, self.token, self.draw) if name]


@dataclass(frozen=True)
class CpuLevel:
    """One of the machines that a portable CPU module has code for.

    Attributes:
        name: For people, such as `x86-64-v3`.
        instruction_sets: What its code needs, as in `Target`.
    """

    name: str
    instruction_sets: tuple[str, ...]


@dataclass(frozen=True)
class DeviceNeeds:
    """The most that any kernel of a GPU's module uses.

    Attributes:
        threads: Of a workgroup.
        shared_memory: Bytes of a workgroup.
        storage_buffers: Of a dispatch.
        push_constants: Bytes of a dispatch.
        features: In Vulkan's words, such as `shaderInt64`; `subgroup` and an operation, such as `subgroupShuffle`.
    """

    threads: int
    shared_memory: int
    storage_buffers: int
    push_constants: int
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What the module was compiled for.

    Attributes:
        name: `cpu` | `cuda` | `vulkan`.
        device: The device URI that runs it by default.
        description: For people: CPU features, GPU architecture.
        subgroup_size: Lanes of a subgroup that the kernels count on; None: any. Optional in the JSON. Checked at load,
            since IREE 3.13.0 runs a kernel for 32 lanes on a device of 8 and returns wrong numbers.
        architecture: `x86_64` | `aarch64`; None: not a CPU. Checked at load, like what follows: the process would die.
        instruction_sets: What the code needs beyond what every CPU of the architecture has, in LLVM's names.
        levels: Best first, where the module has code for several CPUs and takes the first level that a machine has; the
            last one needs `instruction_sets`.
        native: NVIDIA GPUs that there is native code for, such as `sm_90`; any other compiles the PTX that it has too.
            Optional in the JSON. Nothing is checked by it.
        needs: What the kernels need of a GPU; None: not a GPU. Checked at load, on Vulkan, which takes kernels that
            need more without a word.
    """

    name: str
    device: str
    description: str = ""
    subgroup_size: int | None = None
    architecture: str | None = None
    instruction_sets: tuple[str, ...] = ()
    levels: tuple[CpuLevel, ...] = ()
    native: tuple[str, ...] = ()
    needs: DeviceNeeds | None = None


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
        _check(manifest, where)
        return manifest


def read_target(target: Reader, where: str) -> Target:
    """What a module was compiled for; a bundle says it in the same words.

    Raises:
        TargetError: a broken rule of the format.
    """
    found = Target(
        target.choice("name", tuple(DEVICE_URIS)),
        target.text("device"),
        target.text("description"),
        target.optional_whole("subgroup_size", 1, missing_ok=True),
        None if target.get("architecture") is None else target.text("architecture"),
        target.texts("instruction_sets"),
        tuple(CpuLevel(row.text("name"), row.texts("instruction_sets")) for row in target.rows("levels")),
        target.texts("native", missing_ok=True),
        None if target.get("needs") is None else _needs(target.child("needs")),
    )
    if (found.name == "cpu") != (found.architecture is not None):
        raise bad(where, "target.architecture", f"wrong for target {found.name}", found.architecture)
    if found.levels and found.levels[-1].instruction_sets != found.instruction_sets:
        raise bad(where, "target.levels", "the last one is not what the module needs", found.levels[-1].name)
    return found


def is_plain_name(name: str) -> bool:
    """Whether it names a file without a folder, on any system."""
    return 0 < len(name) <= _MAX_NAME and not set(name) & set("/\\:\0") and name not in (".", "..")


def _needs(row: Reader) -> DeviceNeeds:
    return DeviceNeeds(
        row.whole("threads", 1),
        row.whole("shared_memory", 0),
        row.whole("storage_buffers", 0),
        row.whole("push_constants", 0),
        row.texts("features"),
    )


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


def _check(manifest: Manifest, where: str) -> None:
    m = manifest
    for name, role in m.dims.items():
        if role not in ("batch", "tokens", "past", "total", "open"):
            raise bad(where, f"dims.{name}", "unknown role", role, "batch | tokens | past | total | open")
    entries = [name for entry in m.entry_points for name in (*entry.symbols, entry.steps)]
    symbols = [name for name in (*entries, m.finite) if name]
    for group, names in (
        ("input and state", [spec.name for spec in (*m.inputs, *m.states)]),
        ("output", [*(spec.name for spec in m.outputs), *(state.output for state in m.states)]),
        ("entry point", symbols),
    ):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise bad(where, f"{group} names", "not unique", ", ".join(twice))
    if not m.entry_points:
        raise bad(where, "entry_points", "empty")
    for symbol in symbols:
        if symbol == "__init" or "$" in symbol:
            raise bad(where, "entry_points", "not a function to call", symbol)
    for entry in m.entry_points:
        if entry.kind == "decode" and entry.tokens != 1:
            raise bad(where, entry.symbol, "wrong token count of a decode entry", entry.tokens, 1)
        if entry.steps is not None and not (entry.token or entry.draw):
            raise bad(where, entry.symbol, "several steps without one that chooses", entry.steps, "token or draw")
    for role in ("attention_mask", "position_ids"):
        if sum(spec.role == role for spec in m.inputs) > 1:
            raise bad(where, "inputs", f"more than one {role}")
    for spec in (*m.inputs, *m.outputs, *m.states):
        unknown = [dim for dim in spec.shape if isinstance(dim, str) and dim not in m.dims]
        if unknown:
            raise bad(where, spec.name, "dims without a role", ", ".join(map(str, unknown)), "an entry in dims")
        known = {"batch": m.batch or 1, "past": m.max_context or 1, "total": m.max_context or 1}
        sizes = [known.get(m.dims[dim], 1) if isinstance(dim, str) else dim for dim in spec.shape]
        nbytes = math.prod(sizes) * numpy_dtype(spec.dtype).itemsize
        if nbytes > MAX_ARRAY_BYTES:
            raise bad(where, spec.name, "too large", f"{nbytes} bytes", f"at most {MAX_ARRAY_BYTES}")
    for spec in m.inputs:
        if spec.bounds is not None and numpy_dtype(spec.dtype).kind not in "iu":
            raise bad(where, spec.name, "bounds of values that are no indices", spec.dtype, "an integer dtype")
    for output in m.outputs:
        if output.token_axis is not None and output.token_axis >= len(output.shape):
            raise bad(where, output.name, "token_axis out of range", output.token_axis, f"< {len(output.shape)}")
    for state in m.states:
        axis = state.length_axis
        if axis is not None and axis >= len(state.shape):
            raise bad(where, state.name, "length_axis out of range", axis, f"< {len(state.shape)}")
        if (state.kind == "kv_cache") != (axis is not None):
            raise bad(where, state.name, f"wrong length_axis of a {state.kind} state", axis)
        if axis is not None and m.role(state.shape[axis]) != "past":
            raise bad(where, state.name, "the length axis is not a past dim", state.shape[axis])
        if state.in_place and not (state.kind == "kv_cache" and m.max_context):
            raise bad(where, state.name, "in_place without a capacity", state.kind, "a kv_cache and max_context")
    if m.parameters and not is_plain_name(m.parameters.file):
        raise bad(where, "parameters.file", "not a plain file name", repr(m.parameters.file))
