"""Values of the imported module, which is in the torch dialect, as builtin tensors and back."""

from __future__ import annotations

import re
from collections.abc import Sequence

from iree.compiler import ir

from ..node import TensorSpec
from .builder import Builder, spec_of, tensor_type

_VTENSOR = re.compile(r"!torch\.vtensor<\[([^\]]*)\],([a-z0-9]+)>")


def spec_from_torch(torch_type: ir.Type) -> TensorSpec | None:
    """Shape and dtype of a ``!torch.vtensor`` type, None for ``!torch.none``."""
    text = str(torch_type)
    if text == "!torch.none":
        return None
    match = _VTENSOR.fullmatch(text)
    if match is None:
        raise AssertionError(f"not a tensor with known rank: {text}")
    dims = tuple(None if d == "?" else int(d) for d in match[1].split(",") if d)
    return TensorSpec(dims, re.sub(r"^[su]i", "i", match[2]))


def to_builtin(value: ir.Value) -> ir.Value | None:
    """A torch tensor as a builtin tensor with signless elements; None for ``!torch.none``."""
    spec = spec_from_torch(value.type)
    if spec is None:
        return None
    result = tensor_type(spec.shape, spec.dtype)
    return ir.Operation.create("torch_c.to_builtin_tensor", results=[result], operands=[value]).result


def from_builtin(value: ir.Value, torch_type: ir.Type) -> ir.Value:
    """A builtin tensor as the given torch type, with the static dimensions that type has."""
    spec = spec_from_torch(torch_type)
    assert spec is not None
    if spec_of(value).dtype != spec.dtype:
        raise AssertionError(f"{spec_of(value)} returned for {spec}")
    refined = Builder().refine(value, spec)
    return ir.Operation.create("torch_c.from_builtin_tensor", results=[torch_type], operands=[refined]).result


def before_reshape(value: ir.Value) -> ir.Value | None:
    """The builtin tensor that an ONNX Reshape made a builtin tensor of, which moves nothing; None if none did."""
    operation = _operator(value, "onnx.Reshape")
    return None if operation is None else to_builtin(operation.operands[0])


def before_transpose(value: ir.Value, permutation: Sequence[int]) -> ir.Value | None:
    """The builtin tensor that an ONNX Transpose with this permutation made a builtin tensor of; None if none did."""
    operation = _operator(value, "onnx.Transpose")
    if operation is None or "torch.onnx.perm" not in operation.attributes:
        return None
    axes = ir.ArrayAttr(operation.attributes["torch.onnx.perm"])
    if [ir.IntegerAttr(axis).value for axis in axes] != list(permutation):
        return None
    return to_builtin(operation.operands[0])


def _operator(value: ir.Value, name: str) -> ir.Operation | None:
    """The imported operator of this name that a builtin tensor is the result of; None if it is of anything else."""
    cast = value.owner
    if isinstance(cast, ir.Block) or cast.operation.name != "torch_c.to_builtin_tensor":
        return None
    owner = cast.operation.operands[0].owner
    if isinstance(owner, ir.Block) or owner.operation.name != "torch.operator":
        return None
    return owner.operation if ir.StringAttr(owner.operation.attributes["name"]).value == name else None
