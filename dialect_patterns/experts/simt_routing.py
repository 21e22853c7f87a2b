"""Routing of strategy ``fused_simt``: a workgroup per token finds the k experts and what they count.

Each thread looks at some experts. The place of an expert among the chosen is the number of those that are liked better,
or as well and come later, so that threads wait for each other at barriers only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from iree.compiler import ir
from iree.compiler.dialects import arith

from ..emit.builder import Size, tensor_type
from ..emit.scalar import Scalar
from ..emit.simt_kernel import Buffer, Group, Kernel, dispatch
from ..op import LoweringContext
from .contract import Experts

_THREADS = 64


def choice_bytes(c: Experts) -> int:
    """Bytes of a workgroup's memory."""
    return 4 * (c.count + c.chosen)


def emit_choice(
    context: LoweringContext, c: Experts, logits: ir.Value, given: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """The experts i32 and their weights f32, both [T * k].

    Args:
        context: Where.
        c: The contract.
        logits: [T, E].
        given: The weights [T, E], or None for the softmax.
    """
    b = context.builder
    tokens = b.dim(logits, 0)
    threads = min(_THREADS, context.target.max_threads)

    def body(k: Kernel) -> None:
        _Choice(k, c, threads, given is not None).emit()

    kind = f"{'_given' if given is not None else ''}{'_normalised' if c.normalise else ''}"
    name = f"experts_choice_simt_{c.x.dtype}_{c.chosen}of{c.count}{kind}_t{threads}"
    size = b.mul(tokens, c.chosen)
    inputs = [logits] if given is None else [logits, given]
    outputs = [_output(size, dtype) for dtype in ("i32", "f32")]
    experts, weights = dispatch(name, Group(threads, 0), 1, b.index(tokens), [b.index(tokens)], inputs, outputs, body)
    return experts, weights


def _output(size: Size, dtype: str) -> tuple[ir.RankedTensorType, list[ir.Value]]:
    static = isinstance(size, int)
    return tensor_type((size if static else None,), dtype), [] if isinstance(size, int) else [size]


class _Choice:
    """Emits the kernel."""

    def __init__(self, k: Kernel, c: Experts, threads: int, given: bool) -> None:
        self.k, self.c, self.threads = k, c, threads
        tokens = k.number(0)
        self.tokens = tokens
        self.logits = k.buffer(0, c.x.dtype, tokens * c.count)
        self.given = k.buffer(1, c.x.dtype, tokens * c.count) if given else None
        first = 2 if given else 1
        self.experts = k.buffer(first, "i32", tokens * c.chosen)
        self.weights = k.buffer(first + 1, "f32", tokens * c.chosen)
        self.p = k.shared(c.count + c.chosen)

    def emit(self) -> None:
        """Emit everything; workgroups beyond the last token do its work again."""
        k, c = self.k, self.c
        token = k.item().minimum(self.tokens - 1)
        own = [k.thread() + start for start in range(0, c.count, self.threads)]
        self._for(own, c.count, lambda e: k.store(self._wide(self.logits, token * c.count + e), self.p, e))
        k.barrier()
        most = self._over_all(lambda value, total: k.maximum(total, value), float("-inf"))
        k.barrier()
        self._for(own, c.count, lambda e: k.store(k.exp(k.sub(k.load(self.p, e), most)), self.p, e))
        k.barrier()
        total = self._over_all(k.add, 0.0)
        k.barrier()
        self._for(own, c.count, lambda e: k.store(k.div(k.load(self.p, e), total), self.p, e))
        k.barrier()
        self._for(own, c.count, lambda e: self._place(token, e))
        k.barrier()
        places = [k.thread() + start for start in range(0, c.chosen, self.threads)]
        self._for(places, c.chosen, lambda j: self._write(token, j))

    def _for(self, own: list[Scalar], size: int, body: Callable[[Scalar], None]) -> None:
        for at in own:
            if size % self.threads == 0:
                body(at)
            else:
                self.k.when(at < size, partial(body, at))

    def _wide(self, buffer: Buffer, at: Scalar) -> ir.Value:
        return self.k.widen(buffer, self.k.load(buffer, at))

    def _over_all(self, fn: Callable[[ir.Value, ir.Value], ir.Value], initial: float) -> ir.Value:
        k, zero = self.k, Scalar.constant(0, "index")

        def step(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            return [fn(k.load(self.p, at), carried[0])]

        return k.loop(zero, Scalar.constant(self.c.count, "index"), 1, [k.constant(initial)], step)[0]

    def _place(self, token: Scalar, e: Scalar) -> None:
        """Where an expert comes; those that are chosen are written there."""
        k, c = self.k, self.c
        mine = Scalar(k.load(self.p, e))

        def step(at: Scalar, carried: list[ir.Value]) -> list[ir.Value]:
            other = Scalar(k.load(self.p, at))
            first = (other > mine) | (other.equals(mine) & (at > e))
            return [(Scalar(carried[0]) + first.to("i32", unsigned=True)).value]

        zero = Scalar.constant(0, "index")
        counted = k.loop(zero, Scalar.constant(c.count, "index"), 1, [Scalar.constant(0, "i32").value], step)[0]
        rank = Scalar(counted).to("index", unsigned=True)

        def write() -> None:
            place = rank.minimum(c.chosen - 1)
            k.store_as_is(e.to("i32", unsigned=True).value, self.experts, token * c.chosen + place)
            value = mine.value if self.given is None else self._wide(self.given, token * c.count + e)
            k.store(value, self.p, place + c.count)

        k.when(rank < c.chosen, write)

    def _write(self, token: Scalar, j: Scalar) -> None:
        k, c = self.k, self.c
        value = k.load(self.p, j + c.count)
        if c.normalise:
            total = k.constant(0.0)
            for other in range(c.chosen):
                total = k.add(total, k.load(self.p, Scalar.constant(c.count + other, "index")))
            value = k.div(value, total)
        k.store(value, self.weights, token * c.chosen + j)


def clamped(raw: ir.Value, count: int) -> Scalar:
    """A number below ``count`` from memory; whatever is there, it is made one."""
    most = Scalar.constant(count - 1, "i32").value
    return Scalar(arith.MinUIOp(raw, most).result).to("index", unsigned=True)
