"""What compiling takes and gives, apart from the compiler: whoever only asks for a compile need not load it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from linattn.runtime.errors import InputError, require, require_whole
from linattn.runtime.manifest import Manifest

from .plan.report import CompileReport
from .targets import TargetOptions
from .text import BESIDE

BUNDLE_SUFFIX = ".linattn"

DEFAULT_MAX_MEMORY = 64 << 30
"""Bytes that one call may need for its inputs, states, outputs and what it computes between."""

SAMPLERS = ("none", "greedy", "draw")
GUARDS = ("none", "nan")

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass(frozen=True)
class CompileOptions:
    """Everything ``linattn-compile`` can be asked for.

    Attributes:
        target: ``cpu``, ``cuda`` or ``vulkan``.
        cpu_features: See :class:`~linattn.frontend.targets.TargetOptions`.
        gpu_target: Likewise.
        target_triple: Likewise.
        dims: Symbol -> size, for symbols that are not batch, tokens or lengths.
        batch: Rows of a call; None for open.
        max_context: Capacity of the KV caches in tokens; None for open; ``default`` for min(the model's, 4096).
        prefill_blocks: Sizes in tokens; None for one entry point with any number; ``default`` for the target's.
        chunk_size: Tokens a chunk of the chunk-parallel forms; None for the default.
        states: Past input -> present output, for states that neither the graph nor their names show.
        no_states: Inputs that are no states, whatever they look like.
        extra_outputs: Values inside the graph that are to be outputs too, such as hidden states.
        strategy: Forces one strategy on the two state operators.
        math: ``strict``: sums and products of f32 are in f32; ``fast``: products with weights may be of terms of 16
            bits, and activations of f16 be rounded to bf16, where the machine multiplies those faster.
        parameters: Write the weights to this ``.irpa`` file instead of into the module.
        plain_abi: Functions return every output and state as ordinary results, as any caller of IREE expects; without
            it those of fixed sizes take memory for them, which saves our runtime an allocation a call.
        max_memory: Bytes that a call may need, weights not counted; see :mod:`linattn.frontend.limits`.
        sampler: ``greedy``: a further entry point whose result is the token with the largest logit; ``draw``: one that
            is drawn by temperature, top-k, top-p and min-p, which are given with every call; ``none``.
        guard: ``nan``: a further function that tells whether states are finite, for sessions with ``guard="nan"``;
            ``none``: those of a GPU come to the host for it.
        tokenizer: A folder or a tokenizer.json that the module will carry, with what lies beside it; ``beside`` for the
            one beside the model, if there is one; None for none.
        dump_ir: Folder for the IR after each stage.
        report: Write the report to this file, as JSON.
        dry_run: Do everything up to the generation of code and write no module: what would be chosen, or refused.
    """

    target: str = "cpu"
    cpu_features: str | None = None
    gpu_target: str | None = None
    target_triple: str | None = None
    dims: Mapping[str, int] = field(default_factory=dict[str, int])
    batch: int | None = 1
    max_context: int | str | None = "default"
    prefill_blocks: tuple[int, ...] | str | None = "default"
    chunk_size: int | None = None
    states: Mapping[str, str] = field(default_factory=dict[str, str])
    no_states: frozenset[str] = frozenset()
    extra_outputs: tuple[str, ...] = ()
    strategy: str | None = None
    math: str = "strict"
    parameters: Path | None = None
    plain_abi: bool = False
    max_memory: int = DEFAULT_MAX_MEMORY
    sampler: str = "none"
    guard: str = "none"
    tokenizer: Path | str | None = BESIDE
    dump_ir: Path | None = None
    report: Path | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        _check(self)
        if self.sampler not in SAMPLERS:
            raise InputError("unknown", where="--sampler", got=repr(self.sampler), expected=" | ".join(SAMPLERS))
        if self.guard not in GUARDS:
            raise InputError("unknown", where="--guard", got=repr(self.guard), expected=" | ".join(GUARDS))

    @property
    def machine(self) -> TargetOptions:
        """What was said about the machine."""
        return TargetOptions(self.cpu_features, self.gpu_target, self.target_triple)


@dataclass(frozen=True)
class CompiledModel:
    """The result of :func:`linattn.frontend.compile_model`.

    Attributes:
        module: The bytes of the ``.vmfb``, empty if it was written to a file or none was made.
        manifest: What the module says about itself.
        report: What was found and chosen.
    """

    module: bytes
    manifest: Manifest
    report: CompileReport


_FLAGS = {"dims": "--dim", "states": "--state", "no_states": "--no-state", "extra_outputs": "--extra-output"}
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("target", "math", "sampler", "guard"), ((str,), "a text")),
    **dict.fromkeys(("cpu_features", "gpu_target", "target_triple", "strategy"), ((str, type(None)), "a text")),
    **dict.fromkeys(("parameters", "dump_ir", "report", "tokenizer"), ((str, os.PathLike, type(None)), "a path")),
    **dict.fromkeys(("dims", "states"), ((Mapping,), "a dict")),
    "no_states": ((Set, tuple, list), "a set of names"),
    "extra_outputs": ((tuple, list), "a tuple of names"),
}


def _check(options: CompileOptions) -> None:
    """What the command's own reading of its arguments makes sure of, for callers in Python."""

    def check_size(name: str, value: object) -> None:
        require_whole(value, _flag(name))
        if int(value) < 1:  # pyright: ignore[reportArgumentType]
            raise InputError("not a positive number", where=_flag(name), got=value)

    for name, (kinds, expected) in _KINDS.items():
        require(getattr(options, name), kinds, _flag(name), expected)
    for name in ("batch", "max_context", "chunk_size", "max_memory"):
        value = getattr(options, name)
        if value is not None and (name, value) != ("max_context", "default"):
            check_size(name, value)
    blocks = options.prefill_blocks
    if blocks is not None and blocks != "default":
        require(blocks, (tuple, list), _flag("prefill_blocks"), "a tuple of numbers, None or 'default'")
        for block in blocks:
            check_size("prefill_blocks", block)


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def parse_size(text: str, option: str) -> int:
    """A number of bytes: ``2000000``, ``500MiB``, ``64GiB``.

    Raises:
        InputError: if it is none.
    """
    match = re.fullmatch(r"([1-9][0-9]{0,14}) ?(|[KMGT]iB)", text)
    if match is None:
        raise InputError("not a size", where=option, got=repr(text[:40]), expected="bytes, or such as 500MiB or 64GiB")
    return int(match[1]) * _UNITS[match[2]]
