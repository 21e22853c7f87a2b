"""RotaryEmbedding of ai.onnx 23 and of com.microsoft: rotates pairs of elements of each head by its token's angles.

    y[i] = x[i] cos[c] - x[j] sin[c],  y[j] = x[j] cos[c] + x[i] sin[c]

for each pair (i, j): (c, c + R/2), or (2c, 2c + 1) if interleaved, where R is how many leading elements of a head are
rotated. The angles of a token are looked up once into two tables [B, T, head size] (1 and 0 where nothing is rotated)
which all heads share, and all layers where the compiler sees that they are the same. Arithmetic is in f32.

A position beyond the cache, an error in ONNX Runtime, is clamped: a module cannot report it.
Source: ONNX operator schema RotaryEmbedding-23; ONNX Runtime 1.32, contrib_ops/cpu/bert/rotary_embedding_helper.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from iree.compiler import ir

from ..checks import float_input, only_attributes, require_dtype, require_shape
from ..emit.builder import Builder, Size
from ..emit.scalar import Scalar
from ..node import Dim, Node, TensorSpec
from ..op import MICROSOFT, LoweringContext, Op

Lookup = Callable[[ir.Value, Scalar, Scalar, Scalar], Scalar]
"""(cosine or sine input, batch, token, column) -> the element that rotates there."""


class Positions(Enum):
    """Where a token's position comes from."""

    IN_CACHE = "the caches are [B, T, R/2] already"
    PER_TOKEN = "position_ids [B, T]"
    OFFSET = "position_ids [1], the first token's"


@dataclass(frozen=True)
class Rotation:
    """The part of the contract that all rotary operators share.

    Attributes:
        x: [B, T, H * D] or [B, H, T, D].
        heads: H, None where it is open.
        head_size: D, None where it is open.
        rotated: R, the leading elements of each head that are rotated.
        interleaved: Whether pairs are neighbours.
    """

    x: TensorSpec
    heads: Dim
    head_size: Dim
    rotated: int
    interleaved: bool


@dataclass(frozen=True)
class RotaryEmbedding:
    """Contract.

    Attributes:
        rotation: What is rotated.
        positions: Where positions come from.
        inputs: Indices of the position, cosine and sine inputs.
    """

    rotation: Rotation
    positions: Positions
    inputs: tuple[int, int, int]


def parse_rotation(node: Node, columns: Dim) -> Rotation:
    """Check input 0 and the attributes that describe heads; ``columns`` is the caches' last dimension.

    Raises:
        UnsupportedModelError: if they do not fit.
    """
    x = float_input(node, 0, "X")
    if x.rank not in (3, 4):
        raise node.error("input 'X'", got=x, expected="[B, T, H * D] or [B, H, T, D]")
    rotated, heads = node.attr("rotary_embedding_dim", 0), node.attr("num_heads", 0)
    head_size: Dim
    if x.rank == 4:
        head_count, head_size = x.shape[1], x.shape[3]
    elif heads > 0:
        head_count, head_size = heads, None if x.shape[2] is None else x.shape[2] // heads
        if x.shape[2] is not None and x.shape[2] % heads:
            raise node.error("the last dimension of input 'X'", got=x.shape[2], expected=f"a multiple of {heads}")
    elif node.domain == MICROSOFT and rotated == 0 and columns is not None and x.shape[2] is not None:
        # Here, heads are counted by the caches, which cover whole heads.
        head_count, head_size = x.shape[2] // (2 * columns), 2 * columns
        if x.shape[2] % (2 * columns):
            raise node.error("the last dimension of input 'X'", got=x.shape[2], expected=f"a multiple of {2 * columns}")
    else:
        raise node.error("attribute 'num_heads' is missing", hint="a three-dimensional 'X' needs it")
    rotated = rotated or head_size or (2 * columns if columns is not None else 0)
    if rotated <= 0 or rotated % 2 or (head_size is not None and rotated > head_size):
        raise node.error("attribute 'rotary_embedding_dim'", got=rotated, expected=f"even and at most {head_size}")
    if columns is not None and columns != rotated // 2:
        raise node.error("the last dimension of the cosine input", got=columns, expected=rotated // 2)
    return Rotation(x, head_count, head_size, rotated, bool(node.attr("interleaved", 0)))


def parse_caches(node: Node, cos_index: int, sin_index: int, x: TensorSpec) -> TensorSpec:
    """Check that the cosine and sine inputs agree; returns the cosine's type.

    Raises:
        UnsupportedModelError: if they do not.
    """
    cos, sin = float_input(node, cos_index, "cos_cache"), float_input(node, sin_index, "sin_cache")
    require_dtype(node, "cos_cache", cos, x.dtype)
    require_dtype(node, "sin_cache", sin, x.dtype)
    require_shape(node, "sin_cache", sin, cos.shape)
    return cos


def parse_onnx(node: Node) -> RotaryEmbedding:
    """Check a node of ai.onnx; see the contract."""
    only_attributes(node, "interleaved", "num_heads", "rotary_embedding_dim")
    x = float_input(node, 0, "X")
    cos = parse_caches(node, 1, 2, x)
    position_ids = node.input(3)
    rotation = parse_rotation(node, cos.shape[-1] if cos.rank else None)
    batch_tokens = _batch_tokens(x)
    if position_ids is None:
        require_shape(node, "cos_cache", cos, (*batch_tokens, rotation.rotated // 2))
        return RotaryEmbedding(rotation, Positions.IN_CACHE, (3, 1, 2))
    require_dtype(node, "position_ids", position_ids, "i64")
    require_shape(node, "position_ids", position_ids, batch_tokens)
    require_shape(node, "cos_cache", cos, (None, rotation.rotated // 2))
    return RotaryEmbedding(rotation, Positions.PER_TOKEN, (3, 1, 2))


def parse_microsoft(node: Node) -> RotaryEmbedding:
    """Check a node of com.microsoft; see the contract."""
    only_attributes(node, "interleaved", "is_packed_batching", "num_heads", "rotary_embedding_dim", "scale")
    refuse_packed_batching(node)
    if node.attr("scale", 1.0) != 1.0:  # ONNX Runtime's kernels read it and do nothing with it
        raise node.error("attribute 'scale'", got=node.attributes["scale"], expected="1.0")
    x = float_input(node, 0, "input")
    position_ids = node.required(1, "position_ids")
    require_dtype(node, "position_ids", position_ids, "i64", "i32")
    cos = parse_caches(node, 2, 3, x)
    rotation = parse_rotation(node, cos.shape[-1] if cos.rank else None)
    require_shape(node, "cos_cache", cos, (None, rotation.rotated // 2))
    batch_tokens = _batch_tokens(x)
    require_shape(node, "position_ids", position_ids, (1,), (), batch_tokens)
    positions = Positions.PER_TOKEN if position_ids.rank == 2 else Positions.OFFSET
    return RotaryEmbedding(rotation, positions, (1, 2, 3))


def refuse_packed_batching(node: Node) -> None:
    """Refuse sequences of different lengths packed into one.

    Raises:
        UnsupportedModelError: if the node asks for it.
    """
    if node.attr("is_packed_batching", 0):
        raise node.error("attribute 'is_packed_batching'", got=1, expected=0, hint="export for padded batches")


def _batch_tokens(x: TensorSpec) -> tuple[Dim, Dim]:
    return (x.shape[0], x.shape[1]) if x.rank == 3 else (x.shape[0], x.shape[2])


def output_types(contract: RotaryEmbedding) -> Sequence[TensorSpec]:
    """The outputs' types."""
    return [contract.rotation.x]


def emit_rotation(
    b: Builder, rotation: Rotation, x: ir.Value, cos: ir.Value, sin: ir.Value, lookup: Lookup
) -> ir.Value:
    """Rotate ``x``; ``lookup`` finds the cosine or sine of a token and column."""
    packed = rotation.x.rank == 3
    if packed:
        assert rotation.heads is not None
        size = b.floordiv(b.dim(x, 2), rotation.heads)
        x = b.expand(x, 2, [rotation.heads, size])
    batch, tokens, head_size = b.dim(x, 0), b.dim(x, 1 if packed else 2), b.dim(x, 3)
    cos_table, sin_table = _emit_tables(b, rotation, {"b": batch, "t": tokens, "d": head_size}, cos, sin, lookup)
    half = rotation.rotated // 2

    def rotate(value: Scalar, cosine: Scalar, sine: Scalar) -> Scalar:
        d = b.loop_index(3)
        if rotation.interleaved:
            partner = (d % 2).equals(0).select(d + 1, d - 1)
        else:
            partner = (d < half).select(d + half, d - half)
        if rotation.rotated != rotation.head_size:
            partner = (d < rotation.rotated).select(partner, d)
        other = b.load(x, b.loop_index(0), b.loop_index(1), b.loop_index(2), partner)
        return value.to("f32") * cosine + other.to("f32") * sine

    term = "bthd" if packed else "bhtd"
    y = b.map(f"{term},btd,btd->{term}", rotate, x, cos_table, sin_table)
    return b.collapse(y, 2, 3) if packed else y


def _emit_tables(
    b: Builder, rotation: Rotation, sizes: dict[str, Size], cos: ir.Value, sin: ir.Value, lookup: Lookup
) -> tuple[ir.Value, ir.Value]:
    """The factors of an element and of its partner, f32 [B, T, D]; the second carries the sign."""
    half = rotation.rotated // 2

    def table(cache: ir.Value, *, is_sine: bool) -> ir.Value:
        def element() -> Scalar:
            d = b.loop_index(2)
            within = d.minimum(rotation.rotated - 1)
            column = within // 2 if rotation.interleaved else within % half
            value = lookup(cache, b.loop_index(0), b.loop_index(1), column).to("f32")
            if is_sine:
                first = (within % 2).equals(0) if rotation.interleaved else within < half
                value = first.select(-value, value)
            return (d < rotation.rotated).select(value, b.constant(0.0 if is_sine else 1.0, "f32"))

        return b.map("->btd", element, dtype="f32", sizes=sizes)

    return table(cos, is_sine=False), table(sin, is_sine=True)


def clamp_position(b: Builder, position: Scalar, cache: ir.Value) -> Scalar:
    """A position, of any integer type, as an index into a cache [positions, columns]."""
    last = Scalar(b.index(b.sub(b.dim(cache, 0), 1))).to(position.dtype)
    return position.minimum(last).maximum(0).to("index")  # indices of 32 bits lack what makes a position far out


def lookup(
    b: Builder, contract: RotaryEmbedding, operands: Sequence[ir.Value | None]
) -> tuple[ir.Value, ir.Value, Lookup]:
    """The cosine and sine inputs of a node, and what finds an element of them."""
    positions_index, cos_index, sin_index = contract.inputs
    cos, sin = operands[cos_index], operands[sin_index]
    position_ids = operands[positions_index] if positions_index < len(operands) else None
    assert cos is not None
    assert sin is not None

    def find(cache: ir.Value, batch: Scalar, token: Scalar, column: Scalar) -> Scalar:
        if contract.positions is Positions.IN_CACHE:
            return b.load(cache, batch, token, column)
        assert position_ids is not None
        if contract.positions is Positions.PER_TOKEN:
            position = b.load(position_ids, batch, token)
        else:
            zero = [b.constant(0, "index")] * ir.RankedTensorType(position_ids.type).rank
            position = clamp_position(b, b.load(position_ids, *zero), cache) + token
        return b.load(cache, clamp_position(b, position, cache), column)

    return cos, sin, find


def lower(context: LoweringContext, contract: RotaryEmbedding, operands: Sequence[ir.Value | None]) -> list[ir.Value]:
    """Two small tables and one elementwise loop."""
    x, (cos, sin, find) = operands[0], lookup(context.builder, contract, operands)
    assert x is not None
    return [emit_rotation(context.builder, contract.rotation, x, cos, sin, find)]


OPS = (
    Op("", "RotaryEmbedding", 23, parse_onnx, output_types, lower),
    Op(MICROSOFT, "RotaryEmbedding", 1, parse_microsoft, output_types, lower),
)
