"""The body of the fused GPU kernel of LinearAttention: one workgroup, some columns of one state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from iree.compiler import ir

from ..emit.scalar import Scalar
from ..emit.simt_kernel import MAX_GROUPS, Buffer, Kernel
from .contract import LinearAttention
from .fused_simt_convolved import CHANNELS, Convolution, Convolved
from .fused_simt_lanes import Lanes
from .fused_simt_plan import Plan
from .fused_simt_step import Step


@dataclass(frozen=True)
class Before:
    """What the kernel computes of its operands first (``gated.py``, ``convolved.py``).

    Attributes:
        query_norm: Whether queries are divided by their length.
        key_norm: Likewise keys.
        gates: Whether decay and beta are made of what the gates take.
        convolution: What queries, keys and values are made by; None: they are given.
    """

    query_norm: bool = False
    key_norm: bool = False
    gates: bool = False
    convolution: Convolution | None = None

    @property
    def flags(self) -> tuple[bool, bool, bool]:
        """All of it."""
        return self.query_norm, self.key_norm, self.gates

    def __str__(self) -> str:
        last = "" if self.convolution is None else str(self.convolution)
        return "".join(f"_{name}" for name, is_there in zip("qkg", self.flags, strict=True) if is_there) + last


@dataclass(frozen=True)
class Token:
    """What a thread needs of one token, as stored.

    Attributes:
        key: One value a load.
        query: Likewise, for each query head of the state.
        value: The thread's columns.
        decay: Log decay: one scalar, or one value a load of the key; empty if there is none.
        beta: The update rate, or empty.
    """

    key: list[ir.Value]
    query: list[list[ir.Value]]
    value: ir.Value
    decay: list[ir.Value]
    beta: list[ir.Value]

    def flat(self) -> list[ir.Value]:
        """All of it, to carry through a loop."""
        return [*self.key, *(v for row in self.query for v in row), self.value, *self.decay, *self.beta]

    def like(self, values: Sequence[ir.Value]) -> Token:
        """The inverse of :meth:`flat` for a token of the same shape."""
        rest = iter(values)
        key = [next(rest) for _ in self.key]
        query = [[next(rest) for _ in row] for row in self.query]
        return Token(key, query, next(rest), [next(rest) for _ in self.decay], [next(rest) for _ in self.beta])


class Recurrence:
    """Emits the kernel.

    Args:
        k: Emits instructions.
        contract: What to compute.
        plan: The work of a thread.
        states: B * Hkv, a Python int where static.
        tokens: T, a Python int where static.
        before: What to compute of the operands first; of one token only.
    """

    def __init__(
        self,
        k: Kernel,
        contract: LinearAttention,
        plan: Plan,
        states: Scalar | int,
        tokens: Scalar | int,
        before: Before,
    ) -> None:
        self.k, self.c, self.p, self.before = k, contract, plan, before
        self.static_tokens = tokens if isinstance(tokens, int) else None
        self.tokens = Scalar.constant(tokens, "index") if isinstance(tokens, int) else tokens
        self.all_states = isinstance(states, int) and states <= MAX_GROUPS
        """Whether there is a workgroup for each state and no others."""
        self.states = Scalar.constant(states, "index") if isinstance(states, int) else states

    def emit(self) -> None:
        """Emit everything."""
        self._make_buffers()
        item = self.k.first_item() if self.all_states else self.k.item()
        self.scratch: Buffer | None = None
        if self.p.subgroup == 0:  # two halves
            self.scratch = self.k.shared(2 * self.p.slots(self.c.rows) * self.p.threads)
        self.step = Step(self) if self.static_tokens == 1 and self.p.subgroup else None
        if self.all_states:
            self._emit_state(item)
        else:
            self.k.when(item < self.states, lambda: self._emit_state(item))

    def _make_buffers(self) -> None:
        k, c, p = self.k, self.c, self.p
        rows = self.states.divide_unsigned(c.kv_heads)[0] * self.tokens
        convolution, one = self.before.convolution, Scalar.constant(1, "index")
        sizes: list[tuple[Scalar, int, str, int]] = [
            (rows, c.q_heads * c.dk, c.dtype, p.width),
            (rows, c.k_heads * c.dk, c.dtype, p.width),
            (rows, c.kv_heads * c.dv, c.dtype, p.columns),
        ]
        if convolution is not None:
            own = (convolution.taps, *([1] if convolution.has_bias else []))
            sizes = [(one, convolution.channels * size, c.dtype, CHANNELS) for size in own]
            sizes.insert(0, (rows, convolution.channels, c.dtype, CHANNELS))
            sizes.append((rows, convolution.channels * (convolution.taps - 1), c.dtype, CHANNELS))
        if c.has_past:
            sizes.append((self.states, c.dk * c.dv, c.state_dtype, p.columns))
        if c.decay != "none":
            size, width = (c.dk, p.width) if c.decay == "key" else (1, 1)
            sizes.append((rows, c.kv_heads * size, c.dtype, width))
        if c.beta != "none":
            sizes.append((rows, c.kv_heads if c.beta == "head" else 1, c.dtype, 1))
        if self.before.gates:
            sizes += [(one, c.kv_heads, "f32", 1)] * 2
        sizes.append((rows, c.out_heads * c.dv, c.dtype, p.columns))
        sizes.append((self.states, c.dk * c.dv, c.state_dtype, p.columns))
        if convolution is not None:
            sizes.append((rows, convolution.channels * (convolution.taps - 1), c.dtype, CHANNELS))
        buffers = [
            k.buffer(i, dtype, count * (elements // width), width)
            for i, (count, elements, dtype, width) in enumerate(sizes)
        ]
        self.convolved: Convolved | None = None
        if convolution is not None:
            count = 3 + convolution.has_bias
            self.convolved = Convolved(k, c, p, convolution, [*buffers[:count], buffers.pop()])
            buffers = [*self.convolved.found, *buffers[count:]]
        self.query, self.key, self.value, *rest, self.output, self.present = buffers
        self.past = rest.pop(0) if c.has_past else None
        self.decay = rest.pop(0) if c.decay != "none" else None
        self.beta = rest.pop(0) if c.beta != "none" else None
        self.rates = rest

    # ---- one state -------------------------------------------------------------------------------------------------
    def _emit_state(self, item: Scalar) -> None:
        k, c, p = self.k, self.c, self.p
        self.batch, self.head = item.divide_unsigned(c.kv_heads)
        thread = k.thread()
        across = p.threads // p.lanes
        if p.subgroup:  # neighbouring threads have neighbouring columns; the lanes of a column share a subgroup
            subgroup, place = thread.divide_unsigned(p.subgroup)
            block, share = subgroup.divide_unsigned(p.sharing)
            lane, column = place.divide_unsigned(p.inside)
            lane, column = share * (p.lanes // p.sharing) + lane, block * p.inside + column
        else:
            lane, column = thread.divide_unsigned(across)
        self.lane, self.lanes = lane, Lanes(k, p, lane, column, self.scratch, c.rows, c.has_delta)
        self.place = column
        column = k.tile() * across + column
        limit = c.dv // p.columns
        self.valid = self.lane.equals(0)
        self.inside: Scalar | None = None
        if limit % across:  # threads beyond the last column compute it again and write nothing
            self.inside = column < limit
            self.valid = self.valid & self.inside
            column = column.minimum(limit - 1)
        self.column = column
        state = self._load_state(item)
        if self.convolved is not None:
            self.convolved.emit(self.batch, self.head)

        def store(state: Sequence[ir.Value]) -> None:
            if self.inside is not None:
                k.when(self.inside, lambda: self._store_state(item, state))
            else:
                self._store_state(item, state)

        if self.step is not None:
            self.step.emit(state, self._load_token(Scalar.constant(0, "index")), store)
        else:
            store(self._emit_tokens(state))

    def _state_index(self, item: Scalar, element: int) -> Scalar:
        load, part = divmod(element, self.p.width)
        row = (self.lane + load * self.p.lanes) * self.p.width + part
        return (item * self.c.dk + row) * (self.c.dv // self.p.columns) + self.column

    def _load_state(self, item: Scalar) -> list[ir.Value]:
        k, count = self.k, self.p.width * self.p.loads
        if self.past is None:
            return [k.constant(0.0, self.p.columns)] * count
        stored = [k.load(self.past, self._state_index(item, e)) for e in range(count)]
        return [k.widen(self.past, value) for value in stored]

    def _store_state(self, item: Scalar, state: Sequence[ir.Value]) -> None:
        for e, value in enumerate(state):
            self.k.store(value, self.present, self._state_index(item, e))

    # ---- tokens ----------------------------------------------------------------------------------------------------
    def _emit_tokens(self, state: list[ir.Value]) -> list[ir.Value]:
        """All tokens, ``prefetch`` of them a pass, and what is left one by one; the last state."""
        k, ahead = self.k, self.p.prefetch
        zero = Scalar.constant(0, "index")
        if self.static_tokens == 1:
            return self._emit_block(state, [self._load_token(zero)], zero, zero)
        if self.static_tokens is not None:
            whole = Scalar.constant(self.static_tokens // ahead * ahead, "index")
            state = self._emit_passes(state, whole)
            if self.static_tokens % ahead == 0:
                return state
        else:
            whole = self.tokens.divide_unsigned(ahead)[0] * ahead
            before, types = state, [value.type for value in state]
            state = k.choose(whole > 0, lambda: self._emit_passes(before, whole), lambda: before, types)
            if ahead == 1:
                return state

        def single(t: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            return self._emit_block(
                carried, [self._load_token(t)], t, whole.divide_unsigned(self.p.block)[0] + (t - whole)
            )

        return k.loop(whole, self.tokens, 1, state, single)

    def _emit_passes(self, state: list[ir.Value], stop: Scalar) -> list[ir.Value]:
        ahead, last = self.p.prefetch, self.tokens - 1
        first = [self._load_token(Scalar.constant(i, "index")) for i in range(ahead)]
        count, size = len(state), len(first[0].flat())

        def step(t: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            state, loaded = carried[:count], carried[count:]
            following: list[ir.Value] = []
            for start in range(0, ahead, self.p.block):
                group = range(start, start + self.p.block)
                tokens = [first[i].like(loaded[i * size : (i + 1) * size]) for i in group]
                for i in group:
                    following += self._load_token((t + (ahead + i)).minimum(last)).flat()
                state = self._emit_block(state, tokens, t + start, (t + start).divide_unsigned(self.p.block)[0])
            return [*state, *following]

        initial = [*state, *(v for token in first for v in token.flat())]
        return self.k.loop(Scalar.constant(0, "index"), stop, ahead, initial, step)[:count]

    def _load_token(self, t: Scalar) -> Token:
        k, c, p = self.k, self.c, self.p
        row = self.batch * self.tokens + t
        found = self.convolved

        def part(buffer: Buffer, heads: int, head: Scalar) -> list[ir.Value]:
            start = (row * heads + head) * (c.dk // p.width) + self.lane
            return [k.load(buffer, start + i * p.lanes) for i in range(p.loads)]

        if found is not None:
            query, key, value = found.values(self.lane, self.place)
        else:
            key = part(self.key, c.k_heads, self.head.divide_unsigned(c.kv_heads // c.k_heads)[0])
            share, heads = c.out_heads // c.q_heads, [self.head * c.rows + m for m in range(c.rows)]
            query = [part(self.query, c.q_heads, head.divide_unsigned(share)[0]) for head in heads]
            value = k.load(self.value, (row * c.kv_heads + self.head) * (c.dv // p.columns) + self.column)
        decay: list[ir.Value] = []
        if self.decay is not None:
            by_key = c.decay == "key"
            own = row * c.kv_heads + self.head
            decay = part(self.decay, c.kv_heads, self.head) if by_key else [k.load(self.decay, own)]
        beta: list[ir.Value] = []
        if self.beta is not None:
            beta = [k.load(self.beta, row * c.kv_heads + self.head if c.beta == "head" else row)]
        return Token(key, query, value, decay, beta)

    def _emit_block(
        self, state: Sequence[ir.Value], tokens: Sequence[Token], t: Scalar, turn: Scalar
    ) -> list[ir.Value]:
        """Decay, read, update and write the outputs of neighbouring tokens; the next state.

        All of them read the state of before the first one, so that one sum over the lanes serves them all, and
        correct that by what the tokens between have added:

            k_i S_i-1 = a_i .. a_0 k_i S + sum over j < i of ((a_i .. a_j+1 k_i) . k_j) u_j

        ``t`` is the first token; ``turn`` counts the blocks, of whatever sizes.
        """
        k = self.k
        keys = [self.elements(self.key, token.key) for token in tokens]
        decays = [self.decays(token) for token in tokens]
        queries = [[self.elements(self.query, row) for row in token.query] for token in tokens]
        wide = [[k.splat(e, self.p.columns) for e in key] for key in keys]
        state = self.decayed(state, decays[0])
        updates = [k.widen(self.value, token.value) for token in tokens]
        if self.beta is not None:
            held, overlaps = self._held(state, keys, decays, turn)
            for i, token in enumerate(tokens):
                rate = k.splat(self.rate(self.beta, token), self.p.columns)
                for j in range(i):
                    added = k.mul(k.splat(overlaps[i, j], self.p.columns), updates[j])
                    if self.c.decay == "head":  # one after the other, as the state would be: a zero stays one
                        for factor in decays[j + 1 : i + 1]:
                            (added,) = self.decayed([added], factor)
                    updates[i] = k.sub(updates[i], added)
                updates[i] = k.mul(rate, k.sub(updates[i], held[i]))
        reads: list[ir.Value] = []
        for i, asked in enumerate(queries):
            state = self.decayed(state, decays[i]) if i else state
            state = [k.fma(e, updates[i], s) for e, s in zip(wide[i], state, strict=True)]
            for row in asked:
                reads.append(self.lanes.dot([k.splat(e, self.p.columns) for e in row], state))
        self._write(reads, t, turn)
        return state

    def _held(
        self, state: Sequence[ir.Value], keys: list[list[ir.Value]], decays: list[list[ir.Value]], turn: Scalar
    ) -> tuple[list[ir.Value], dict[tuple[int, int], ir.Value]]:
        """What ``state``, already decayed for the first token, holds for each key, and how far the keys overlap."""
        k, columns, by_key = self.k, self.p.columns, self.c.decay == "key"
        pairs: dict[tuple[int, int], ir.Value] = {}
        parts: list[ir.Value] = []
        for i, own in enumerate(keys):
            key = own
            for j in reversed(range(i)):  # the key, decayed since after token j
                if by_key:
                    key = [k.mul(e, a) for e, a in zip(key, decays[j + 1], strict=True)]
                pairs[i, j] = self.lanes.dot(key, keys[j])
            parts.append(self.lanes.dot([k.splat(e, columns) for e in key], state))
        sums = self.lanes.sum([*parts, *pairs.values()], 0, turn)
        held, overlaps = sums[: len(keys)], dict(zip(pairs, sums[len(keys) :], strict=True))
        if self.c.decay == "head":
            for i in range(len(keys)):
                for factor in decays[1 : i + 1]:
                    (held[i],) = self.decayed([held[i]], factor)
        return held, overlaps

    def decays(self, token: Token) -> list[ir.Value]:
        """The factors of the state's rows: one for all of them, one a row, or none."""
        if self.decay is None:
            return []
        k, wide = self.k, [self.k.widen(self.decay, value) for value in token.decay]
        if self.before.gates:
            bias, scale = (Scalar(k.load(rate, self.head)) for rate in self.rates)
            wide = [(scale * (Scalar(value) + bias).softplus()).value for value in wide]
        return [element for value in wide for element in k.elements(k.exp(value))]

    def rate(self, beta: Buffer, token: Token) -> ir.Value:
        """The update rate."""
        value = self.k.widen(beta, token.beta[0])
        return Scalar(value).sigmoid().value if self.before.gates else value

    def decayed(self, state: Sequence[ir.Value], factors: list[ir.Value]) -> list[ir.Value]:
        """Values by rows of the state, times what :meth:`decays` found."""
        if not factors:
            return list(state)
        each = factors if self.c.decay == "key" else factors * len(state)
        return [self.k.mul(s, self.k.splat(a, self.p.columns)) for s, a in zip(state, each, strict=True)]

    def elements(self, buffer: Buffer, stored: Sequence[ir.Value]) -> list[ir.Value]:
        """Loaded elements one by one."""
        return [element for value in stored for element in self.k.elements(self.k.widen(buffer, value))]

    def _write(self, reads: list[ir.Value], t: Scalar, turn: Scalar) -> None:
        """Sum the reads of neighbouring tokens and their query heads over the lanes and write the outputs."""
        k, c = self.k, self.c
        index = Scalar.constant(0, "index")
        writes, lanes = self.valid, self.p.lanes
        if self.p.subgroup and len(reads) > 1:
            reads, index, lanes = self.lanes.scatter(reads)
            writes = (self.lane & (lanes - 1)).equals(0)
            writes = writes & self.inside if self.inside is not None else writes
        outputs = self.lanes.sum(reads, 1, turn, lanes)
        scale = k.constant(c.scale, self.p.columns)

        def write() -> None:
            for m, output in enumerate(outputs):
                token, row = (index + m).divide_unsigned(c.rows)
                head = (self.batch * self.tokens + t + token) * c.out_heads + self.head * c.rows + row
                k.store(k.mul(output, scale), self.output, head * (c.dv // self.p.columns) + self.column)

        k.when(writes, write)
