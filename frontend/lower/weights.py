"""The weights of a module: each a global that all entry points read, stored once by content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from iree.compiler import ir
from onnx import numpy_helper

from ..graph.schema import DTYPES, MIN_WEIGHT_ELEMENTS

_INLINED = 256
"""Bytes up to which IREE puts a constant into the kernels that read it."""


def content_key(array: np.ndarray[Any, Any]) -> str:
    """What a weight is called in an archive: the SHA-256 of its bytes, hex; the same for every name and target."""
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


@dataclass
class Weights:
    """The weights of the module, each a global of its own.

    Names do not tell weights apart: a value that was folded for one entry point has the name of another entry point's,
    and tied weights have two. What they hold does.

    Attributes:
        module: The module they are added to.
        arrays: Initializer name -> values, for weights outside the graph; the same in every entry point.
        array_keys: Initializer name -> `content_key` of those values.
        parameter_scope: Scope of IREE parameters if the weights lie in a file of their own, else None.
        stored: Symbol -> values, of the globals made so far.
        keys: Symbol -> `content_key` of its values.
    """

    module: ir.Module
    arrays: Mapping[str, np.ndarray[Any, Any]]
    array_keys: Mapping[str, str]
    parameter_scope: str | None = None
    stored: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, "np.ndarray[Any, Any]"])
    keys: dict[str, str] = field(default_factory=dict[str, str])
    _outside: dict[str, str] = field(default_factory=dict[str, str])
    _symbols: dict[tuple[str, str], str] = field(default_factory=dict[tuple[str, str], str])
    _types: dict[str, ir.RankedTensorType] = field(default_factory=dict[str, ir.RankedTensorType])

    def load(self, tensor: onnx.TensorProto) -> ir.Value:
        """Read a weight at the current insertion point, as a builtin tensor.

        Short lists of numbers are kept out of kernels, which would be another one for each layer of a model. Those of
        bf16 have to be: where IREE 3.13 computes with 16-bit integers instead, it forgets constants, and what it makes
        of them is not valid (SPIR-V: a bit cast of 32 bits to 16).
        """
        symbol = self._outside.get(tensor.name)
        if symbol is None:
            array = self.arrays.get(tensor.name)
            outside = array is not None
            if array is None:
                array = numpy_helper.to_array(tensor)
            array = np.ascontiguousarray(array)
            key = self.array_keys[tensor.name] if outside else content_key(array)
            symbol = self._symbol_of(tensor.name, array, ir.Type.parse(DTYPES[tensor.data_type]), key)
            if outside:
                self._outside[tensor.name] = symbol
        return self._read(symbol)

    def repacked(
        self,
        symbol: str,
        layout: str,
        repack: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]],
        dtype: str | None = None,
    ) -> ir.Value:
        """See :class:`linattn.dialect_patterns.op.WeightStore`."""
        name = f"{symbol}.{layout}"
        if name not in self.stored:
            array = np.ascontiguousarray(repack(self.stored[symbol]))
            element = self._types[symbol].element_type if dtype is None else ir.Type.parse(dtype)
            self._define(name, array, element, content_key(array))
        return self._read(name)

    def archive(self) -> dict[str, np.ndarray[Any, Any]]:
        """Parameter key -> values, for a file of their own; short lists stay in the module."""
        return {self.keys[symbol]: array for symbol, array in self.stored.items() if not _is_short(array)}

    def drop_unused(self) -> None:
        """Forget the weights that nothing in the module reads any more; IREE drops their globals."""
        used: set[str] = set()

        def visit(op: ir.Operation) -> ir.WalkResult:
            if op.name == "util.global.load" and _is_read(op):
                used.add(ir.FlatSymbolRefAttr(op.attributes["global"]).value)
            return ir.WalkResult.ADVANCE

        self.module.operation.walk(visit)
        for symbol in [symbol for symbol in self.stored if symbol not in used]:
            del self.stored[symbol], self.keys[symbol]

    def _symbol_of(self, name: str, array: np.ndarray[Any, Any], element: ir.Type, key: str) -> str:
        """The global that holds these values, made where there is none yet."""
        place = key, f"{list(array.shape)} {element}"
        if place not in self._symbols:
            symbol = self._symbols[place] = f"{len(self._symbols)}." + re.sub(r"[^\w.]", "_", name)
            self._define(symbol, array, element, key)
        return self._symbols[place]

    def _read(self, symbol: str) -> ir.Value:
        value_type, reference = self._types[symbol], ir.FlatSymbolRefAttr.get(symbol)
        return ir.Operation.create("util.global.load", results=[value_type], attributes={"global": reference}).result

    def _define(self, symbol: str, array: np.ndarray[Any, Any], element: ir.Type, key: str) -> None:
        value_type = self._types[symbol] = ir.RankedTensorType.get(list(array.shape), element)
        self.stored[symbol] = array
        self.keys[symbol] = key
        if self.parameter_scope is not None and not _is_short(array):
            text = f'#flow.parameter.named<"{self.parameter_scope}"::"{key}"> : {value_type}'
            value = ir.Attribute.parse(text)
        else:
            value = ir.DenseResourceElementsAttr.get_from_buffer(
                array.view(np.uint8).reshape(-1) if array.size else b"", symbol, value_type, alignment=64
            )
        attributes: dict[str, ir.Attribute] = {
            "sym_name": ir.StringAttr.get(symbol),
            "sym_visibility": ir.StringAttr.get("private"),
            "type": ir.TypeAttr.get(value_type),
        }
        is_hidden = str(element) in ("f32", "f16", "bf16") and array.nbytes <= _INLINED
        with ir.InsertionPoint.at_block_begin(self.module.body):
            if is_hidden:
                _store_when_loaded(symbol, value_type, value)
            else:
                attributes["initial_value"] = value
            # Before the initializer that writes it.
            at_start: Any = ir.InsertionPoint.at_block_begin(self.module.body)
            with at_start:
                ir.Operation.create("util.global", attributes=attributes)


def _store_when_loaded(symbol: str, value_type: ir.Type, value: ir.Attribute) -> None:
    """Have the module write a global when it is loaded: the compiler does not know what it holds.

    A barrier where it is read would hide that too, but what comes from a barrier is nobody else's to IREE: a Scatter
    into such a list wrote into the list itself.
    """
    op: Any = ir.Operation.create(
        "util.initializer",
        regions=1,
        attributes={"function_type": ir.TypeAttr.get(ir.FunctionType.get([], []))},
    )
    with ir.InsertionPoint(op.regions[0].blocks.append()):
        constant = ir.Operation.create("arith.constant", results=[value_type], attributes={"value": value}).result
        hidden = ir.Operation.create("util.optimization_barrier", results=[value_type], operands=[constant]).result
        ir.Operation.create(
            "util.global.store", operands=[hidden], attributes={"global": ir.FlatSymbolRefAttr.get(symbol)}
        )
        ir.Operation.create("util.return")


def _is_short(array: np.ndarray[Any, Any]) -> bool:
    """Whether the module holds it itself: a place in a file takes as many bytes."""
    return array.size < MIN_WEIGHT_ELEMENTS


def _is_read(op: ir.Operation) -> bool:
    """Whether something but unused casts reads a result of ``op``."""
    users = [use.owner.operation for result in op.results for use in result.uses]
    return any(not user.name.startswith("torch_c.") or _is_read(user) for user in users)
