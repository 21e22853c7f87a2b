"""Strategy ``fused_simt``: convolution and state update as one GPU kernel, a thread for one element written or some.

    padded  = concat(past_state, input)                     never stored: a tap reads the one or the other
    y_t     = act(bias + sum_j w_j * padded_{t + j * dilation})
    present = the last (k - 1) * dilation tokens of padded

    hal.executable.source @causal_conv_silu_fused_simt_... { scf.if %first { y } else { scf.if %second { present } } }
    %output, %present = flow.dispatch @...[%workgroups](%B, %T, %input, %weight, %bias, %past)

The first B * C * T threads write the output in the order it has in memory, the others the state, as stored. Either
layout is a pair of strides. Open B and T are numbers of the dispatch. Where the node's input is a transpose of
[B, T, C], the kernel takes that and leaves its output so, and the transposes around the node vanish.

Where the channels lie side by side a thread writes 4 of them for 8 tokens, and keeps what their taps share: a prompt's
input is read 11/8 times, in loads of 4 (one element a thread took 18 us for 512 tokens of 6144 channels on an H100).

Legal: on GPUs, for up to 32 taps. Cost per element: k loads, of which all but one hit the cache, and k multiply-adds.
Source: ONNX schema CausalConvWithState-27.
"""

from __future__ import annotations

from dataclasses import dataclass

from iree.compiler import ir

from ..emit.builder import Builder, Size, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Group, Kernel, dispatch
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import CausalConv, output_specs
from .direct import Operands

_THREADS = 128
_MAX_TAPS = 32
_VECTOR = 4  # channels of a thread that writes several
_TOKENS = 8  # of such a thread


def is_legal(contract: CausalConv, target: Target) -> Legality:
    """On a GPU, while the taps can be unrolled."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    if contract.kernel > _MAX_TAPS:
        return No(f"{contract.kernel} taps, more than {_MAX_TAPS}")
    return Yes("one kernel, state update included")


def takes_rows(contract: CausalConv) -> bool:
    """Whether a kernel for input and output [B, T, C] is worth it, for nodes that stand between two transposes."""
    return not contract.channels_last and contract.input.shape[2] != 1


def emit_causal_conv_fused_simt(
    context: LoweringContext, contract: CausalConv, x: Operands, past: ir.Value | None, *, rows: bool = False
) -> list[ir.Value]:
    """Emit output and present state.

    Args:
        context: Builder and target.
        contract: What to compute.
        x: The operands.
        past: The past state, None where the node has none.
        rows: Whether the input is [B, T, C] for a contract of [B, C, T]; then the output is so too.
    """
    b, c = context.builder, contract
    batch = b.dim(x.input, 0)
    inputs = [x.input, x.weight, *(value for value in (x.bias, past) if value is not None)]
    if past is not None and not c.state_length:
        inputs.pop()
    specs = output_specs(c)[: 2 if c.state_length else 1]  # a state without elements is no buffer to write
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = []
    for spec, like in zip(specs, (x.input, x.past), strict=False):
        sizes = b.shape(like)
        shape = [size if isinstance(size, int) else None for size in sizes]
        outputs.append((tensor_type(shape, spec.dtype), [size for size in sizes if not isinstance(size, int)]))
    wide = (rows or c.channels_last) and x.tokens != 1 and _is_wide(c)
    tokens = b.index(x.tokens) if wide else x.tokens  # a number: prompts of several sizes share the kernel
    numbers = [size for size in (batch, tokens) if not isinstance(size, int)]

    def body(k: Kernel) -> None:
        given = iter(range(len(numbers)))
        known = [
            Scalar.constant(size, "index") if isinstance(size, int) else k.number(next(given))
            for size in (batch, tokens)
        ]
        kernel = _Vectors if wide else _Convolution
        kernel(k, c, known[0], known[1], past is not None, rows or c.channels_last).emit()

    name = _name(c, batch, tokens, past) + ("_rows" if rows else "") + ("_wide" if wide else "")
    groups = _groups(b, c, batch, x.tokens, wide=wide)
    results = dispatch(name, Group(_THREADS, 0), 1, groups, numbers, inputs, outputs, body)
    return results if c.state_length else [*results, x.past]


def _is_wide(c: CausalConv) -> bool:
    """Whether a thread can write several channels and tokens."""
    return c.channels % _VECTOR == 0 and c.state_length <= _TOKENS


def _groups(b: Builder, c: CausalConv, batch: Size, tokens: Size, *, wide: bool) -> ir.Value:
    """Workgroups for one thread an element of the outputs, or some of them, and of the state."""
    written: Size = b.mul(tokens, c.channels)
    if wide:
        written = b.mul(b.floordiv(b.add(tokens, _TOKENS - 1), _TOKENS), c.channels // _VECTOR)
    elements = b.mul(batch, b.add(written, c.state_length * c.channels))
    return b.index(b.floordiv(b.add(elements, _THREADS - 1), _THREADS))


def _name(c: CausalConv, batch: Size, tokens: Size, past: ir.Value | None) -> str:
    """Spells everything that the kernel depends on."""
    lead = "x".join("n" if not isinstance(size, int) else str(size) for size in (batch, tokens))
    name = f"causal_conv_{c.activation}_fused_simt_{c.input.dtype}_{lead}_c{c.channels}_k{c.kernel}"
    name += f"_dilation{c.dilation}" if c.dilation > 1 else ""
    name += "_channels_last" if c.channels_last else ""
    return name + ("" if c.has_bias else "_no_bias") + ("" if past is not None else "_no_past")


@dataclass
class _Convolution:
    """Emits the kernel.

    Attributes:
        k: Emits instructions.
        c: What to compute.
        batch: B.
        tokens: T.
        has_past: Whether there is a past state.
        rows: Whether the channels of input and output are side by side; for the state the contract says it.
    """

    k: Kernel
    c: CausalConv
    batch: Scalar
    tokens: Scalar
    has_past: bool
    rows: bool

    def emit(self) -> None:
        """Emit everything."""
        k, c = self.k, self.c
        dtype = c.input.dtype
        count = self.batch * self.tokens * c.channels
        states = self.batch * (c.channels * c.state_length)
        sizes = [count, Scalar.constant(c.channels * c.kernel, "index")]
        sizes += [Scalar.constant(c.channels, "index")] if c.has_bias else []
        sizes += [states] if self.has_past and c.state_length else []
        sizes += [count, states] if c.state_length else [count]
        buffers = [k.buffer(i, dtype, size) for i, size in enumerate(sizes)]
        self.input, self.weight, *rest = buffers
        self.bias = rest.pop(0) if c.has_bias else None
        self.past = rest.pop(0) if self.has_past and c.state_length else None
        element = k.item() * _THREADS + k.thread()
        k.when(element < count, lambda: self._emit_output(element, rest[0]))
        if c.state_length:
            state = element - count
            inside = (element >= count) & (state < states)
            k.when(inside, lambda: self._emit_state(state, rest[1]))

    def _place(self, element: Scalar, length: Scalar | int, *, rows: bool) -> tuple[Scalar, Scalar, Scalar]:
        """Row, channel and position along the sequence of an element of a tensor that is ``length`` long."""
        inner, outer = (self.c.channels, length) if rows else (length, self.c.channels)
        rest, first = element.divide_unsigned(inner)
        batch, second = rest.divide_unsigned(outer)
        return (batch, first, second) if rows else (batch, second, first)

    def _index(self, batch: Scalar, channel: Scalar, position: Scalar, length: Scalar | int, *, rows: bool) -> Scalar:
        """The inverse of :meth:`_place`."""
        if rows:
            return (batch * length + position) * self.c.channels + channel
        return (batch * self.c.channels + channel) * length + position

    def _load_input(self, batch: Scalar, channel: Scalar, position: Scalar) -> ir.Value:
        return self.k.load(self.input, self._index(batch, channel, position, self.tokens, rows=self.rows))

    def _load_past(self, batch: Scalar, channel: Scalar, position: Scalar) -> ir.Value:
        if self.past is None:
            return self.k.stored_zero(self.input)
        place = self._index(batch, channel, position, self.c.state_length, rows=self.c.channels_last)
        return self.k.load(self.past, place)

    def _padded(self, batch: Scalar, channel: Scalar, position: Scalar) -> ir.Value:
        """The element of past state and input joined, as stored.

        Loads from both and selects: Mesa's lavapipe (22.3) gets a sum over values of branches wrong.
        """
        length = self.c.state_length
        if not length:
            return self._load_input(batch, channel, position)
        new = self._load_input(batch, channel, (position - length).maximum(0))
        old = self._load_past(batch, channel, position.minimum(length - 1))
        return (position < length).select(Scalar(old), Scalar(new)).value

    def _emit_output(self, element: Scalar, output: Buffer) -> None:
        k, c = self.k, self.c
        batch, channel, position = self._place(element, self.tokens, rows=self.rows)
        total: ir.Value | None = None
        if self.bias is not None:
            total = k.widen(self.bias, k.load(self.bias, channel))
        for j in range(c.kernel):
            tap = k.widen(self.input, self._padded(batch, channel, position + j * c.dilation))
            weight = k.widen(self.weight, k.load(self.weight, channel * c.kernel + j))
            total = k.mul(tap, weight) if total is None else k.fma(tap, weight, total)
        assert total is not None
        if c.activation == "silu":
            total = k.div(total, k.add(k.exp(k.neg(total)), k.constant(1.0)))
        k.store(total, output, element)

    def _emit_state(self, element: Scalar, present: Buffer) -> None:
        k, length = self.k, self.c.state_length
        batch, channel, place = self._place(element, length, rows=self.c.channels_last)
        position = self.tokens + place

        def new() -> list[ir.Value]:  # a branch of its own: without tokens there is nothing to load
            return [self._load_input(batch, channel, position - length)]

        (value,) = k.choose(
            position < length,
            lambda: [self._load_past(batch, channel, position)],
            new,
            [k.stored_zero(present).type],
        )
        k.store_as_is(value, present, element)


class _Vectors(_Convolution):
    """Four channels and eight tokens a thread, for channels that lie side by side."""

    def emit(self) -> None:
        """Emit everything."""
        k, c, dtype = self.k, self.c, self.c.input.dtype
        vectors, count = c.channels // _VECTOR, self.batch * self.tokens * c.channels
        states = self.batch * (c.channels * c.state_length)
        self.input = k.buffer(0, dtype, count)
        self.vectors = k.buffer(0, dtype, self.batch * self.tokens * vectors, _VECTOR)
        self.weight = k.buffer(1, dtype, Scalar.constant(c.channels * c.kernel, "index"))
        self.bias = k.buffer(2, dtype, Scalar.constant(vectors, "index"), _VECTOR) if c.has_bias else None
        binding = 2 + c.has_bias
        self.past = k.buffer(binding, dtype, states) if self.has_past and c.state_length else None
        binding += self.past is not None
        output = k.buffer(binding, dtype, self.batch * self.tokens * vectors, _VECTOR)
        blocks = (self.tokens + (_TOKENS - 1)).divide_unsigned(_TOKENS)[0]
        element, written = k.item() * _THREADS + k.thread(), self.batch * blocks * vectors
        rest, vector = element.divide_unsigned(vectors)
        parts = rest.to("i32").divide_unsigned(blocks.to("i32"))  # GPUs divide 32 bits better
        batch, block = (part.to("index", unsigned=True) for part in parts)
        # Code of its own for the first tokens: Mesa's lavapipe (22.3) gets a sum over values of branches wrong.
        for is_first in (True, False):
            here = block.equals(0) if is_first else block > 0
            k.when(
                (element < written) & here,
                lambda is_first=is_first: self._emit_block(batch, block, vector, output, is_first=is_first),
            )
        if c.state_length:
            present, state = k.buffer(binding + 1, dtype, states), element - written
            k.when((element >= written) & (state < states), lambda: self._emit_state(state, present))

    def _emit_block(self, batch: Scalar, block: Scalar, vector: Scalar, output: Buffer, *, is_first: bool) -> None:
        k, c, length = self.k, self.c, self.c.state_length
        first, row = block * _TOKENS, batch * self.tokens
        channels = [vector * _VECTOR + i for i in range(_VECTOR)]
        window: list[ir.Value] = []
        for place in range(length + _TOKENS):
            if is_first and place < length:
                at = Scalar.constant(place, "index")
                window.append(k.join([k.widen(self.input, self._load_past(batch, ch, at)) for ch in channels]))
                continue
            position = (first + place - length).minimum(self.tokens - 1)
            stored = k.load(self.vectors, (row + position) * (c.channels // _VECTOR) + vector)
            window.append(k.widen(self.vectors, stored))
        taps = [
            k.join([k.widen(self.weight, k.load(self.weight, ch * c.kernel + j)) for ch in channels])
            for j in range(c.kernel)
        ]
        bias = None if self.bias is None else k.widen(self.bias, k.load(self.bias, vector))
        for t in range(_TOKENS):
            total = bias
            for j, weight in enumerate(taps):
                value = window[t + j * c.dilation]
                total = k.mul(value, weight) if total is None else k.fma(value, weight, total)
            assert total is not None
            if c.activation == "silu":
                total = k.div(total, k.add(k.exp(k.neg(total)), k.constant(1.0, _VECTOR)))
            token, result = first + t, total

            def write(token: Scalar = token, result: ir.Value = result) -> None:
                k.store(result, output, (row + token) * (c.channels // _VECTOR) + vector)

            k.when(token < self.tokens, write)
