"""The operators we accept, and what ONNX's shape inference must know of those it lacks.

An operator is accepted if one of our patterns lowers it (``linattn.dialect_patterns.registry``) or IREE's importer
does. Shape inference of operators outside ONNX comes from the same contracts that the patterns use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, cast

import onnx
from linattn.dialect_patterns.node import Node, TensorSpec
from linattn.dialect_patterns.op import INTERNAL
from linattn.dialect_patterns.registry import OPS, find_op
from linattn.runtime.errors import LinattnError, UnsupportedModelError

MIN_WEIGHT_ELEMENTS = 256
"""Smaller initializers are written into the function: shapes and axes must be seen by the importer."""

DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "f32",
    onnx.TensorProto.FLOAT16: "f16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "f64",
    onnx.TensorProto.INT64: "i64",
    onnx.TensorProto.INT32: "i32",
    onnx.TensorProto.INT16: "i16",
    onnx.TensorProto.INT8: "i8",
    onnx.TensorProto.UINT64: "i64",
    onnx.TensorProto.UINT32: "i32",
    onnx.TensorProto.UINT16: "i16",
    onnx.TensorProto.UINT8: "i8",
    onnx.TensorProto.BOOL: "i1",
}
"""ONNX element types and the MLIR names that our contracts use."""

_ONNX_TYPES = {
    "f32": onnx.TensorProto.FLOAT,
    "f16": onnx.TensorProto.FLOAT16,
    "bf16": onnx.TensorProto.BFLOAT16,
    "f64": onnx.TensorProto.DOUBLE,
    "i64": onnx.TensorProto.INT64,
    "i32": onnx.TensorProto.INT32,
    "i8": onnx.TensorProto.UINT8,
    "i1": onnx.TensorProto.BOOL,
}

# What IREE 3.13's importer (torch-mlir's TorchOnnxToTorch) converts in the default domain. Sequence, optional,
# loop, random and training operators are left out: we cannot run them in a compiled step.
_IMPORTER_NAMES = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift
    BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv
    ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout DynamicQuantizeLinear
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Hardmax
    Identity InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax
    LpNormalization LpPool MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg
    NonZero Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear Range Reciprocal ReduceL1
    ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
    Relu Reshape Resize Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice
    Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Where Xor
"""
IMPORTER_OPS = frozenset(_IMPORTER_NAMES.split())

MAX_PROPAGATED = 1024
"""Elements of a list whose values shape inference may follow."""

MAX_SEEN = 1 << 20
"""Elements of a list that shape inference may see: it makes a symbol for each where it knows no values."""

NOT_IN_ONNX = frozenset((op.domain, op.op_type) for op in OPS if not onnx.defs.has(op.op_type, domain=op.domain))
"""Operators of ours that ONNX does not define; found before they are registered with it."""

CAPACITY = "linattn.capacity"
"""Attribute that marks an attention node whose KV cache is a buffer of fixed capacity, updated in place."""


def domain_of(node: onnx.NodeProto | onnx.FunctionProto) -> str:
    """The canonical domain: ``""`` for ai.onnx."""
    return "" if node.domain == "ai.onnx" else node.domain


def opset_versions(proto: onnx.ModelProto) -> dict[str, int]:
    """Domain -> opset version that the model imports; the default domain is ``""``."""
    return {("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import}


def spec_of_type(proto: onnx.TypeProto | None) -> TensorSpec | None:
    """The contract's view of an ONNX tensor type, None if it is not known."""
    if proto is None or not proto.HasField("tensor_type") or proto.tensor_type.elem_type not in DTYPES:
        return None
    if not proto.tensor_type.HasField("shape"):
        return None
    dims = tuple(d.dim_value if d.HasField("dim_value") else None for d in proto.tensor_type.shape.dim)
    return TensorSpec(dims, DTYPES[proto.tensor_type.elem_type])


def type_of_spec(spec: TensorSpec, like: onnx.TypeProto | None = None) -> onnx.TypeProto:
    """An ONNX tensor type; dims that are open in ``spec`` take the symbol of ``like``'s."""
    proto = onnx.helper.make_tensor_type_proto(_ONNX_TYPES[spec.dtype], list(spec.shape))
    if like is not None and len(like.tensor_type.shape.dim) == spec.rank:
        for dim, old in zip(proto.tensor_type.shape.dim, like.tensor_type.shape.dim, strict=True):
            if not dim.HasField("dim_value") and old.HasField("dim_param"):
                dim.dim_param = old.dim_param
    return proto


def attributes_of(node: onnx.NodeProto) -> dict[str, object]:
    """Attribute values as Python numbers, strings and lists."""

    def plain(value: Any) -> object:
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return [plain(v) for v in cast("list[object]", value)] if isinstance(value, list | tuple) else value

    return {a.name: plain(onnx.helper.get_attribute_value(a)) for a in node.attribute}


def is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer becomes a global of the module; smaller ones are written into the functions."""
    return tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) >= MIN_WEIGHT_ELEMENTS


def is_list_of_floats(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer, however small, is kept out of the kernels that read it: a global of the module too."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return tensor.data_type in floats and math.prod(tensor.dims) > 1


def node_view(
    node: onnx.NodeProto,
    types: Mapping[str, onnx.TypeProto],
    versions: Mapping[str, int],
    weights: Collection[str] = (),
) -> Node:
    """The contract's view of an ONNX node.

    Args:
        node: The node.
        types: Types of the graph's values.
        versions: Domain -> opset version.
        weights: Names of the initializers that become globals, see :func:`is_weight`.

    Raises:
        UnsupportedModelError: if the type of an input is not known.
    """
    domain = domain_of(node)
    inputs: list[TensorSpec | None] = []
    for name in node.input:
        spec = spec_of_type(types.get(name)) if name else None
        if name and spec is None:
            raise UnsupportedModelError(
                f"the shape of its input '{name}' is not known",
                where=f"node '{node.name}' ({node.op_type})",
                hint="run the exporter's shape inference, or bind open dims with --dim NAME=N",
            )
        inputs.append(spec)
    used = tuple(bool(name) for name in node.output)
    version = versions.get(domain, 1)
    constant = frozenset(i for i, name in enumerate(node.input) if name in weights)
    return Node(node.name, domain, node.op_type, version, tuple(inputs), len(used), attributes_of(node), used, constant)


def is_supported(domain: str, op_type: str, version: int) -> bool:
    """Whether a pattern of ours or IREE's importer lowers the operator."""
    ours = domain != INTERNAL and find_op(domain, op_type, version) is not None
    return ours or (domain == "" and op_type in IMPORTER_OPS)


def check_supported(
    nodes: Sequence[onnx.NodeProto],
    versions: Mapping[str, int],
    misses: Mapping[str, str] | None = None,
    *,
    passed: Collection[str] = (),
) -> None:
    """Name the first node that cannot be compiled.

    Args:
        nodes: The nodes.
        versions: Domain -> opset version.
        misses: Node -> why it did not become one of our operators, where that was tried.
        passed: Operators of ONNX that are not looked at.

    Raises:
        UnsupportedModelError: if there is one.
    """
    for node in nodes:
        domain = domain_of(node)
        if domain == "" and node.op_type in passed:
            continue
        if not is_supported(domain, node.op_type, versions.get(domain, 1)):
            label = f"{domain or 'ai.onnx'}.{node.op_type}"
            miss = (misses or {}).get(node.name)
            raise UnsupportedModelError(
                f"the operator {label} is not supported",
                where=f"node '{node.name}'",
                got=f"not LinearAttention in other words: it {miss}" if miss else None,
                hint="export the model without it, or see the support table in the README",
            )
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise UnsupportedModelError(
                f"the operator {node.op_type} with a subgraph is not supported",
                where=f"node '{node.name}'",
                hint="export the model with its control flow unrolled",
            )


class _ContextAttributes(Mapping[str, object]):
    """The attributes of the node that ONNX's inference is at; they can be asked for but not listed."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getitem__(self, name: str) -> object:
        attribute = self._context.get_attribute(name)
        if attribute is None or not attribute.name:
            raise KeyError(name)
        return attributes_of(onnx.NodeProto(attribute=[attribute]))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _infer(domain: str, op_type: str, context: Any) -> None:
    """ONNX's inference callback: types from the contract; silent where the contract refuses (that is checked apart)."""
    op = find_op(domain, op_type, 1 << 30)
    assert op is not None
    count, outputs = context.get_num_inputs(), context.get_num_outputs()
    types = [context.get_input_type(i) if context.has_input(i) else None for i in range(count)]
    specs = tuple(spec_of_type(t) for t in types)
    if any(t is not None and spec is None for t, spec in zip(types, specs, strict=True)):
        return
    used = tuple(context.has_output(i) for i in range(outputs))
    node = Node("", domain, op_type, 1 << 30, specs, outputs, _ContextAttributes(context), used)
    try:
        results = op.output_types(op.parse(node))
    except LinattnError:
        return
    for i, spec in enumerate(results[:outputs]):
        if spec is not None:
            # An open dim keeps the symbol it has in an input of the same shape, so that later nodes can match it.
            like = next((t for t, other in zip(types, specs, strict=True) if other == spec), types[0])
            context.set_output_type(i, type_of_spec(spec, like))


@cache
def register_schemas() -> None:
    """Teach ONNX's shape inference the operators of ours that ONNX does not define."""
    schema = onnx.defs.OpSchema
    for domain, op_type in sorted(NOT_IN_ONNX):
        variadic = schema.FormalParameterOption.Variadic
        parameters: dict[str, Any] = {
            kind: [
                schema.FormalParameter(kind, "tensor(float)", param_option=variadic, is_homogeneous=False, min_arity=0)
            ]
            for kind in ("inputs", "outputs")
        }
        entry = schema(op_type, domain, 1, **parameters)
        entry.set_type_and_shape_inference_function(partial(_infer, domain, op_type))
        onnx.defs.register_schema(entry)


def infer_types(model: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Types of all values of the main graph.

    What exporters write about inner values is not always true (a rank of 0 for a list of one): they are asked only
    where inference finds nothing.

    Raises:
        UnsupportedModelError: if the declared types of inputs and outputs contradict the graph.
    """
    register_schemas()
    declared = {v.name: v for v in model.graph.value_info}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.value_info[:]
    try:
        hidden = _cut_long_lists(probe)
        types = value_types(onnx.shape_inference.infer_shapes(probe, data_prop=True).graph)
        missing = [
            n for node in probe.graph.node for n in node.output if n in declared and not spec_of_type(types.get(n))
        ]
        if missing:
            probe.graph.value_info.extend(declared[n] for n in missing)
            types = value_types(onnx.shape_inference.infer_shapes(probe, data_prop=True).graph)
    except onnx.shape_inference.InferenceError as error:
        line = next((line for line in str(error).splitlines() if "Error" in line), str(error))
        raise UnsupportedModelError(f"the model's shapes contradict each other: {line}", where="model") from error
    return types | hidden


def _cut_long_lists(probe: onnx.ModelProto) -> dict[str, onnx.TypeProto]:
    """Hide long lists from inference with values, which follows them element by element.

    Their types, and those of what reads them, are found without values first. A Range of numbers that only values tell
    has an open size then; it is found when they have been folded.

    Args:
        probe: The model, changed in place: nodes that make or read such lists are gone, their outputs inputs.

    Returns:
        The types of what was hidden.
    """
    graph = probe.graph
    types = value_types(onnx.shape_inference.infer_shapes(probe).graph)
    lengths = {n: s.shape[0] or 0 for n, t in types.items() if (s := spec_of_type(t)) is not None and s.rank == 1}
    long = {name for name, length in lengths.items() if length > MAX_PROPAGATED}
    hidden = {name: types[name] for name in long}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        specs = [spec_of_type(types.get(name)) for name in node.output if name]
        is_static = all(spec is not None and None not in spec.shape for spec in specs)
        if (is_static and long & {*node.input, *node.output}) or (
            node.op_type == "Range" and not is_static and all(specs)
        ):
            hidden |= {name: types[name] for name in node.output if name}
        else:
            kept.append(node)
    known = {v.name for v in graph.input}
    read = {name for node in kept for name in node.input}
    inside = [t for t in graph.initializer if t.name not in long]
    del graph.initializer[:]
    graph.initializer.extend(inside)
    graph.input.extend(
        onnx.ValueInfoProto(name=name, type=proto) for name, proto in hidden.items() if name not in known
    )
    for value in graph.input:
        if value.name in read and lengths.get(value.name, 0) > MAX_SEEN:
            value.type.tensor_type.shape.dim[0].dim_param = f"{value.name}.length"
    del graph.node[:]
    graph.node.extend(kept)
    return hidden


def check_contracts(
    graph: onnx.GraphProto, types: Mapping[str, onnx.TypeProto], versions: Mapping[str, int], *, partial: bool = False
) -> dict[str, Any]:
    """Check every node that a pattern of ours lowers, in the order of the graph.

    Args:
        graph: The graph.
        types: Types of its values.
        versions: Domain -> opset version.
        partial: Pass over nodes whose input types are not known (yet).

    Returns:
        Node name -> its contract.

    Raises:
        UnsupportedModelError: for the first node that breaks its contract.
    """
    contracts: dict[str, Any] = {}
    weights = {tensor.name for tensor in graph.initializer if is_weight(tensor) or is_list_of_floats(tensor)}
    for node in graph.node:
        domain = domain_of(node)
        op = find_op(domain, node.op_type, versions.get(domain, 1))
        unknown = partial and any(name and spec_of_type(types.get(name)) is None for name in node.input)
        if op is not None and not unknown:
            view = node_view(node, types, versions, weights)
            contract = contracts[node.name] = op.parse(view)
            view.refuse_other_inputs()
            _check_outputs(node, op.output_types(contract), types)
    return contracts


def _check_outputs(
    node: onnx.NodeProto, computed: Sequence[TensorSpec | None], types: Mapping[str, onnx.TypeProto]
) -> None:
    """What an operator computes is what the graph declares, where it does."""
    if len(node.output) > len(computed):
        raise UnsupportedModelError(
            "too many outputs", where=f"node '{node.name}' ({node.op_type})", got=len(node.output),
            expected=f"up to {len(computed)}",
        )  # fmt: skip
    for name, spec in zip(node.output, computed, strict=False):
        declared = spec_of_type(types.get(name)) if name else None
        if spec is None or declared is None:
            continue
        pairs = zip(spec.shape, declared.shape, strict=False)
        if (
            spec.dtype != declared.dtype
            or spec.rank != declared.rank
            or any(None not in p and p[0] != p[1] for p in pairs)
        ):
            raise UnsupportedModelError(
                f"its output '{name}' is declared with another type",
                where=f"node '{node.name}' ({node.op_type})",
                got=declared,
                expected=spec,
                hint="export the model again",
            )


def value_types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    """Name -> type of everything in a graph that has one."""
    types = {v.name: v.type for v in (*graph.output, *graph.value_info, *graph.input)}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
    return types
