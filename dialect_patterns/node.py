"""One view of an operator's node, whether it is read from ONNX or from MLIR.

The op modules (``linear_attention``, ``causal_conv``, ``norms``, ...) check and lower this view and never look at a
``NodeProto`` or a ``torch.operator`` themselves, so a contract is checked before compiling by the same code that the
patterns use later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from linattn.runtime.errors import UnsupportedModelError

Dim = int | None
"""A dimension: its size, or None where it is open."""

FLOATS = ("f32", "f16", "bf16")
"""The floating-point element types the operators take, by MLIR name."""

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and element type of a tensor.

    Attributes:
        shape: One entry a dimension, None where the size is open.
        dtype: MLIR's name of the element type, signless: ``f32``, ``f16``, ``bf16``, ``i64``, ``i32``, ``i8``, ``i1``.
    """

    shape: tuple[Dim, ...]
    dtype: str

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __str__(self) -> str:
        return "x".join(["?" if d is None else str(d) for d in self.shape] + [self.dtype])


@dataclass(frozen=True)
class Node:
    """An operator's node.

    Attributes:
        name: The node's name in the model (or one made from its op and position).
        domain: ``""`` for ai.onnx, else the domain, such as ``com.microsoft``.
        op_type: The operator's name.
        version: The opset version of ``domain`` that the model imports.
        inputs: The inputs' types, None for an optional input that is left out.
        num_outputs: How many outputs the node lists, left-out ones included.
        attributes: Attribute values: int, float, str, bytes-free lists of them.
        used_outputs: For each output whether it is named (wanted).
        weights: Inputs that are weights of the model, stored in globals.
    """

    name: str
    domain: str
    op_type: str
    version: int
    inputs: tuple[TensorSpec | None, ...]
    num_outputs: int = 1
    attributes: Mapping[str, object] = field(default_factory=dict[str, object])
    used_outputs: tuple[bool, ...] = ()
    weights: frozenset[int] = frozenset()
    _asked: set[int] = field(default_factory=set[int], init=False, repr=False, compare=False)

    @property
    def where(self) -> str:
        """How errors name the node."""
        domain = f"{self.domain}." if self.domain else ""
        return f"node '{self.name}' ({domain}{self.op_type})"

    def input(self, index: int) -> TensorSpec | None:
        """The type of input ``index``, None where it is left out."""
        self._asked.add(index)
        return self.inputs[index] if index < len(self.inputs) else None

    def required(self, index: int, name: str) -> TensorSpec:
        """The type of an input that must be there.

        Raises:
            UnsupportedModelError: if it is left out.
        """
        spec = self.input(index)
        if spec is None:
            raise self.error(f"input '{name}' is missing", hint=f"give the node its '{name}'")
        return spec

    def refuse_other_inputs(self) -> None:
        """Refuse inputs beyond those that the contract has asked for.

        Raises:
            UnsupportedModelError: if there is one: ONNX's checker does not know the operators that it does not define.
        """
        last = max(self._asked, default=-1)
        if any(spec is not None for spec in self.inputs[last + 1 :]):
            raise self.error("too many inputs", got=len(self.inputs), expected=f"at most {last + 1}")

    def attr(self, name: str, default: T) -> T:
        """An attribute's value, or ``default``; the value must have the default's type.

        Raises:
            UnsupportedModelError: if the attribute has another type.
        """
        value = self.attributes.get(name, default)
        if isinstance(default, float) and isinstance(value, int):
            value = float(value)
        if default is not None and not isinstance(value, type(default)):
            raise self.error(f"attribute '{name}'", got=repr(value), expected=f"a {type(default).__name__}")
        return value  # pyright: ignore[reportReturnType]

    def error(
        self, message: str, *, got: object = None, expected: object = None, hint: str | None = None
    ) -> UnsupportedModelError:
        """An error about this node, to be raised by the caller."""
        return UnsupportedModelError(message, where=self.where, got=got, expected=expected, hint=hint)
