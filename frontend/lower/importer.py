"""ONNX graphs into MLIR: one function an entry point, one copy of the weights for all of them.

This is the only file that touches IREE's ONNX importer. It adds to it: weights become module-level globals that every
entry point reads; nodes carry their domain, opset and name; KV caches of fixed capacity are
returned in the buffers that they came in.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import onnx
from iree.compiler import ir
from iree.compiler.dialects import func
from iree.compiler.extras import onnx_importer
from linattn.dialect_patterns.rewrite import DOMAIN, NODE, VERSION
from linattn.runtime.errors import UnsupportedModelError

from ..graph.schema import domain_of, is_list_of_floats, is_weight
from ..graph.specialize import SpecializedGraph
from .weights import Weights


class _EntryPointImporter(onnx_importer.NodeImporter):
    """IREE's importer with our weights and node attributes."""

    weights: Weights
    versions: Mapping[str, int]

    def import_initializer(self, initializer: onnx.TensorProto, extern_name: str | None = None) -> ir.Value:
        inside = initializer.name not in self.weights.arrays and not is_weight(initializer)
        if inside and not is_list_of_floats(initializer):
            return super().import_initializer(initializer, cast(str, extern_name))
        with ir.InsertionPoint(self._b), ir.Location.name(initializer.name):
            torch_type = self._cc.tensor_proto_to_type(initializer)
            loaded = self.weights.load(initializer)
            value = ir.Operation.create("torch_c.from_builtin_tensor", results=[torch_type], operands=[loaded]).result
        self._nv_map[initializer.name] = value
        return value

    def import_node(self, node: onnx.NodeProto) -> None:
        try:
            super().import_node(node)
        except onnx.shape_inference.InferenceError as error:  # of the function that IREE writes for the operator
            raise UnsupportedModelError(
                f"its inputs do not fit: {' '.join(str(error).split())[:300]}",
                where=f"node '{node.name}' ({node.op_type})",
                hint="export the model again",
            ) from error
        except Exception as error:
            error.add_note(f"node '{node.name}' ({node.op_type})")
            raise
        operation = self._b.operations[len(self._b.operations) - 1].operation
        domain = domain_of(node)
        operation.attributes[DOMAIN] = ir.StringAttr.get(domain)
        operation.attributes[NODE] = ir.StringAttr.get(node.name)
        operation.attributes[VERSION] = ir.IntegerAttr.get(
            ir.IntegerType.get_signless(64), self.versions.get(domain, 1)
        )


@dataclass(frozen=True)
class Signature:
    """Arguments and results of an entry point, by graph value.

    Attributes:
        arguments: Graph inputs in the order of the ABI.
        results: Graph outputs, in the order of the ABI.
        tied: Result -> the argument whose buffer it is written into.
        takes_position: Whether an i64 argument after the graph inputs says how many tokens are committed.
        takes_results: Whether the memory of each result that is not tied is an argument too, after all others.
    """

    arguments: Sequence[str]
    results: Sequence[str]
    tied: Mapping[str, str]
    takes_position: bool
    takes_results: bool = False


def import_entry_point(
    symbol: str, graph: SpecializedGraph, signature: Signature, weights: Weights, reflection: Mapping[str, str]
) -> None:
    """Add one entry point to the module of ``weights``.

    Args:
        symbol: Name of the function.
        graph: Its graph.
        signature: Its arguments and results.
        weights: Shared by all entry points.
        reflection: Text attributes that a runtime can read from the compiled function.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.proto)
    del model.graph.value_info[:]
    declared = {v.name for v in (*model.graph.input, *model.graph.output)}
    for name, value_type in graph.types.items():
        if name not in declared:
            model.graph.value_info.append(onnx.ValueInfoProto(name=name, type=value_type))
    for value in model.graph.output:
        value.type.CopyFrom(graph.types[value.name])
    module_op = weights.module.operation
    cache = onnx_importer.ContextCache(module_op.context)
    info = onnx_importer.GraphInfo(onnx_importer.ModelInfo(model), model.graph)
    inputs = [cache.type_proto_to_type(graph.types[name]) for name in signature.arguments]
    if signature.takes_position:
        inputs.append(ir.Type.parse("!torch.int"))
    types = {name: cache.type_proto_to_type(graph.types[name]) for name in signature.results}
    given = [name for name in signature.results if signature.takes_results and name not in signature.tied]
    inputs += [ir.Type.parse(str(types[name]).replace("!torch.vtensor", "!torch.tensor")) for name in given]
    returned = [name for name in signature.results if name not in given]
    results = [types[name] for name in returned]
    function = func.FuncOp(symbol, ir.FunctionType.get(inputs, results), ip=ir.InsertionPoint(weights.module.body))
    text = {key: ir.StringAttr.get(value) for key, value in reflection.items()}
    function.operation.attributes["iree.reflection"] = ir.DictAttr.get(text)
    index = ir.IndexType.get()
    tied = {r: ir.IntegerAttr.get(index, list(signature.arguments).index(a)) for r, a in signature.tied.items()}
    function.operation.attributes["res_attrs"] = ir.ArrayAttr.get(
        [ir.DictAttr.get({"iree.abi.tied": tied[name]} if name in tied else {}) for name in returned]
    )
    block = function.add_entry_block()
    importer = _EntryPointImporter(
        info,
        parent_op=function,
        block=block,
        context_cache=cache,
        module_op=module_op,
        module_cache=onnx_importer.ModuleCache(module_op, cache),
    )
    importer.weights = weights
    importer.versions = {("" if o.domain == "ai.onnx" else o.domain): o.version for o in model.opset_import}
    importer._populate_graph_attrs(function)  # pyright: ignore[reportPrivateUsage]
    values = importer._nv_map  # pyright: ignore[reportPrivateUsage]
    for name, argument in zip(signature.arguments, block.arguments, strict=False):
        values[name] = argument
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optional outputs that a node leaves out have no type
        for tensor in model.graph.initializer:
            importer.import_initializer(tensor)
        importer.get_none()
        for node in model.graph.node:
            importer.import_node(node)
    with ir.InsertionPoint(block):
        for name, storage in zip(given, list(block.arguments)[len(inputs) - len(given) :], strict=True):
            ir.Operation.create("torch.overwrite.tensor.contents", operands=[values[name], storage])
        func.ReturnOp([values[name] for name in returned])
