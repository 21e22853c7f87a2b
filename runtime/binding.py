"""From a caller's arrays to what an entry point takes: checks, sizes, masks, positions and cuts.

Words: B batch, P tokens committed before the call, T tokens of the call, M capacity (`max_context`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from .arrays import check_bounds
from .device import HostArray, numpy_dtype
from .errors import InputError, StateError
from .manifest import Dim, EntryPoint, InputSpec, Manifest


def check_names(given: Any, allowed: Sequence[str], required: Sequence[str]) -> None:
    """Refuses inputs that are not given by name, names that do not exist and required inputs that are missing.

    Raises:
        InputError: One line that lists what there is.
    """
    check_mapping(given, required)
    given = cast(Mapping[Any, Any], given)
    unknown = [name for name in given if name not in allowed]
    if unknown:
        raise InputError("no such input", got=", ".join(map(str, unknown)), expected=", ".join(allowed))
    missing = [name for name in required if name not in given]
    if missing:
        raise InputError("missing input", where=", ".join(missing), expected=", ".join(required))


def check_mapping(given: Any, required: Sequence[str]) -> None:
    """Refuses inputs that are not given by name.

    Raises:
        InputError: They are not.
    """
    if not isinstance(given, Mapping):
        example = f"{{{required[0]!r}: ...}}" if required else "a dict"
        raise InputError("inputs are given by name", got=type(cast(object, given)).__name__, expected=example)


class Sizes:
    """The sizes of the symbolic dims of one call, found from the arrays that were given.

    Args:
        manifest: Roles of the dims; a compiled batch is known from the start.
        **known: Sizes known already, by role (`past=17`).
    """

    def __init__(self, manifest: Manifest, **known: int) -> None:
        self._manifest = manifest
        self._sizes: dict[str, int] = dict(known)
        if manifest.batch is not None:
            self._sizes["batch"] = manifest.batch

    def get(self, role: str) -> int | None:
        """The size of a role, None while unknown."""
        return self._sizes.get(role)

    def set_default(self, role: str, size: int) -> int:
        """Fixes the size of a role unless it is known; returns the size that counts."""
        return self._sizes.setdefault(role, size)

    def bind(self, name: str, shape: Sequence[Dim], array: HostArray) -> None:
        """Checks an array against a shape and learns the sizes that were still open.

        Raises:
            InputError: A wrong rank or size, with the expected shape as far as it is known.
        """
        fits = array.ndim == len(shape)
        learned: dict[str, int] = {}
        for dim, size in zip(shape, array.shape, strict=False):
            key = self._key(dim)
            want = dim if isinstance(dim, int) else self._sizes.get(key, learned.get(key, size))
            fits = fits and want == size
            learned.setdefault(key, size)
        if not fits:
            raise InputError("wrong shape", where=name, got=list(array.shape), expected=self.describe(shape))
        for key, size in learned.items():
            self._sizes.setdefault(key, size)

    def concrete(self, name: str, shape: Sequence[Dim]) -> tuple[int, ...]:
        """A shape in numbers.

        Raises:
            InputError: A size is still unknown.
        """
        sizes = [dim if isinstance(dim, int) else self._sizes.get(self._key(dim)) for dim in shape]
        if None in sizes:
            raise InputError("cannot tell its shape", where=name, expected=self.describe(shape), hint="pass it")
        return tuple(size for size in sizes if size is not None)

    def describe(self, shape: Sequence[Dim]) -> str:
        """A shape for people: `[batch_size=1, sequence_length, 64]`."""
        parts: list[str] = []
        for dim in shape:
            size = None if isinstance(dim, int) else self._sizes.get(self._key(dim))
            parts.append(str(dim) if size is None else f"{dim}={size}")
        return f"[{', '.join(parts)}]"

    def _key(self, dim: Dim) -> str:
        role = self._manifest.role(dim)
        return f"#{dim}" if role in (None, "open") else str(role)


def axis_of(manifest: Manifest, shape: Sequence[Dim], role: str) -> int | None:
    """The first axis of a shape whose dim has a role."""
    return next((axis for axis, dim in enumerate(shape) if manifest.role(dim) == role), None)


def count_tokens(manifest: Manifest, sizes: Sizes, arrays: Mapping[str, HostArray]) -> int:
    """T of a call: the size of the token dim, or what a model of fixed shapes takes at once."""
    tokens = sizes.get("tokens")
    if tokens is not None:
        return tokens
    for entry in manifest.entry_points:
        if entry.tokens is not None:
            return entry.tokens
    for spec in manifest.inputs:
        if spec.role == "tokens" and spec.name in arrays and arrays[spec.name].ndim > 1:
            return arrays[spec.name].shape[1]
    for output in manifest.outputs:
        if output.token_axis is not None and isinstance(size := output.shape[output.token_axis], int):
            return size
    return 1


def plan_blocks(manifest: Manifest, tokens: int) -> list[tuple[EntryPoint, int]]:
    """Cuts T tokens into the blocks that exist: the largest first, then smaller ones, decode for the tail.

    An entry point for any number of tokens takes everything at once (for T = 1 only where no decode entry exists).

    Args:
        manifest: Names the entry points.
        tokens: T >= 1.

    Raises:
        InputError: The tail fits no block; lists the counts that exist.
    """
    fixed = {entry.tokens: entry for entry in manifest.entry_points if entry.tokens}
    flexible = next((entry for entry in manifest.entry_points if entry.tokens is None), None)
    if flexible is not None:
        return [(fixed.get(1, flexible) if tokens == 1 else flexible, tokens)]
    plan: list[tuple[EntryPoint, int]] = []
    rest = tokens
    for size in sorted(fixed, reverse=True):
        plan += [(fixed[size], size)] * (rest // size)
        rest %= size
    if rest:
        raise InputError("no blocks add up to this many tokens", got=tokens, expected=_counts(manifest))
    return plan


def pick_entry(manifest: Manifest, tokens: int) -> EntryPoint:
    """The one entry point that takes exactly T tokens.

    Raises:
        InputError: There is none; lists the counts that exist.
    """
    for wanted in (tokens, None):
        for entry in manifest.entry_points:
            if entry.tokens == wanted:
                return entry
    hint = "a session takes any number of tokens"
    raise InputError("no entry point takes this many tokens", got=tokens, expected=_counts(manifest), hint=hint)


def full_mask(manifest: Manifest, spec: InputSpec, batch: int, past: int, tokens: int) -> HostArray:
    """A mask of ones in its ONNX form, [B, P+T], or [B, T] where the graph wants only the new tokens."""
    sizes = Sizes(manifest, batch=batch, tokens=tokens, past=past, total=past + tokens)
    return np.ones(sizes.concrete(spec.name, spec.shape), numpy_dtype(spec.dtype))


def refuse_padding(manifest: Manifest, spec: InputSpec, mask: HostArray) -> None:
    """Refuses a mask with zeros where the model has recurrent or conv states.

    Raises:
        InputError: There are zeros.
    """
    if not mask.all() and _is_recurrent(manifest):
        hint = "pass rows of different length separately, or leave the mask out"
        raise InputError("padding would enter the state", where=spec.name, got="zeros", expected="ones", hint=hint)


def refuse_other_columns(manifest: Manifest, spec: InputSpec, mask: HostArray, known: HostArray) -> None:
    """Refuses another mask of the committed tokens than theirs, where the model has recurrent or conv states.

    Raises:
        InputError: They differ.
    """
    if _is_recurrent(manifest) and not np.array_equal(mask, known):
        hint = "pass the mask of the new tokens alone"
        raise InputError("another mask of tokens that the states have seen", where=spec.name, hint=hint)


def _is_recurrent(manifest: Manifest) -> bool:
    return any(state.kind in ("recurrent", "conv") for state in manifest.states)


def check_indices(manifest: Manifest, feeds: Mapping[str, HostArray]) -> None:
    """Refuses a call with an index outside the model's tables, before anything runs.

    Raises:
        InputError: Names the input and the first such element.
    """
    for spec in manifest.inputs:
        check_bounds(spec, feeds[spec.name])


def block_mask(manifest: Manifest, spec: InputSpec, mask: HostArray, past: int, start: int, size: int) -> HostArray:
    """The mask that one block takes.

    Args:
        manifest: With a capacity M the block takes [B, M+size]: the committed columns, zeros up to M, the new ones.
        spec: The mask's input.
        mask: The call's mask in ONNX form, [B, P+T] (or [B, T]).
        past: P.
        start: First token of the block within the call.
        size: Number of tokens of the block.
    """
    axis = axis_of(manifest, spec.shape, "total")
    if axis is None:
        return cut(manifest, spec, mask, start, size)
    committed = past + start
    if manifest.max_context is None:
        return _slice(mask, axis, 0, committed + size)
    shape = list(mask.shape)
    shape[axis] = manifest.max_context + size
    block = np.zeros(shape, mask.dtype)
    _slice(block, axis, 0, committed)[...] = _slice(mask, axis, 0, committed)
    _slice(block, axis, manifest.max_context, shape[axis])[...] = _slice(mask, axis, committed, committed + size)
    return block


def positions(manifest: Manifest, spec: InputSpec, sizes: Sizes, past: int, mask: HostArray | None) -> HostArray:
    """Position ids P..P+T-1 in every row (every leading axis alike).

    With zeros in a two-dimensional mask, positions count the ones before, as exporters of left-padded batches do.

    Raises:
        StateError: The model has no such positions.
    """
    shape = sizes.concrete(spec.name, spec.shape)
    axis = axis_of(manifest, spec.shape, "tokens")
    axis = len(shape) - 1 if axis is None else axis
    steps = past + np.arange(shape[axis])
    if mask is not None and mask.ndim == 2 and axis == len(shape) - 1 and not mask.all():
        steps = np.maximum(np.cumsum(mask != 0, axis=1) - 1, 0)[:, -shape[axis] :]
    else:
        steps = steps.reshape([-1] + [1] * (len(shape) - 1 - axis))
    if spec.bounds is not None and steps.size and steps.max() > spec.bounds[1]:
        got, expected = f"{past} + {shape[axis]} tokens", f"at most {spec.bounds[1] + 1}"
        raise StateError("context full", got=got, expected=expected, hint="reset the session")
    found = np.empty(shape, numpy_dtype(spec.dtype))
    found[...] = steps
    return found


def cut(manifest: Manifest, spec: InputSpec, array: HostArray, start: int, size: int) -> HostArray:
    """The part of an input that belongs to one block; inputs without a token axis go to every block whole."""
    axis = axis_of(manifest, spec.shape, "tokens")
    return array if axis is None else _slice(array, axis, start, start + size)


def first_of(array: HostArray, axis: int, size: int) -> HostArray:
    """The first elements along an axis."""
    return _slice(array, axis, 0, size)


def _slice(array: HostArray, axis: int, start: int, stop: int) -> HostArray:
    return array[(slice(None),) * axis + (slice(start, stop),)]


def _counts(manifest: Manifest) -> str:
    counts = sorted({entry.tokens for entry in manifest.entry_points if entry.tokens is not None})
    return f"token counts {', '.join(map(str, counts))}"
