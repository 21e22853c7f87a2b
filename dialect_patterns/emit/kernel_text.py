"""Writes the body of a hand-made kernel: scf, vector, memref and arith ops as MLIR text.

Values are their names (``%7``); the writer knows their types. Indices may also be Python ints, which are folded. Loops
take a Python function as body, as in :class:`~.builder.Builder`. ``vector<NxT>`` and scalars share the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_LEAST_EXPONENT = -87.3

Index = int | str
"""An index: a constant or the name of an index value."""


def vector_type(lanes: int, dtype: str = "f32") -> str:
    """The type of a vector."""
    return f"vector<{lanes}x{dtype}>"


class KernelText:
    """The text of one function body, and the types of its values.

    Attributes:
        types: Name of each value -> its MLIR type.
    """

    def __init__(self) -> None:
        self.types: dict[str, str] = {}
        self._lines: list[str] = []
        self._head: list[str] = []
        self._constants: dict[tuple[str, str], str] = {}
        self._indent = 3

    def text(self) -> str:
        """The body, constants first."""
        return "\n".join([*self._head, *self._lines])

    # ---- ops -------------------------------------------------------------------------------------------------------
    def _name(self, dtype: str) -> str:
        name = f"%{len(self.types)}"
        self.types[name] = dtype
        return name

    def do(self, text: str) -> None:
        """An op without result."""
        self._lines.append("  " * self._indent + text)

    def op(self, text: str, dtype: str) -> str:
        """An op with one result of the given type."""
        name = self._name(dtype)
        self.do(f"{name} = {text}")
        return name

    def constant(self, value: float | int, dtype: str) -> str:
        """A constant; a vector constant has all lanes alike."""
        literal = f"{value:.9e}" if re.search(r"(^|x)b?f\d", dtype) else str(value)
        if literal in ("inf", "-inf"):
            literal = "0x7F800000" if literal == "inf" else "0xFF800000"
        literal = f"dense<{literal}>" if dtype.startswith("vector") else literal
        return self._literal(literal, dtype)

    def lanes_constant(self, values: Sequence[float]) -> str:
        """A constant vector of f32."""
        return self._literal(f"dense<[{', '.join(f'{v:.9e}' for v in values)}]>", vector_type(len(values)))

    def _literal(self, literal: str, dtype: str) -> str:
        key = (literal, dtype)
        if key not in self._constants:
            name = self._constants[key] = self._name(dtype)
            self._head.append(f"      {name} = arith.constant {literal} : {dtype}")
        return self._constants[key]

    # ---- indices ---------------------------------------------------------------------------------------------------
    def index(self, value: Index) -> str:
        """The name of an index."""
        return self.constant(value, "index") if isinstance(value, int) else value

    def _index_op(self, name: str, a: Index, b: Index) -> str:
        return self.op(f"arith.{name} {self.index(a)}, {self.index(b)} : index", "index")

    def add(self, a: Index, b: Index) -> Index:
        """Sum of two indices."""
        if isinstance(a, int) and isinstance(b, int):
            return a + b
        if a == 0 or b == 0:
            return b if a == 0 else a
        return self._index_op("addi", a, b)

    def sub(self, a: Index, b: Index) -> Index:
        """Difference of two indices."""
        if isinstance(a, int) and isinstance(b, int):
            return a - b
        return a if b == 0 else self._index_op("subi", a, b)

    def mul(self, a: Index, b: Index) -> Index:
        """Product of two indices."""
        if isinstance(a, int) and isinstance(b, int):
            return a * b
        if a == 1 or b == 1:
            return b if a == 1 else a
        return self._index_op("muli", a, b)

    def div(self, a: Index, b: int) -> Index:
        """Quotient of two non-negative indices."""
        if isinstance(a, int):
            return a // b
        return a if b == 1 else self._index_op("divui", a, b)

    def rem(self, a: Index, b: int) -> Index:
        """Remainder of two non-negative indices."""
        if isinstance(a, int):
            return a % b
        return 0 if b == 1 else self._index_op("remui", a, b)

    def minimum(self, a: Index, b: Index) -> Index:
        """The smaller of two non-negative indices."""
        if isinstance(a, int) and isinstance(b, int):
            return min(a, b)
        return self._index_op("minui", a, b)

    def less(self, a: Index, b: Index, *, or_equal: bool = False) -> str:
        """Comparison of two non-negative indices."""
        kind = "ule" if or_equal else "ult"
        return self.op(f"arith.cmpi {kind}, {self.index(a)}, {self.index(b)} : index", "i1")

    # ---- memory ----------------------------------------------------------------------------------------------------
    def alloca(self, shape: Sequence[int], dtype: str = "f32") -> str:
        """An array on the stack; at the start of the function, so that it is made once."""
        memref = f"memref<{'x'.join(map(str, shape))}x{dtype}>"
        name = self._name(memref)
        properties = "<{alignment = 64 : i64, operandSegmentSizes = array<i32: 0, 0>}>"
        self._head.append(f'      {name} = "memref.alloca"() {properties} : () -> {memref}')
        return name

    def _place(self, memref: str, indices: Sequence[Index]) -> str:
        return f"{memref}[{', '.join(self.index(i) for i in indices)}] : {self.types[memref]}"

    def element_type(self, memref: str) -> str:
        """The element type of a memref."""
        match = re.search(r"x(bf16|f16|f32|i32|i8)>$", self.types[memref])
        assert match is not None
        return match[1]

    def element_bytes(self, memref: str) -> int:
        """The size of an element of a memref."""
        return int(self.element_type(memref).lstrip("bfi")) // 8

    def load(self, memref: str, indices: Sequence[Index], lanes: int = 0, *, raw: bool = False) -> str:
        """One element, or ``lanes`` of them along the last dimension, widened to f32 unless ``raw``."""
        place, dtype = self._place(memref, indices), self.element_type(memref)
        if lanes:
            vector = vector_type(lanes, dtype)
            value = self.op(f"vector.load {place}, {vector}", vector)
        else:
            value = self.op(f"memref.load {place}", dtype)
        return value if raw else self.widen(value)

    def store(self, value: str, memref: str, indices: Sequence[Index]) -> None:
        """Write an f32 or a vector of them, rounded to the memref's type."""
        value = self.narrow(value, self.element_type(memref))
        place, dtype = self._place(memref, indices), self.types[value]
        if dtype.startswith("vector"):
            self.do(f"vector.store {value}, {place}, {dtype}")
        else:
            self.do(f"memref.store {value}, {place}")

    def prefetch(self, memref: str, indices: Sequence[Index], *, level: int = 1, write: bool = False) -> None:
        """Ask for the cache line of an element: into the first or second cache, to read or to write it."""
        place, _, dtype = self._place(memref, indices).partition(" : ")
        self.do(f"memref.prefetch {place}, {'write' if write else 'read'}, locality<{4 - level}>, data : {dtype}")

    # ---- arithmetic ------------------------------------------------------------------------------------------------
    def widen(self, value: str) -> str:
        """As f32."""
        dtype = self.types[value]
        wide = re.sub(r"\bbf16$|\bf16$", "f32", dtype) if dtype[0] != "v" else re.sub(r"x(bf16|f16)>", "xf32>", dtype)
        return value if wide == dtype else self.op(f"arith.extf {value} : {dtype} to {wide}", wide)

    def narrow(self, value: str, element: str) -> str:
        """An f32 as ``element``, rounded to nearest even."""
        dtype = self.types[value]
        narrow = dtype.replace("f32", element)
        return value if narrow == dtype else self.op(f"arith.truncf {value} : {dtype} to {narrow}", narrow)

    def lanes(self, value: str) -> int:
        """Lanes of a vector, 0 for a scalar."""
        match = re.match(r"vector<(\d+)x", self.types[value])
        return int(match[1]) if match else 0

    def splat(self, value: str, lanes: int) -> str:
        """A scalar in all lanes."""
        if not lanes or self.lanes(value):
            return value
        dtype = self.types[value]
        return self.op(f"vector.broadcast {value} : {dtype} to {vector_type(lanes, dtype)}", vector_type(lanes, dtype))

    def _operands(self, *values: str) -> tuple[str, str]:
        lanes = max(self.lanes(v) for v in values)
        values = tuple(self.splat(v, lanes) for v in values)
        return ", ".join(values), self.types[values[0]]

    def _arith(self, name: str, *values: str) -> str:
        operands, dtype = self._operands(*values)
        return self.op(f"{name} {operands} : {dtype}", dtype)

    def addf(self, a: str, b: str) -> str:
        """Sum."""
        return self._arith("arith.addf", a, b)

    def subf(self, a: str, b: str) -> str:
        """Difference."""
        return self._arith("arith.subf", a, b)

    def mulf(self, a: str, b: str) -> str:
        """Product."""
        return self._arith("arith.mulf", a, b)

    def divf(self, a: str, b: str) -> str:
        """Quotient."""
        return self._arith("arith.divf", a, b)

    def maxf(self, a: str, b: str) -> str:
        """The larger one; NaN wins."""
        return self._arith("arith.maximumf", a, b)

    def minf(self, a: str, b: str) -> str:
        """The smaller one; NaN wins."""
        return self._arith("arith.minimumf", a, b)

    def fma(self, a: str, b: str, c: str) -> str:
        """The sum a * b + c, one instruction where the target has it (``math.fma`` is a slow call elsewhere)."""
        operands, dtype = self._operands(a, b, c)
        a, b, c = operands.split(", ")
        product = self.op(f"arith.mulf {a}, {b} fastmath<contract> : {dtype}", dtype)
        return self.op(f"arith.addf {product}, {c} fastmath<contract> : {dtype}", dtype)

    def andi(self, a: str, b: str) -> str:
        """Bits in both."""
        return self._arith("arith.andi", a, b)

    def addi(self, a: str, b: str) -> str:
        """Sum of integers, modulo their size."""
        return self._arith("arith.addi", a, b)

    def shift_right(self, a: str, bits: int) -> str:
        """Integers shifted right, zeros coming in."""
        return a if bits == 0 else self._arith("arith.shrui", a, self.constant(bits, self.types[a]))

    def shift_left(self, a: str, bits: int) -> str:
        """Integers shifted left, zeros coming in."""
        return a if bits == 0 else self._arith("arith.shli", a, self.constant(bits, self.types[a]))

    def as_type(self, value: str, dtype: str, op: str) -> str:
        """``value`` converted to another type by an op such as ``vector.bitcast`` or ``arith.sitofp``."""
        before = self.types[value]
        return value if before == dtype else self.op(f"{op} {value} : {before} to {dtype}", dtype)

    def intrinsic(self, name: str, operands: Sequence[str], dtype: str) -> str:
        """An instruction of the target by its LLVM name."""
        types = ", ".join(self.types[value] for value in operands)
        return self.op(f'llvm.call_intrinsic "{name}"({", ".join(operands)}) : ({types}) -> {dtype}', dtype)

    def exp(self, a: str) -> str:
        """Exponential; 0 where f32 has no normal number for it (IREE's approximation ends at e^-88, also for -inf)."""
        power = self._arith("math.exp", a)
        dtype = self.types[a]
        least, zero = self.constant(_LEAST_EXPONENT, dtype), self.constant(0.0, dtype)
        mask = "i1" if dtype == "f32" else re.sub("f32", "i1", dtype)
        small = self.op(f"arith.cmpf olt, {a}, {least} : {dtype}", mask)
        return self.select(small, zero, power)

    def select(self, mask: str, a: str, b: str) -> str:
        """``a`` where the mask says so, else ``b``; nothing of the other one, not even NaN."""
        return self.op(f"arith.select {mask}, {a}, {b} : {self.types[mask]}, {self.types[a]}", self.types[a])

    def lanes_mask(self, values: Sequence[bool]) -> str:
        """A constant mask."""
        return self._literal(f"dense<[{', '.join(str(v).lower() for v in values)}]>", vector_type(len(values), "i1"))

    def negate(self, a: str) -> str:
        """-a."""
        return self._arith("arith.negf", a)

    def extract(self, vector: str, lane: int) -> str:
        """One lane."""
        dtype = self.types[vector].removesuffix(">").rpartition("x")[2]
        return self.op(f"vector.extract {vector}[{lane}] : {dtype} from {self.types[vector]}", dtype)

    def shuffle(self, a: str, b: str, mask: Sequence[int]) -> str:
        """The lanes ``mask`` of a and b joined."""
        result = re.sub(r"<\d+x", f"<{len(mask)}x", self.types[a])
        return self.op(f"vector.shuffle {a}, {b} {list(mask)} : {self.types[a]}, {self.types[b]}", result)

    def sum_lanes(self, vectors: Sequence[str]) -> list[str]:
        """The sum over the lanes of each vector; all at once, which costs less than one by one."""
        lanes = self.lanes(vectors[0])
        if len(vectors) > lanes:
            return [s for i in range(0, len(vectors), lanes) for s in self.sum_lanes(vectors[i : i + lanes])]
        count = 1 << (len(vectors) - 1).bit_length()
        rest = [*vectors, *[vectors[-1]] * (count - len(vectors))]
        segment = lanes
        while segment > 1:  # each vector holds segments, one a sum; halve them, two vectors becoming one
            half, width = segment // 2, self.lanes(rest[0])
            pairs = len(rest) > 1
            starts = range(0, 2 * width if pairs else width, segment)
            low = [s + i for s in starts for i in range(half)]
            joined: list[str] = []
            for i in range(0, len(rest), 2 if pairs else 1):
                a, b = rest[i], rest[i + 1 if pairs else i]
                joined.append(self.addf(self.shuffle(a, b, low), self.shuffle(a, b, [i + half for i in low])))
            rest, segment = joined, half
        return [self.extract(rest[0], i) for i in range(len(vectors))]

    # ---- control flow ----------------------------------------------------------------------------------------------
    def _block(self, write: Callable[[], Sequence[str]], close: str) -> None:
        self._indent += 1
        results = write()
        if results:
            self.do(f"scf.yield {', '.join(results)} : {', '.join(self.types[r] for r in results)}")
        self._indent -= 1
        self.do(close)

    def _results(self, types: Sequence[str]) -> tuple[str, list[str]]:
        """Text for the results of an op with regions, and their names."""
        base = f"%r{len(self.types)}"
        names = [f"{base}#{i}" for i in range(len(types))] if len(types) > 1 else [base] * len(types)
        self.types.update(zip(names, types, strict=True))
        if not types:
            return "", []
        return (f"{base}:{len(types)} = " if len(types) > 1 else f"{base} = "), names

    def loop(
        self,
        stop: Index,
        carried: Sequence[str],
        body: Callable[[str, list[str]], Sequence[str]],
        *,
        start: Index = 0,
        step: Index = 1,
    ) -> list[str]:
        """``scf.for``: ``body(index, carried)`` returns the next carried values; returns the last ones."""
        types = [self.types[c] for c in carried]
        text, names = self._results(types)
        induction, inner = self._name("index"), [self._name(t) for t in types]
        pairs = ", ".join(f"{i} = {c}" for i, c in zip(inner, carried, strict=True))
        arguments = f" iter_args({pairs}) -> ({', '.join(types)})" if types else ""
        bounds = f"{self.index(start)} to {self.index(stop)} step {self.index(step)}"
        self.do(f"{text}scf.for {induction} = {bounds}{arguments} {{")
        self._block(lambda: body(induction, inner), "}")
        return names

    def while_less(self, stop: Index, body: Callable[[str], str]) -> None:
        """From index 0 on: ``body(index)`` returns the next index, until that is not less than ``stop``."""
        name, before, after = self._name("index"), self._name("index"), self._name("index")
        self.do(f"{name} = scf.while ({before} = {self.index(0)}) : (index) -> index {{")
        self._indent += 1
        self.do(f"scf.condition({self.less(before, stop)}) {before} : index")
        self._indent -= 1
        self.do("} do {")
        self.do(f"^bb0({after}: index):")
        self._block(lambda: [body(after)], "}")

    def when(
        self,
        condition: str,
        types: Sequence[str],
        then: Callable[[], Sequence[str]],
        otherwise: Callable[[], Sequence[str]],
    ) -> list[str]:
        """``scf.if`` with results."""
        text, names = self._results(types)
        arrow = f" -> ({', '.join(types)})" if types else ""
        self.do(f"{text}scf.if {condition}{arrow} {{")
        self._block(then, "} else {")
        self._block(otherwise, "}")
        return names
