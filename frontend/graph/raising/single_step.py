"""Mamba-1's recurrence for one token, in a graph that takes one token a call, becomes SelectiveScan over tokens.

    next = Exp(step * rate) * state + written;   y = ReduceSum(query * next) + ...;   out = Unsqueeze(y, [1])

Such a graph drops the axis of its tokens before the step and puts it back after it (mobius 0.1). What is proven is that
for one token the operator computes the same. For more of them the graph has no meaning of its own, and the operator's
is the only one under which a prompt is its tokens one after the other.
"""

from __future__ import annotations

import onnx

from ..schema import domain_of
from .algebra import NotProvenError, Tensor
from .moves import Raised
from .products import ProductAlgebra, Products
from .readers import Readers, is_cast
from .recurrence import NEXT, STATE
from .selective import match_selective
from .sizes import Size
from .values import Values
from .write_selective import SelectiveWriter, require_f32

_MAX_STEPS = 16
"""From the new state to the output."""


def state_of_step(node: onnx.NodeProto, values: Values, inputs: set[str]) -> str | None:
    """The state, if a node adds to a product with an input of the graph (or that in f32) of three axes."""
    if node.op_type != "Add" or domain_of(node) != "" or len(values.shape(node.output[0]) or ()) != 3:
        return None
    for summand in node.input:
        product = values.producers.get(summand)
        if product is None or product.op_type != "Mul" or domain_of(product) != "":
            continue
        for name in product.input:
            before = values.producers.get(name)
            source = before.input[0] if before is not None and is_cast(before) else name
            if source in inputs and len(values.shape(source) or ()) == 3:
                return name
    return None


def raise_step(node: onnx.NodeProto, state: str, tokens: Size, values: Values, readers: Readers) -> Raised:
    """What takes the place of a step.

    Args:
        node: The Add that gives the state after it.
        state: The state before it, see :func:`state_of_step`.
        tokens: Size of the axis of tokens.
        values: The graph.
        readers: Who reads its values.

    Raises:
        NotProvenError: if it is not provably Mamba-1's.
    """
    require_f32(values, state)
    algebra = ProductAlgebra(tokens)
    products = Products(algebra, values, tokens)
    shape = values.shape(state)
    assert shape is not None
    products.known[state] = algebra.input(STATE, shape)
    products.operands(node)
    update = products.run.run(node, products.known)
    if algebra.shape(update) != shape:
        raise NotProvenError("carries a state that changes its shape")
    output, tensor = _output(node.output[0], algebra.input(NEXT, shape), products, readers)
    found = match_selective(algebra, update, tensor)
    scan = SelectiveWriter(algebra, values, node.name, found, algebra.token)
    axes = [axis or algebra.token for axis in found.output]
    if sorted(axes) != sorted(scan.layout) or axes.count(algebra.token) != 1:
        raise NotProvenError(f"gives '{output}', which is not [B, 1, D]")
    result = scan.write(state, node.output[0])
    scan.writer.rearrange(result, scan.layout, axes, output)
    return Raised(f"step '{node.name}' -> SelectiveScan", scan.writer.nodes, scan.writer.initializers)


def _output(name: str, tensor: Tensor, products: Products, readers: Readers) -> tuple[str, Tensor]:
    """The value that is the output with an axis for its token again, and what it is."""
    for _ in range(_MAX_STEPS):
        products.known[name] = tensor
        following = [reader for reader in readers.of(name) if not is_cast(reader)]
        if len(following) != 1:
            raise NotProvenError(f"has {len(following)} readers of '{name}' instead of one")
        (reader,) = following
        products.operands(reader)
        try:
            tensor = products.run.run(reader, products.known)
        except NotProvenError as error:
            raise NotProvenError(f"is read by '{reader.name}' ({reader.op_type}), which {error}") from error
        name = reader.output[0]
        is_read = any(term.bound and any(f.name == NEXT for f in term.factors) for term in tensor.terms)
        if is_read and len(tensor.axes) == 3 and not tensor.axes[1] and tensor.axes[2]:
            return name, tensor
    raise NotProvenError("gives no output")
