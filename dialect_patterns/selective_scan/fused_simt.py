"""Strategy ``fused_simt``: all tokens of a call as one GPU kernel, a channel's state in the registers of a few threads.

    S[d, n] <- exp(step[t, d] * rate[d, n]) * S[d, n] + value[t, d] * key[t, n]
    output[t, d] = sum_n query[t, n] * S[d, n]

    hal.executable.source @selective_scan_fused_simt_... { scf.for %t { ... gpu.shuffle ... } }
    %output, %state = flow.dispatch @...[B](%B?, %T?, %value, %step, %rate, %key, %query, %past)

Threads that are neighbours share a channel, some elements of its state each, and sum their outputs by shuffles; without
subgroup operations a thread has a channel. What the next tokens need is loaded before the tokens at hand are computed.

Legal: on GPUs, for states of up to 64 elements a thread. Cost per token: D N exponentials and 4 D N multiply-adds.
"""

from __future__ import annotations

from iree.compiler import ir

from ..emit.builder import Size, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Group, Kernel, dispatch
from ..op import LoweringContext
from ..select import Legality, No, OtherMachine, Yes
from ..target import Target
from .contract import SelectiveScan

_THREADS = 64
_MOST_LANES = 4
_MAX_HELD = 64
_AHEAD = 4  # tokens whose loads are in flight


def is_legal(contract: SelectiveScan, target: Target) -> Legality:
    """On a GPU, while a thread's part of the state fits its registers."""
    if not target.is_gpu:
        return OtherMachine(f"{target.name} is not a GPU")
    held = contract.states // _lanes(contract, target)
    if held > _MAX_HELD:
        return No(f"a thread would hold {held} elements of the state, more than {_MAX_HELD}")
    return Yes()


def _lanes(c: SelectiveScan, target: Target) -> int:
    """Threads of a channel."""
    lanes = min(_MOST_LANES, c.states & -c.states)
    return lanes if target.subgroup_size >= lanes else 1


def emit_selective_scan_fused_simt(
    context: LoweringContext, contract: SelectiveScan, inputs: list[ir.Value], past: ir.Value | None
) -> list[ir.Value]:
    """Emit output and present state; for the arguments see ``recurrent``."""
    b, c = context.builder, contract
    batch, tokens = b.dim(inputs[0], 0), b.dim(inputs[0], 1)
    lanes, subgroup = _lanes(c, context.target), context.target.subgroup_size
    group = Group(max(_THREADS, subgroup), subgroup)
    numbers = [size for size in (batch, tokens) if not isinstance(size, int)]
    outputs: list[tuple[ir.RankedTensorType, list[ir.Value]]] = []
    for sizes in ([batch, tokens, c.channels], [batch, c.channels, c.states]):
        shape = [size if isinstance(size, int) else None for size in sizes]
        outputs.append((tensor_type(shape, "f32"), [size for size in sizes if not isinstance(size, int)]))

    def body(k: Kernel) -> None:
        given = iter(range(len(numbers)))
        known = [size if isinstance(size, int) else k.number(next(given)) for size in (batch, tokens)]
        _Scan(k, c, lanes, known[0], known[1]).emit()

    tiles = -(-c.channels * lanes // group.threads)
    operands = [*inputs, *([past] if past is not None else [])]
    name = _name(c, batch, tokens, group, lanes)
    return dispatch(name, group, tiles, b.index(batch), numbers, operands, outputs, body)


def _name(c: SelectiveScan, batch: Size, tokens: Size, group: Group, lanes: int) -> str:
    """Spells everything that the kernel depends on."""
    lead = "x".join("n" if not isinstance(size, int) else str(size) for size in (batch, tokens))
    plan = f"{group.threads}t{group.subgroup}s{lanes}l"
    return f"selective_scan_fused_simt_{lead}_d{c.channels}n{c.states}_{plan}" + ("" if c.has_past else "_no_past")


class _Scan:
    """Emits the kernel.

    Args:
        k: Emits instructions.
        c: What to compute.
        lanes: Threads of a channel.
        batch: B.
        tokens: T, a Python int where static.
    """

    def __init__(self, k: Kernel, c: SelectiveScan, lanes: int, batch: Scalar | int, tokens: Scalar | int) -> None:
        self.k, self.c, self.lanes = k, c, lanes
        self.held = c.states // lanes
        self.width = min(4, self.held & -self.held)  # of a load of what a thread holds
        self.static_tokens = tokens if isinstance(tokens, int) else None
        self.tokens = Scalar.constant(tokens, "index") if isinstance(tokens, int) else tokens
        self.batches = Scalar.constant(batch, "index") if isinstance(batch, int) else batch

    def emit(self) -> None:
        """Emit everything."""
        k, c, width = self.k, self.c, self.width
        rows = self.batches * self.tokens
        states = self.batches * (c.channels * c.states // width)
        rates = Scalar.constant(c.channels * c.states // width, "index")
        keys = rows * (c.states // width)
        sizes = [(rows * c.channels, 1)] * 2 + [(rates, width), (keys, width), (keys, width)]
        sizes += [(states, width)] if c.has_past else []
        sizes += [(rows * c.channels, 1), (states, width)]
        buffers = [k.buffer(i, "f32", size, wide) for i, (size, wide) in enumerate(sizes)]
        self.value, self.step, self.rate, self.key, self.query, *rest = buffers
        self.past = rest.pop(0) if c.has_past else None
        self.output, self.present = rest
        self.item = k.item()
        k.when(self.item < self.batches, self._emit_row)

    def _emit_row(self) -> None:
        """The channel of this thread in one row of the batch."""
        k, c = self.k, self.c
        place = k.tile() * k.group.threads + k.thread()
        channel, self.lane = place.divide_unsigned(self.lanes)
        self.inside = channel < c.channels
        self.channel = channel.minimum(c.channels - 1)  # those beyond compute the last one again and write nothing
        self.rates = self._held(self.rate, self.channel)
        row = self.item * c.channels + self.channel
        state = self._held(self.past, row) if self.past is not None else [k.constant(0.0)] * self.held
        state = self._emit_tokens(state)

        def write() -> None:
            for i in range(0, self.held, self.width):
                index = self._load_index(row) + i // self.width
                k.store(k.join(state[i : i + self.width]), self.present, index)

        k.when(self.inside, write)

    def _load_index(self, row: Scalar) -> Scalar:
        """Where this thread's part of row ``row`` of N elements begins, in loads."""
        return (row * self.lanes + self.lane) * (self.held // self.width)

    def _held(self, buffer: Buffer, row: Scalar) -> list[ir.Value]:
        """This thread's part of a row of N elements."""
        start = self._load_index(row)
        loads = [self.k.load(buffer, start + i) for i in range(self.held // self.width)]
        return [element for load in loads for element in self.k.elements(load)]

    def _emit_tokens(self, state: list[ir.Value]) -> list[ir.Value]:
        """All tokens, ``_AHEAD`` at a time and what is left one by one; the last state."""
        whole = Scalar.constant(0, "index")
        if self.static_tokens is not None and self.static_tokens >= _AHEAD:
            whole = Scalar.constant(self.static_tokens // _AHEAD * _AHEAD, "index")
        elif self.static_tokens is None:
            whole = self.tokens.divide_unsigned(_AHEAD)[0] * _AHEAD

        def several(t: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            return self._emit_block(carried, [t + i for i in range(_AHEAD)])

        def single(t: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            return self._emit_block(carried, [t])

        if self.static_tokens == 1:
            return single(whole, state)
        if self.static_tokens is None or self.static_tokens >= _AHEAD:
            state = self.k.loop(Scalar.constant(0, "index"), whole, _AHEAD, state, several)
        if self.static_tokens is None or self.static_tokens % _AHEAD:
            state = self.k.loop(whole, self.tokens, 1, state, single)
        return state

    def _emit_block(self, state: list[ir.Value], tokens: list[Scalar]) -> list[ir.Value]:
        """Some tokens, all of whose loads come first; the state after them."""
        k, c = self.k, self.c
        rows = [self.item * self.tokens + t for t in tokens]
        loads = [
            (
                k.load(self.step, row * c.channels + self.channel),
                k.load(self.value, row * c.channels + self.channel),
                self._held(self.key, row),
                self._held(self.query, row),
            )
            for row in rows
        ]
        sums: list[ir.Value] = []
        for step, value, key, query in loads:
            decays = [k.exp(k.mul(step, rate)) for rate in self.rates]
            state = [k.fma(a, s, k.mul(value, e)) for a, s, e in zip(decays, state, key, strict=True)]
            total = k.mul(query[0], state[0])
            for e, s in zip(query[1:], state[1:], strict=True):
                total = k.fma(e, s, total)
            sums.append(total)
        offset = 1
        while offset < self.lanes:
            sums = [k.add(total, k.shuffle_xor(total, offset)) for total in sums]
            offset *= 2

        def write() -> None:
            for row, total in zip(rows, sums, strict=True):
                k.store(total, self.output, row * c.channels + self.channel)

        k.when(self.inside & self.lane.equals(0), write)
        return state
