"""Routing of strategy ``fused_simd``: which experts each token takes, and which tokens each expert gets.

    p = softmax(router[t]); k times the largest p, of equal ones the last    experts i32 [T, k], weights f32 [T, k]

Many tokens are grouped: each expert gets whole tiles of rows, the last one filled up, all tiles one after the other.

    order [tiles, tile]    the assignment t k + j in each row, -1 where there is none
    owner [tiles]          the expert of each tile, spans [E, 2] first tile and number of tiles of each expert
    slots [T, k]           the row of each assignment

There are at most T k / tile + E tiles, so that all sizes are known before the experts are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..emit.dispatch import Kernel
from ..emit.kernel_text import Index, KernelText, vector_type
from ..node import Dim, TensorSpec
from ..target import Target
from .contract import Experts

_TOKENS = 16  # of a workgroup
_TAKEN = -1.0  # less than any probability
_LEAST = -2.0


def load_number(k: KernelText, memref: str, indices: Sequence[Index], count: Index) -> Index:
    """A number below ``count`` from memory; whatever is there, it is made one."""
    raw = k.as_type(k.load(memref, indices, raw=True), "index", "arith.index_castui")
    return k.minimum(raw, k.sub(count, 1))


def store_number(k: KernelText, value: Index, memref: str, indices: Sequence[Index]) -> None:
    """An index as i32."""
    k.store(k.as_type(k.index(value), "i32", "arith.index_castui"), memref, indices)


def most_tiles(c: Experts, tile: int) -> Dim:
    """Tiles that all tokens can need; None where the tokens are open."""
    if c.rows is None:
        return None
    return c.rows * c.chosen // tile + min(c.count, c.rows * c.chosen)


def choosing_kernel(c: Experts, target: Target) -> Kernel:
    """Softmax and the k largest."""
    lanes = max(target.vector_bits // 32, 4)
    dtype, given = c.x.dtype, c.router_weights is not None
    logits = TensorSpec((c.rows, c.count), dtype)

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        group = k.op("hal.interface.workgroup.id[1] : index", "index")
        first = k.mul(group, _TOKENS)
        stop = k.minimum(k.add(first, _TOKENS), tokens)
        writer = _Choosing(k, c, lanes, memrefs[0], memrefs[1] if given else None, *memrefs[-2:])

        def token(at: str, _: list[str]) -> list[str]:
            writer.token(at)
            return []

        k.loop(stop, [], token, start=first)

    weights = f"{'_given' if given else ''}{'_normalised' if c.normalise else ''}"
    rows = "x" if c.rows is None else str(c.rows)
    return Kernel(
        name=f"experts_choice_{dtype}_{rows}x{c.count}_k{c.chosen}{weights}_v{lanes * 32}",
        inputs=(logits, logits) if given else (logits,),
        outputs=(TensorSpec((c.rows, c.chosen), "i32"), TensorSpec((c.rows, c.chosen), "f32")),
        axes=("T_",) * (4 if given else 3),
        workgroups=(1, 1),
        write=write,
        share=_TOKENS,
    )


class _Choosing:
    """Writes the choice of a token.

    Args:
        k: Where to.
        c: What is computed.
        lanes: Lanes of a vector.
        logits: Memref [T, E].
        given: Memref of the weights [T, E], or None.
        experts: Memref [T, k].
        weights: Memref [T, k].
    """

    def __init__(
        self, k: KernelText, c: Experts, lanes: int, logits: str, given: str | None, experts: str, weights: str
    ) -> None:
        self.k, self.c, self.lanes = k, c, lanes
        self.logits, self.given, self.experts, self.weights = logits, given, experts, weights
        self.padded = -(-c.count // lanes) * lanes
        self.p = k.alloca([self.padded])
        self.vector = vector_type(lanes)

    def token(self, t: Index) -> None:
        """The experts of token ``t`` and their weights."""
        k, c = self.k, self.c
        self._softmax(t)
        total = k.loop(c.chosen, [k.constant(0.0, "f32")], lambda j, carried: [self._one(t, j, carried[0])])[0]
        if c.normalise:

            def divide(j: str, _: list[str]) -> list[str]:
                k.store(k.divf(k.load(self.weights, [t, j]), total), self.weights, [t, j])
                return []

            k.loop(c.chosen, [], divide)

    def _softmax(self, t: Index) -> None:
        k, lanes = self.k, self.lanes
        whole = self.c.count // lanes * lanes
        lowest = float("-inf")

        def copy(at: str, carried: list[str]) -> list[str]:
            values = k.load(self.logits, [t, at], lanes)
            k.store(values, self.p, [at])
            return [k.maxf(carried[0], values)]

        (most,) = k.loop(whole, [k.constant(lowest, self.vector)], copy, step=lanes)
        if whole < self.padded:
            for at in range(whole, self.padded):
                value = k.load(self.logits, [t, at]) if at < self.c.count else k.constant(lowest, "f32")
                k.store(value, self.p, [at])
            most = k.maxf(most, k.load(self.p, [whole], lanes))
        largest = k.op(f"vector.reduction <maximumf>, {most} : {self.vector} into f32", "f32")

        def power(at: str, carried: list[str]) -> list[str]:
            values = k.exp(k.subf(k.load(self.p, [at], lanes), k.splat(largest, lanes)))
            k.store(values, self.p, [at])
            return [k.addf(carried[0], values)]

        (sums,) = k.loop(self.padded, [k.constant(0.0, self.vector)], power, step=lanes)
        total = k.splat(k.op(f"vector.reduction <add>, {sums} : {self.vector} into f32", "f32"), lanes)

        def divide(at: str, _: list[str]) -> list[str]:
            k.store(k.divf(k.load(self.p, [at], lanes), total), self.p, [at])
            return []

        k.loop(self.padded, [], divide, step=lanes)
        for at in range(self.c.count, self.padded):
            k.store(k.constant(_TAKEN, "f32"), self.p, [at])

    def _one(self, t: Index, j: Index, total: str) -> str:
        """The next expert; ``total`` and its weight."""
        k, c, lanes = self.k, self.c, self.lanes
        mask = vector_type(lanes, "i1")
        steps = k.lanes_constant([float(i) for i in range(lanes)])

        def better(at: str, carried: list[str]) -> list[str]:
            values = k.load(self.p, [at], lanes)
            start = k.as_type(k.as_type(at, "i32", "arith.index_castui"), "f32", "arith.uitofp")
            places = k.addf(k.splat(start, lanes), steps)
            found = k.op(f"arith.cmpf oge, {values}, {carried[0]} : {self.vector}", mask)
            return [k.select(found, values, carried[0]), k.select(found, places, carried[1])]

        initial = [k.constant(_LEAST, self.vector), k.constant(0.0, self.vector)]
        best, places = k.loop(self.padded, initial, better, step=lanes)
        most = k.splat(k.op(f"vector.reduction <maximumf>, {best} : {self.vector} into f32", "f32"), lanes)
        equal = k.op(f"arith.cmpf oeq, {best}, {most} : {self.vector}", mask)
        place = k.select(equal, places, initial[1])
        last = k.op(f"vector.reduction <maximumf>, {place} : {self.vector} into f32", "f32")
        number = k.as_type(k.as_type(last, "i32", "arith.fptoui"), "index", "arith.index_castui")
        expert = k.minimum(number, c.count - 1)
        weight = k.load(self.p, [expert]) if self.given is None else k.load(self.given, [t, expert])
        k.store(k.constant(_TAKEN, "f32"), self.p, [expert])
        store_number(k, expert, self.experts, [t, j])
        k.store(weight, self.weights, [t, j])
        return k.addf(total, weight)


def grouping_kernel(c: Experts, tile: int) -> Kernel:
    """From the experts of each token to the tiles of each expert."""
    tiles = most_tiles(c, tile)

    def write(k: KernelText, batch: Index, tokens: Index, memrefs: Sequence[str]) -> None:
        del batch
        _group(k, c, tile, tokens, memrefs)

    rows = "x" if c.rows is None else str(c.rows)
    return Kernel(
        name=f"experts_groups_{rows}x{c.count}_k{c.chosen}_t{tile}",
        inputs=(TensorSpec((c.rows, c.chosen), "i32"),),
        outputs=(
            TensorSpec((tiles, tile), "i32"),
            TensorSpec((tiles,), "i32"),
            TensorSpec((c.count, 2), "i32"),
            TensorSpec((c.rows, c.chosen), "i32"),
        ),
        axes=("T_", "R_", "R", "__", "T_"),
        workgroups=(1, 1),
        write=write,
    )


def _group(k: KernelText, c: Experts, tile: int, tokens: Index, memrefs: Sequence[str]) -> None:
    experts, order, owner, spans, slots = memrefs
    counts, firsts = k.alloca([c.count], "i32"), k.alloca([c.count], "i32")
    zero, none = k.constant(0, "i32"), k.constant(-1, "i32")
    tiles = dimension(k, order)
    rows = k.mul(tiles, tile)

    def each(stop: Index, body: Callable[[str], None]) -> None:
        def once(at: str, _: list[str]) -> list[str]:
            body(at)
            return []

        k.loop(stop, [], once)

    def number(memref: str, at: Sequence[Index]) -> Index:
        return k.as_type(k.load(memref, at, raw=True), "index", "arith.index_castui")

    def no_row(at: str) -> None:
        each(tile, lambda i: k.store(none, order, [at, i]))
        k.store(zero, owner, [at])

    each(tiles, no_row)
    each(c.count, lambda e: k.store(zero, counts, [e]))

    def count(t: str) -> None:
        def one(j: str) -> None:
            expert = load_number(k, experts, [t, j], c.count)
            before = number(counts, [expert])
            store_number(k, before, slots, [t, j])
            store_number(k, k.add(before, 1), counts, [expert])

        each(c.chosen, one)

    each(tokens, count)

    def span(e: str, carried: list[str]) -> list[str]:
        needed = k.div(k.add(number(counts, [e]), tile - 1), tile)
        store_number(k, carried[0], spans, [e, 0])
        store_number(k, carried[0], firsts, [e])
        store_number(k, needed, spans, [e, 1])

        def own(at: str, _: list[str]) -> list[str]:
            store_number(k, e, owner, [at])
            return []

        after = k.index(k.add(carried[0], needed))
        k.loop(after, [], own, start=carried[0])
        return [after]

    k.loop(c.count, [k.index(0)], span)

    def place(t: str) -> None:
        def one(j: str) -> None:
            expert = load_number(k, experts, [t, j], c.count)
            inside = load_number(k, slots, [t, j], rows)
            slot = k.minimum(k.add(k.mul(number(firsts, [expert]), tile), inside), k.sub(rows, 1))
            store_number(k, slot, slots, [t, j])
            store_number(k, k.add(k.mul(t, c.chosen), j), order, [k.div(slot, tile), k.rem(slot, tile)])

        each(c.chosen, one)

    each(tokens, place)


def dimension(k: KernelText, memref: str) -> Index:
    """The size of a memref's first dimension."""
    first = k.types[memref].removeprefix("memref<").split("x", 1)[0]
    return int(first) if first != "?" else k.op(f"memref.dim {memref}, {k.index(0)} : {k.types[memref]}", "index")
