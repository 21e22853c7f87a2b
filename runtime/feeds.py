"""The inputs of a call: the caller's checked, the mask and the positions filled in, cut into blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import binding
from .arrays import as_array
from .binding import Sizes
from .collect import part
from .device import Device, DeviceArray, HostArray, numpy_dtype
from .dlpack import on_device
from .errors import InputError, StateError
from .manifest import Manifest


@dataclass(eq=False, slots=True)
class Call:
    """A session's call, checked.

    Attributes:
        feeds: All inputs in ONNX form, by name.
        batch: B.
        tokens: T.
        mask: The columns of all P+T tokens, where one of them is masked.
        placed: Inputs that are on the device already; `feeds` has their shapes only.
    """

    feeds: dict[str, HostArray]
    batch: int
    tokens: int
    mask: HostArray | None
    placed: Mapping[str, DeviceArray]

    def placed_block(
        self, manifest: Manifest, device: Device, block: Sequence[HostArray], start: int, size: int
    ) -> list[HostArray | DeviceArray]:
        """The inputs of one block, with those that are on the device where they are."""
        if not self.placed:
            return list(block)
        found: list[HostArray | DeviceArray] = []
        for spec, array in zip(manifest.inputs, block, strict=True):
            placed, axis = self.placed.get(spec.name), binding.axis_of(manifest, spec.shape, "tokens")
            if placed is None or axis is None:
                found.append(array if placed is None else placed)
            else:
                found.append(part(device, placed, axis, start, size))
        return found


def prepare(
    manifest: Manifest,
    device: Device,
    inputs: Mapping[str, Any],
    past: int,
    batch: int | None,
    mask: HostArray | None,
) -> Call:
    """Checks the inputs of a session's call and completes them.

    Args:
        manifest: The model.
        device: Where it runs.
        inputs: The caller's.
        past: P.
        batch: B of the session; None: still open.
        mask: Columns of the committed tokens, if one of them is masked.

    Raises:
        InputError: A name, dtype, shape or mask that does not fit.
        StateError: The model has no such positions.
    """
    m = manifest
    optional = ("attention_mask", "position_ids")
    required = [spec.name for spec in m.inputs if spec.role not in optional]
    binding.check_mapping(inputs, required)
    for state in m.states:
        if state.name in inputs:
            hint = "use program.run to pass states"
            raise InputError("a session has its own states", where=state.name, hint=hint)
    binding.check_names(inputs, [spec.name for spec in m.inputs], required)
    arrays, placed = take_inputs(m, device, inputs)
    sizes = Sizes(m, past=past) if batch is None else Sizes(m, past=past, batch=batch)
    for spec in m.inputs:
        if spec.name in arrays and spec.role != "attention_mask":
            sizes.bind(spec.name, spec.shape, arrays[spec.name])
    rows = sizes.set_default("batch", 1)
    tokens = sizes.set_default("tokens", binding.count_tokens(m, sizes, arrays))
    sizes.set_default("total", past + tokens)
    merged = _merge_mask(m, arrays, sizes, past, mask)
    return Call(complete_inputs(m, arrays, sizes, rows, past, tokens), rows, tokens, merged, placed)


def take_inputs(
    manifest: Manifest, device: Device, inputs: Mapping[str, Any]
) -> tuple[dict[str, HostArray], dict[str, DeviceArray]]:
    """The caller's inputs that are not states, and those of them that are on the device and may stay there.

    Indices come to the host, where they are checked; masks and positions, where they are cut. An array that stays is
    among the first ones too, as one of its shape without memory. Ids of one row may be given as [T].

    Raises:
        InputError: A dtype that does not fit, or integers that do not.
    """
    arrays: dict[str, HostArray] = {}
    placed: dict[str, DeviceArray] = {}
    for spec in manifest.inputs:
        if spec.name not in inputs:
            continue
        value = inputs[spec.name]
        free = spec.bounds is None and spec.role not in ("attention_mask", "position_ids")
        array = on_device(device, value) if free else None
        if array is not None:
            if array.dtype != spec.dtype:
                raise InputError("wrong dtype", where=spec.name, got=array.dtype, expected=spec.dtype)
            placed[spec.name] = array
            arrays[spec.name] = np.broadcast_to(np.zeros((), numpy_dtype(spec.dtype)), array.shape)
            continue
        host = as_array(spec, value)
        is_row = spec.role == "tokens" and host.ndim == 1 and len(spec.shape) == 2
        arrays[spec.name] = host[None] if is_row else host
    return arrays, placed


def check_room(manifest: Manifest, past: int, tokens: int) -> None:
    """Refuses a call that the context has no room for, before anything runs.

    Raises:
        StateError: P+T is more than the capacity or the model's own limit.
    """
    limit = manifest.token_limit
    if limit is not None and past + tokens > limit:
        hint = "reset the session" if limit == manifest.context_limit else "reset it or compile with more --max-context"
        raise StateError("context full", got=f"{past} + {tokens} tokens", expected=f"at most {limit}", hint=hint)


def complete_inputs(
    manifest: Manifest, arrays: Mapping[str, HostArray], sizes: Sizes, batch: int, past: int, tokens: int
) -> dict[str, HostArray]:
    """Adds the `attention_mask` and `position_ids` that the caller left out, in ONNX form."""
    feeds = dict(arrays)
    mask = next((spec for spec in manifest.inputs if spec.role == "attention_mask"), None)
    if mask is not None and mask.name not in feeds:
        feeds[mask.name] = binding.full_mask(manifest, mask, batch, past, tokens)
    for spec in manifest.inputs:
        if spec.role == "position_ids" and spec.name not in feeds:
            feeds[spec.name] = binding.positions(manifest, spec, sizes, past, feeds[mask.name] if mask else None)
    return feeds


def block_inputs(
    manifest: Manifest, feeds: Mapping[str, HostArray], past: int, start: int, size: int
) -> list[HostArray]:
    """The inputs of one block, in manifest order, cut from those of the whole call."""
    return [
        binding.block_mask(manifest, spec, feeds[spec.name], past, start, size)
        if spec.role == "attention_mask"
        else binding.cut(manifest, spec, feeds[spec.name], start, size)
        for spec in manifest.inputs
    ]


def _merge_mask(
    manifest: Manifest, arrays: dict[str, HostArray], sizes: Sizes, past: int, known: HostArray | None
) -> HostArray | None:
    """Puts the mask of all P+T columns into `arrays` where one was given or is remembered."""
    m, batch, tokens = manifest, sizes.set_default("batch", 1), sizes.set_default("tokens", 1)
    spec = next((spec for spec in m.inputs if spec.role == "attention_mask"), None)
    if spec is None or (spec.name not in arrays and known is None):
        return None
    axis = binding.axis_of(m, spec.shape, "total")
    given = arrays.get(spec.name)
    if axis is not None and (given is None or given.shape[axis : axis + 1] == (tokens,)) and past:
        old = known if known is not None else binding.full_mask(m, spec, batch, past, 0)
        new = binding.full_mask(m, spec, batch, 0, tokens) if given is None else given
        if new.ndim != old.ndim or new.shape[:axis] != old.shape[:axis]:
            sizes.bind(spec.name, spec.shape, new)
        given = np.concatenate([old, new], axis)
    if given is None:
        return None
    sizes.bind(spec.name, spec.shape, given)
    arrays[spec.name] = given
    if axis is None:
        binding.refuse_padding(m, spec, given)
        return None
    columns = np.moveaxis(given, axis, -1)
    if known is not None:  # columns before a shorter row of the batch are no padding: nothing was there
        binding.refuse_other_columns(m, spec, columns[..., :past], np.moveaxis(known, axis, -1))
        columns = columns[..., past:]
    binding.refuse_padding(m, spec, columns)
    return None if given.all() else given.copy()
