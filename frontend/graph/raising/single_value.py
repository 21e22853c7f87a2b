"""LinearAttention with a value a head, as mobius writes Mamba-1's recurrence, becomes SelectiveScan.

query, key = Reshape(Tile(Unsqueeze(C or B)));  decay = Reshape(Unsqueeze(step) * Unsqueeze(rate))
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from linattn.dialect_patterns.op import MICROSOFT

from ..schema import attributes_of, domain_of
from .algebra import Algebra, Index, NotProvenError, Tensor
from .moves import Raised
from .products import ProductAlgebra, Products
from .selective import Part, Selective, match_decay
from .sizes import Size
from .values import Values
from .write_selective import SelectiveWriter, require_f32

_LAST = np.array([-1], np.int64)


def is_single_value(node: onnx.NodeProto, values: Values) -> bool:
    """Whether a node is LinearAttention with a value a head, and a decay a key."""
    if node.op_type != "LinearAttention" or domain_of(node) not in ("", MICROSOFT) or len(node.input) < 5:
        return False
    heads, shape = attributes_of(node).get("kv_num_heads"), values.shape(node.input[2])
    return shape is not None and len(shape) == 3 and shape[2].value == heads and bool(node.input[4])


def raise_single_value(node: onnx.NodeProto, values: Values) -> Raised:
    """What takes the place of a node that :func:`is_single_value`.

    Raises:
        NotProvenError: if its keys, queries and decays are not those of SelectiveScan.
    """
    attributes = attributes_of(node)
    heads = int(str(attributes["kv_num_heads"]))
    if attributes.get("update_rule") != "gated" or attributes.get("q_num_heads") != heads:
        raise NotProvenError("has another rule than 'gated', or queries that share a state")
    scale = attributes.get("scale", 0.0)
    if not isinstance(scale, float):
        raise NotProvenError("has a scale that is no number")
    algebra = ProductAlgebra(Size.of(1))
    products = Products(algebra, values)

    def by_head(name: str) -> Tensor:
        tensor = products.of(name)
        if len(tensor.axes) != 3:
            raise NotProvenError(f"reads '{name}', which is not [B, T, heads * size]")
        batch, tokens, _ = algebra.shape(tensor)
        return algebra.reshape(tensor, [batch, tokens, Size.of(heads), None])

    decay = by_head(node.input[4])
    batch, token, channel, element = decay.axes
    if len(channel) != 1 or len(element) != 1:
        raise NotProvenError("has a decay a head, or states of size 1")
    parts = match_decay(decay.terms[0], channel, element)
    for role, port in (("key", 1), ("query", 0)):
        (term,) = _along(algebra, decay.axes, by_head(node.input[port])).terms
        if any(set(channel) & factor.variables for factor in term.factors):
            raise NotProvenError(f"has a {role} for each channel")
        parts[role] = Part(term.number, term.factors)
    if scale != 1.0:
        scale = scale or (algebra.size(element).value or 1) ** -0.5
        parts["query"] = Part(parts["query"].number * scale, parts["query"].factors)
    value = _along(algebra, decay.axes[:3], products.input(node.input[2]))
    parts["value"] = Part(1.0, value.terms[0].factors)
    found = Selective(batch, channel, element, (0, 1, 2), parts, (), (batch, token, channel))
    scan = SelectiveWriter(algebra, values, node.name, found, token)
    writer, past, final = scan.writer, "", ""
    if len(node.input) > 3 and node.input[3]:
        require_f32(values, node.input[3])
        past = writer.node("Squeeze", [node.input[3], writer.constant("axis", _LAST)])
    if len(node.output) > 1 and node.output[1]:
        final = values.names.new(f"{node.name}.present")
        writer.node("Unsqueeze", [final, writer.constant("new_axis", _LAST)], [node.output[1]])
    writer.node("Identity", [scan.write(past, final)], [node.output[0]])
    return Raised(f"LinearAttention '{node.name}' -> SelectiveScan", writer.nodes, writer.initializers)


def _along(algebra: Algebra, axes: Sequence[Index], tensor: Tensor) -> Tensor:
    """A tensor with the variables of these axes.

    Raises:
        NotProvenError: if its axes have other sizes.
    """
    for want, place in zip(axes, range(len(axes)), strict=True):
        for_want, names = algebra.match(want, tensor.axes[place])
        if for_want:
            raise NotProvenError("has keys, queries and values of other sizes")
        tensor = algebra.rename(tensor, names)
    return tensor
