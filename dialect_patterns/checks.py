"""Checks that the modules of this folder share."""

from __future__ import annotations

from .node import FLOATS, Node, TensorSpec


def only_attributes(node: Node, *known: str) -> None:
    """Refuse attributes that the module does not look at, since they may change the meaning.

    Raises:
        UnsupportedModelError: if the node has another attribute than ``known``.
    """
    for name in node.attributes:
        if name not in known:
            expected = ", ".join(known) or "none"
            raise node.error(f"unknown attribute '{name}'", expected=expected, hint="export without it")


def float_input(node: Node, index: int, name: str) -> TensorSpec:
    """The type of a required floating-point input.

    Raises:
        UnsupportedModelError: if it is left out or of another type.
    """
    spec = node.required(index, name)
    if spec.dtype not in FLOATS:
        raise node.error(f"input '{name}' has an unsupported type", got=spec.dtype, expected=" or ".join(FLOATS))
    return spec


def require_dtype(node: Node, name: str, spec: TensorSpec, *dtypes: str) -> None:
    """Refuse an input of another element type.

    Raises:
        UnsupportedModelError: if the type of ``spec`` is none of ``dtypes``.
    """
    if spec.dtype not in dtypes:
        raise node.error(f"input '{name}' has an unsupported type", got=spec.dtype, expected=" or ".join(dtypes))


def require_shape(node: Node, name: str, spec: TensorSpec, *shapes: tuple[int | None, ...]) -> None:
    """Refuse an input that fits none of ``shapes``; None fits, and in the input an open dimension does.

    Raises:
        UnsupportedModelError: if no shape fits.
    """
    for shape in shapes:
        if len(shape) == spec.rank and all(
            got is None or want is None or got == want for got, want in zip(spec.shape, shape, strict=True)
        ):
            return
    expected = " or ".join("[" + ",".join("?" if d is None else str(d) for d in shape) + "]" for shape in shapes)
    raise node.error(f"input '{name}' has the wrong shape", got=spec, expected=expected)


def refuse_outputs(node: Node, *outputs: tuple[int, str]) -> None:
    """Refuse optional outputs that are wanted but not computed.

    Raises:
        UnsupportedModelError: if one of the outputs is used.
    """
    for index, name in outputs:
        if is_wanted(node, index):
            raise node.error(f"output '{name}' is not supported", hint="it exists for training; export without it")


def is_wanted(node: Node, index: int) -> bool:
    """Whether the node lists output ``index`` and something uses it."""
    return index < node.num_outputs and (not node.used_outputs or node.used_outputs[index])
