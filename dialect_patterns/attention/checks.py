"""Checks of a node's inputs and attributes that Attention and GroupQueryAttention share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..node import Dim, Node, TensorSpec

CAPACITY = "linattn.capacity"
"""Attribute the frontend sets on a node whose KV cache is a buffer of fixed capacity, written at the position."""
_INTERNAL = "linattn."


def refuse_attributes(node: Node, supported: Sequence[str], neutral: Mapping[str, object]) -> None:
    """Raise for an attribute that is neither supported nor set to the value that means "off".

    Args:
        node: The node.
        supported: Attributes that are lowered with any value.
        neutral: Attributes that are accepted with this value only.

    Raises:
        UnsupportedModelError: if there is one.
    """
    for name, value in node.attributes.items():
        if name in neutral:
            if value != neutral[name]:
                raise node.error(f"attribute '{name}' is not supported", got=value, expected=repr(neutral[name]))
        elif name not in supported and not name.startswith(_INTERNAL):
            raise node.error(f"unknown attribute '{name}'", expected=", ".join(supported), hint="export without it")


def refuse_inputs(node: Node, names: Mapping[int, str], count: int) -> None:
    """Raise for an input that is given although it is not supported.

    Args:
        node: The node.
        names: Index -> name of the inputs that are not supported.
        count: Number of inputs that the pinned operator has.

    Raises:
        UnsupportedModelError: if there is one.
    """
    for index, spec in enumerate(node.inputs):
        if spec is not None and (index in names or index >= count):
            name = f"input '{names[index]}'" if index in names else f"input {index}"
            raise node.error(f"{name} is not supported", got=spec, hint="export without it")


def past_and_capacity(node: Node, key_index: int) -> tuple[TensorSpec | None, TensorSpec | None, bool]:
    """The types of past_key and past_value, and whether they are buffers of fixed capacity.

    Raises:
        UnsupportedModelError: if only one is given, they have not four dimensions, or a capacity lacks a past.
    """
    key, value = node.input(key_index), node.input(key_index + 1)
    if (key is None) != (value is None):
        raise node.error("inputs 'past_key' and 'past_value'", got="one of them", expected="both or none")
    for name, spec in (("past_key", key), ("past_value", value)):
        if spec is not None and spec.rank != 4:
            raise node.error(f"input '{name}' has the wrong shape", got=spec, expected="[B, Hkv, P, d]")
    capacity = bool(node.attr(CAPACITY, 0))
    if capacity and key is None:
        raise node.error("input 'past_key' is missing", hint="a cache of fixed capacity needs one")
    return key, value, capacity


def check_mask(node: Node, mask: TensorSpec | None, name: str, sizes: Sequence[Dim]) -> None:
    """Raise if a mask or bias does not broadcast to [B, Hq, T, S]; its last dimension may be shorter.

    Raises:
        UnsupportedModelError: if it does not.
    """
    if mask is None:
        return
    fits = 1 <= mask.rank <= 4
    if fits:
        *leading, columns = zip(mask.shape, sizes[4 - mask.rank :], strict=True)
        fits = all(got in (None, 1) or want is None or got == want for got, want in leading)
        fits = fits and (columns[0] is None or columns[1] is None or columns[0] <= columns[1])
    if not fits:
        wanted = ",".join("?" if d is None else str(d) for d in sizes)
        raise node.error(f"input '{name}' has the wrong shape", got=mask, expected=f"to broadcast to [{wanted}]")


def known(*dims: Dim) -> Dim:
    """The first of several equal dimensions that is static, None if none is."""
    return next((d for d in dims if d is not None), None)


def total(a: Dim, b: Dim) -> Dim:
    """Sum of two dimensions, open if one of them is."""
    return None if a is None or b is None else a + b
