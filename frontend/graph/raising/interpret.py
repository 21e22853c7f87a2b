"""A node as an operation on tensors of sums and products."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import onnx
from linattn.dialect_patterns.op import MICROSOFT

from ..schema import attributes_of, domain_of
from .algebra import Algebra, NotProvenError, Tensor
from .sizes import Size
from .values import Values

_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT16: 11,
    onnx.TensorProto.BFLOAT16: 8,
    onnx.TensorProto.FLOAT: 24,
}
"""Bits of a float's significand. bf16 and f16 do not contain each other: a cast between them rounds."""


class Interpreter:
    """Computes nodes on tensors.

    Attributes:
        algebra: Where the tensors' variables are from.
        values: What is known of the graph around.
        types: Element type of values of the body.
    """

    def __init__(self, algebra: Algebra, values: Values, types: dict[str, int]) -> None:
        self.algebra = algebra
        self.values = values
        self.types = types

    def run(self, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
        """The node's first output.

        Raises:
            NotProvenError: if it is not a product, a sum or a move of what is known.
        """
        step = _STEPS.get((domain_of(node), node.op_type))
        if step is None:
            raise NotProvenError("is not understood")
        tensor = step(self, node, known)
        self.types.setdefault(node.output[0], self._type(node))
        return tensor

    def tensor(self, name: str, known: Mapping[str, Tensor]) -> Tensor:
        """An operand: what is known of it, or a constant number."""
        found = known.get(name)
        if found is not None:
            return found
        number = self.values.number(name)
        if number is None:
            raise NotProvenError(f"reads '{name}', which is neither an input of the body nor a number")
        rank = len(value.shape) if (value := self.values.constant(name)) is not None else 0
        return self.algebra.unsqueeze(self.algebra.number(number), list(range(rank)))

    def ints(self, node: onnx.NodeProto, port: int, attribute: str) -> list[int] | None:
        """Axes and the like, from an input or, in older opsets, an attribute."""
        if port < len(node.input) and node.input[port]:
            value = self.values.constant(node.input[port])
            if value is None:
                raise NotProvenError(f"takes its {attribute} from what is not constant")
            return [int(v) for v in value.reshape(-1)]
        found = attributes_of(node).get(attribute)
        return [int(v) for v in found] if isinstance(found, list) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]

    def sizes(self, node: onnx.NodeProto) -> tuple[Size, ...]:
        """The shape that the second input holds."""
        found = self.values.sizes(node.input[1])
        if found is None:
            raise NotProvenError("takes its shape from what is not known")
        return found

    def _type(self, node: onnx.NodeProto) -> int:
        """Element type of its output."""
        if node.op_type == "Cast":
            return int(str(attributes_of(node)["to"]))
        if node.op_type == "CastLike":
            return self.type_of(node.input[1])
        return next((t for name in node.input if (t := self.type_of(name))), 0)

    def type_of(self, name: str) -> int:
        """Element type of a value, 0 if it is not known."""
        if name in self.types:
            return self.types[name]
        proto = self.values.types.get(name)
        return proto.tensor_type.elem_type if proto is not None else 0


def _cast(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    tensor = run.tensor(node.input[0], known)
    before = run.type_of(node.input[0])
    after = run.type_of(node.input[1]) if node.op_type == "CastLike" else int(str(attributes_of(node)["to"]))
    if before not in _BITS or after not in _BITS:
        raise NotProvenError("converts from or to another type than f32, f16 and bf16")
    loses = before != after and (
        _BITS[after] < _BITS[before] or {before, after} == {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    )
    return replace(tensor, rounded=tensor.rounded or loses)


def _constant(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    del known
    return run.tensor(node.output[0], {})


def _transpose(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    tensor = run.tensor(node.input[0], known)
    permutation = run.ints(node, 9, "perm") or list(range(len(tensor.axes)))[::-1]
    if sorted(permutation) != list(range(len(tensor.axes))):
        raise NotProvenError("permutes another number of axes")
    return run.algebra.transpose(tensor, permutation)


def _unsqueeze(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.algebra.unsqueeze(run.tensor(node.input[0], known), run.ints(node, 1, "axes") or [])


def _squeeze(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.algebra.squeeze(run.tensor(node.input[0], known), run.ints(node, 1, "axes"))


def _reshape(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    tensor = run.tensor(node.input[0], known)
    shape: list[Size | None] = []
    for i, size in enumerate(run.sizes(node)):
        if size.value == 0 and not attributes_of(node).get("allowzero"):
            if i >= len(tensor.axes):
                raise NotProvenError("copies a size that is not there")
            shape.append(run.algebra.size(tensor.axes[i]))
        else:
            shape.append(None if size.value == -1 else size)
    return run.algebra.reshape(tensor, shape)


def _expand(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.algebra.expand(run.tensor(node.input[0], known), run.sizes(node))


def _tile(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.algebra.tile(run.tensor(node.input[0], known), run.sizes(node))


def _identity(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.tensor(node.input[0], known)


def _neg(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.algebra.scale(run.tensor(node.input[0], known), -1.0)


def _mul(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.algebra.multiply(run.tensor(node.input[0], known), run.tensor(node.input[1], known))


def _div(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    number = run.values.number(node.input[1]) if node.input[1] not in known else None
    if not number:
        raise NotProvenError("divides by what is not a number")
    return run.algebra.scale(run.tensor(node.input[0], known), 1.0 / number)


def _add(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    total = run.tensor(node.input[0], known)
    for name in node.input[1:]:
        total = run.algebra.add(total, run.tensor(name, known))
    return total


def _sub(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    other = run.algebra.scale(run.tensor(node.input[1], known), -1.0)
    return run.algebra.add(run.tensor(node.input[0], known), other)


def _matmul(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.algebra.matmul(run.tensor(node.input[0], known), run.tensor(node.input[1], known))


def _fused_matmul(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    """ONNX Runtime's product of matrices that may be transposed."""
    attributes = attributes_of(node)
    if attributes.get("transBatchA") or attributes.get("transBatchB"):
        raise NotProvenError("transposes the batch")
    operands: list[Tensor] = []
    for name, turned in zip(node.input, ("transA", "transB"), strict=True):
        tensor = run.tensor(name, known)
        rank = len(tensor.axes)
        if attributes.get(turned) and rank > 1:
            tensor = run.algebra.transpose(tensor, [*range(rank - 2), rank - 1, rank - 2])
        operands.append(tensor)
    return run.algebra.scale(run.algebra.matmul(*operands), float(str(attributes.get("alpha", 1.0))))


def _exp(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    return run.algebra.exp(run.tensor(node.input[0], known))


def _reduce(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    tensor = run.tensor(node.input[0], known)
    axes = run.ints(node, 1, "axes")
    if not axes:
        if attributes_of(node).get("noop_with_empty_axes"):
            return tensor
        axes = list(range(len(tensor.axes)))
    return run.algebra.contract(tensor, axes, keep=attributes_of(node).get("keepdims", 1) != 0)


def _einsum(run: Interpreter, node: onnx.NodeProto, known: Mapping[str, Tensor]) -> Tensor:
    left, arrow, right = str(attributes_of(node).get("equation", "")).replace(" ", "").partition("->")
    operands = left.split(",")
    letters = sorted(set(left) - {","})
    if not arrow or "." in left or any(len(set(o)) != len(o) for o in (*operands, right)) or set(right) - set(letters):
        raise NotProvenError("is an Einsum with dots, diagonals or no result")
    total: Tensor | None = None
    for labels, name in zip(operands, node.input, strict=True):
        tensor = run.tensor(name, known)
        if len(tensor.axes) != len(labels):
            raise NotProvenError("is an Einsum that does not fit its operands")
        tensor = run.algebra.transpose(tensor, [labels.index(c) for c in letters if c in labels])
        tensor = run.algebra.unsqueeze(tensor, [i for i, c in enumerate(letters) if c not in labels])
        total = tensor if total is None else run.algebra.multiply(total, tensor)
    assert total is not None
    total = run.algebra.contract(total, [i for i, c in enumerate(letters) if c not in right])
    kept: Sequence[str] = [c for c in letters if c in right]
    return run.algebra.transpose(total, [kept.index(c) for c in right])


Step = Callable[[Interpreter, onnx.NodeProto, Mapping[str, Tensor]], Tensor]

MOVES: dict[str, Step] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Tile": _tile,
    "Identity": _identity,
}
"""Operators that give the elements of their first input, in other places or repeated."""

_ARITHMETIC: dict[str, Step] = {
    "Cast": _cast,
    "CastLike": _cast,
    "Constant": _constant,
    "Neg": _neg,
    "Mul": _mul,
    "Div": _div,
    "Add": _add,
    "Sum": _add,
    "Sub": _sub,
    "MatMul": _matmul,
    "Exp": _exp,
    "ReduceSum": _reduce,
    "Einsum": _einsum,
}

_STEPS: dict[tuple[str, str], Step] = {("", name): step for name, step in (MOVES | _ARITHMETIC).items()} | {
    (MICROSOFT, "FusedMatMul"): _fused_matmul
}
