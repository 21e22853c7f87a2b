"""Emits a whole operator as one GPU kernel: the executable around it, and the instructions that its body is made of.

A kernel is a ``hal.executable.source`` at module level, whose body IREE leaves as written (``no_pipeline``), and a
``flow.dispatch`` in the function. CUDA, Vulkan, ROCm and Metal compile the same text. Buffers are flat and their
elements are vectors, so that every load has the width it is written with; 16-bit floats are loaded as 16 bits, bf16
as integers, since not every target computes with it. All arithmetic is f32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from iree.compiler import ir
from iree.compiler.dialects import arith, memref, vector

from .assembly import assembly
from .builder import spec_of
from .scalar import Scalar
from .simt_values import Values

MAX_GROUPS = 32_768
"""Workgroups along y; what is beyond goes to z. Devices offer at least 65,535 of either."""

_CHUNK = 4  # f32 of 16 bytes
_STORED = {"f32": "f32", "f16": "f16", "bf16": "i16", "i32": "i32"}


@dataclass(frozen=True)
class Group:
    """The threads of a workgroup.

    Attributes:
        threads: How many.
        subgroup: Threads of a subgroup, 0 where the target has no operations among them.
    """

    threads: int
    subgroup: int


def dispatch(
    name: str,
    group: Group,
    tiles: int | ir.Value,
    items: ir.Value,
    numbers: Sequence[ir.Value],
    inputs: Sequence[ir.Value],
    outputs: Sequence[tuple[ir.RankedTensorType, list[ir.Value]]],
    body: Callable[[Kernel], None],
    written: Sequence[int] = (),
    kernel: type[Kernel] | None = None,
) -> list[ir.Value]:
    """Run a kernel with ``tiles`` workgroups for each of ``items``; define it unless the module has it already.

    Args:
        name: The kernel's symbol; it must spell everything that ``body`` depends on.
        group: The threads of a workgroup.
        tiles: Workgroups an item; an int is written into the module, an index value is not.
        items: Index value, how often the tiles are needed.
        numbers: Index values that the kernel reads with :meth:`Kernel.number`, each below 2^31.
        inputs: Tensors that the kernel reads, its buffers 0, 1, ...
        outputs: Type and open sizes of each tensor that it writes, its further buffers.
        body: Emits the kernel for one tile of one item.
        written: Inputs that the kernel writes into, too; their sizes are known.
        kernel: What ``body`` emits instructions with, where it is none for all GPUs.

    Returns:
        The outputs, and then the inputs that were written into.
    """
    module = ir.InsertionPoint.current.block.owner.operation
    while module.name != "builtin.module":
        assert module.parent is not None
        module = module.parent.operation
    block = module.regions[0].blocks[0]
    if name not in ir.SymbolTable(module):
        known = tiles if isinstance(tiles, int) else None
        layout = _layout(len(numbers), len(inputs), len(outputs), written)
        source = _source(name, group, known, layout)
        ir.InsertionPoint.at_block_begin(block).insert(source)
        functions = [op for op in _blocks(source)[0].operations if op.operation.name == "builtin.module"]
        function = _blocks(functions[0].operation)[0].operations[0]
        with ir.InsertionPoint(_blocks(function.operation)[0].operations[0]):
            body((kernel or Kernel)(group, layout, len(inputs), written))
    i32 = ir.IntegerType.get_signless(32)
    constants = [arith.IndexCastOp(i32, number).result for number in numbers]
    input_dims = [
        _tensor_dim(tensor, axis)
        for tensor in inputs
        for axis, size in enumerate(spec_of(tensor).shape)
        if size is None
    ]
    output_dims = [size for _, sizes in outputs for size in sizes]
    workload = [items] if isinstance(tiles, int) else [items, tiles]
    attributes: dict[str, ir.Attribute] = {
        "entry_points": ir.Attribute.parse(f"[@{name}::@{name}]"),
        "operandSegmentSizes": ir.DenseI32ArrayAttr.get(
            [len(workload), len(constants) + len(inputs), len(input_dims), len(output_dims)]
        ),
    }
    if written:
        tied = [-1] * len(outputs) + [len(constants) + i for i in written]
        attributes["tied_operands"] = ir.ArrayAttr.get([ir.IntegerAttr.get(ir.IndexType.get(), i) for i in tied])
    return list(
        ir.Operation.create(
            "flow.dispatch",
            results=[*(result for result, _ in outputs), *(inputs[i].type for i in written)],
            operands=[*workload, *constants, *inputs, *input_dims, *output_dims],
            attributes=attributes,
        ).results
    )


def _tensor_dim(tensor: ir.Value, axis: int) -> ir.Value:
    index = arith.ConstantOp(ir.IndexType.get(), ir.IntegerAttr.get(ir.IndexType.get(), axis)).result
    return ir.Operation.create("tensor.dim", results=[ir.IndexType.get()], operands=[tensor, index]).result


def _blocks(op: ir.Operation) -> list[ir.Block]:
    return list(op.regions[0].blocks)


def _layout(numbers: int, inputs: int, outputs: int, written: Sequence[int]) -> str:
    kinds = ["" if i in written else ", ReadOnly" for i in range(inputs)] + [""] * outputs
    bindings = [f"#hal.pipeline.binding<storage_buffer{kind}>" for kind in kinds]
    return f"#hal.pipeline.layout<constants = {numbers}, bindings = [{', '.join(bindings)}]>"


def _source(name: str, group: Group, tiles: int | None, layout: str) -> ir.Operation:
    """The executable with an empty kernel; without ``tiles`` they are given."""
    given, x = (", %x: index", "") if tiles is None else ("", f"%x = arith.constant {tiles} : index")
    subgroup = f" subgroup_size = {group.subgroup}" if group.subgroup else ""
    op = ir.Operation.parse(f"""
hal.executable.source private @{name} {{
  hal.executable.export public @{name} ordinal(0) layout({layout})
      count(%device: !hal.device, %items: index{given}) -> (index, index, index) {{
    {x}
    %most = arith.constant {MAX_GROUPS} : index
    %y = arith.minui %items, %most : index
    %z = arith.ceildivui %items, %most : index
    hal.return %x, %y, %z : index, index, index
  }}
  builtin.module {{
    func.func @{name}() attributes {{translation_info = #iree_codegen.translation_info<
        pipeline = #iree_codegen.no_pipeline workgroup_size = [{group.threads}, 1, 1]{subgroup}>}} {{
      return
    }}
  }}
}}""")
    return op.operation


@dataclass(frozen=True)
class Buffer:
    """A flat buffer of a kernel.

    Attributes:
        value: The memref.
        dtype: Element type of the tensor: ``f32``, ``f16``, ``bf16``, or ``i32`` for what is no number yet.
        width: Elements of one load.
    """

    value: ir.Value
    dtype: str
    width: int


class Kernel(Values):
    """Emits the instructions of one kernel; those that only compute are of :class:`~.simt_values.Values`.

    Args:
        group: The threads of a workgroup.
        layout: The numbers that the dispatch gives, and the buffers.
        inputs: Count of the input buffers.
        written: Those of them that the kernel writes into, too.
    """

    def __init__(self, group: Group, layout: str, inputs: int, written: Sequence[int] = ()) -> None:
        self.group = group
        self._layout = ir.Attribute.parse(layout)
        self._inputs, self._written = inputs, written

    # ---- where and on what -----------------------------------------------------------------------------------------
    def number(self, ordinal: int) -> Scalar:
        """A number that the dispatch gives."""
        ordinal_attr = ir.IntegerAttr.get(ir.IndexType.get(), ordinal)
        value = ir.Operation.create(
            "hal.interface.constant.load",
            results=[ir.IntegerType.get_signless(32)],
            attributes={"layout": self._layout, "ordinal": ordinal_attr},
        ).result
        return Scalar(value).to("index", unsigned=True)

    def buffer(self, binding: int, dtype: str, size: Scalar, width: int = 1) -> Buffer:
        """Buffer ``binding`` with ``size`` loads of ``width`` elements.

        Of an input, two bf16 elements are loaded as one i32: NVIDIA's Vulkan driver makes code of vectors of i16 that
        is four times slower.
        """
        element = str(self.type(width, _STORED[dtype]))
        if dtype == "bf16" and width > 1 and binding < self._inputs:
            element = str(self.type(width // 2, "i32"))
        return self._subspan(binding, size, dtype, width, element)

    def _subspan(self, binding: int, size: Scalar, dtype: str, width: int, element: str) -> Buffer:
        index = ir.IndexType.get()
        attributes: dict[str, ir.Attribute] = {
            "layout": self._layout,
            "binding": ir.IntegerAttr.get(index, binding),
            "alignment": ir.IntegerAttr.get(index, 64),
            "operandSegmentSizes": ir.DenseI32ArrayAttr.get([1, 1]),
        }
        if binding < self._inputs and binding not in self._written:
            attributes["descriptor_flags"] = ir.Attribute.parse("1 : i32")
        result = ir.Type.parse(f"memref<?x{element}, #hal.descriptor_type<storage_buffer>>")
        zero = Scalar.constant(0, "index").value
        op = ir.Operation.create(
            "hal.interface.binding.subspan", results=[result], operands=[zero, size.value], attributes=attributes
        )
        return Buffer(op.result, dtype, width)

    def shared(self, elements: int) -> Buffer:
        """Memory of the workgroup, f32."""
        return self._alloc(elements, "f32", 1)

    def _alloc(self, size: int, element: str, width: int) -> Buffer:
        kind = ir.Type.parse(f"memref<{size}x{element}, #gpu.address_space<workgroup>>")
        attributes = {"operandSegmentSizes": ir.DenseI32ArrayAttr.get([0, 0])}
        return Buffer(ir.Operation.create("memref.alloc", results=[kind], attributes=attributes).result, "f32", width)

    def chunks(self, binding: int, size: Scalar) -> Buffer:
        """Buffer ``binding`` as ``size`` chunks of 16 bytes, whatever its element type; for moving, not computing."""
        return self._subspan(binding, size, "f32", 4, f"vector<{_CHUNK}xf32>")

    def shared_chunks(self, size: int) -> Buffer:
        """Memory of the workgroup, chunks of 16 bytes (as numbers: 4 f32)."""
        return self._alloc(size, f"vector<{_CHUNK}xf32>", _CHUNK)

    def thread(self) -> Scalar:
        """This thread's number in the workgroup."""
        attribute = {"dimension": ir.Attribute.parse("#gpu.dim<x>")}
        op = ir.Operation.create("gpu.thread_id", results=[ir.IndexType.get()], attributes=attribute)
        return Scalar(op.result)

    def tile(self) -> Scalar:
        """The tile that this workgroup computes."""
        return self._group_id(0)

    def item(self) -> Scalar:
        """The item that this workgroup computes; may be beyond the last one."""
        return self._group_id(1) + self._group_id(2) * MAX_GROUPS

    def first_item(self) -> Scalar:
        """The same where there are no more items than workgroups along y."""
        return self._group_id(1)

    def item_by(self, count: Scalar) -> tuple[Scalar, Scalar]:
        """The item divided by a count that is no constant, and the rest; in 32 bits, which GPUs divide better."""
        parts = self.item().to("i32").divide_unsigned(count.to("i32"))
        return parts[0].to("index", unsigned=True), parts[1].to("index", unsigned=True)

    def _group_id(self, dimension: int) -> Scalar:
        attribute = {"dimension": ir.IntegerAttr.get(ir.IndexType.get(), dimension)}
        op = ir.Operation.create("hal.interface.workgroup.id", results=[ir.IndexType.get()], attributes=attribute)
        return Scalar(op.result)

    def barrier(self) -> None:
        """Wait for the workgroup's threads and what they wrote to its memory."""
        ir.Operation.create("gpu.barrier")

    # ---- memory ----------------------------------------------------------------------------------------------------
    def load(self, buffer: Buffer, index: Scalar) -> ir.Value:
        """Load ``index`` of a buffer as stored; :meth:`widen` it where it is used, so that nothing waits before."""
        return memref.LoadOp(buffer.value, [index.value]).result

    def widen(self, buffer: Buffer, stored: ir.Value) -> ir.Value:
        """What was loaded from a buffer, in f32."""
        if buffer.dtype == "f32":
            return stored
        if buffer.dtype == "f16":
            return arith.ExtFOp(self.type(buffer.width), stored).result
        if buffer.width > 1:
            halves = [half for pair in self.elements(stored) for half in self._halves(pair)]
            return self.join([arith.BitcastOp(self.type(1), half).result for half in halves])
        bits = arith.ExtUIOp(self.type(1, "i32"), stored).result
        return arith.BitcastOp(self.type(1), arith.ShLIOp(bits, self.integers(16, 1)).result).result

    def _halves(self, pair: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The f32 bits of two bf16 numbers in one i32, the first in memory first."""
        low = arith.ShLIOp(pair, self.integers(16, 1)).result
        return low, arith.AndIOp(pair, self.integers(-(1 << 16), 1)).result

    def stored_zero(self, buffer: Buffer) -> ir.Value:
        """Zero as a buffer of width 1 stores it."""
        return Scalar.constant(0, _STORED[buffer.dtype]).value

    def store_as_is(self, stored: ir.Value, buffer: Buffer, index: Scalar) -> None:
        """Write what was loaded from a buffer of the same type."""
        memref.StoreOp(stored, buffer.value, [index.value])

    def store(self, value: ir.Value, buffer: Buffer, index: Scalar) -> None:
        """Write ``value``, rounded to the buffer's type."""
        if buffer.dtype == "f16":
            value = arith.TruncFOp(self.type(buffer.width, "f16"), value).result
        elif buffer.dtype == "bf16":
            value = arith.TruncIOp(self.type(buffer.width, "i16"), self.bf16_bits(value, buffer.width)).result
        memref.StoreOp(value, buffer.value, [index.value])

    def copy_chunk(self, source: Buffer, index: Scalar, target: Buffer, to: Scalar) -> None:
        """Begin to copy a chunk to the workgroup's memory past the registers (``cp.async``, CUDA from sm_80 on)."""
        memory, place = self._address(target, to), self._address(source, index)
        memory = arith.TruncIOp(ir.IntegerType.get_signless(32), memory).result
        assembly("cp.async.cg.shared.global [$0], [$1], 16;", "r,l,~{memory}", [memory, place])

    def end_copies(self) -> None:
        """The copies since the last call are a group."""
        assembly("cp.async.commit_group;", "~{memory}")

    def await_copies(self, under_way: int) -> None:
        """Wait until no more than so many groups of this thread's copies are under way."""
        assembly(f"cp.async.wait_group {under_way};", "~{memory}")

    def _address(self, buffer: Buffer, index: Scalar) -> ir.Value:
        """Of a chunk, i64."""
        start = ir.Operation.create(
            "memref.extract_aligned_pointer_as_index", results=[ir.IndexType.get()], operands=[buffer.value]
        ).result
        return (Scalar(start) + index * (4 * _CHUNK)).to("i64").value

    # ---- among threads ---------------------------------------------------------------------------------------------
    def shuffle_xor(self, value: ir.Value, offset: int) -> ir.Value:
        """The scalar ``value`` of the thread whose number in the subgroup differs by the bits ``offset``."""
        operands = [value, *(Scalar.constant(n, "i32").value for n in (offset, self.group.subgroup))]
        types = [value.type, ir.IntegerType.get_signless(1)]
        mode = {"mode": ir.Attribute.parse("#gpu<shuffle_mode<xor>>")}
        return ir.Operation.create("gpu.shuffle", results=types, operands=operands, attributes=mode).results[0]

    # ---- matrices of 16 x 16 that a subgroup holds: f16 factors, f32 sums -------------------------------------------
    def matrix_zero(self) -> ir.Value:
        """Sums of zero."""
        operands = [self.constant(0.0)]
        return ir.Operation.create(
            "gpu.subgroup_mma_constant_matrix", results=[self.matrix_type("COp")], operands=operands
        ).result

    def matrix_load(self, role: str, buffer: Buffer, start: Scalar, stride: int, transposed: bool = False) -> ir.Value:
        """A factor of f16 from a buffer of chunks; ``role`` is AOp (left) or BOp (right).

        Args:
            role: Which factor.
            buffer: Rows of f16 in chunks.
            start: The chunk of its first element.
            stride: From row to row, in the unit of the target (see ``Target.matrix_stride``).
            transposed: Whether the buffer has the factor's columns where it says rows.
        """
        attributes: dict[str, ir.Attribute] = {"leadDimension": ir.IntegerAttr.get(ir.IndexType.get(), stride)}
        if transposed:
            attributes["transpose"] = ir.Attribute.parse("unit")
        return ir.Operation.create(
            "gpu.subgroup_mma_load_matrix",
            results=[self.matrix_type(role)],
            operands=[buffer.value, start.value],
            attributes=attributes,
        ).result

    def matrix_multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """The sums ``a b + c``."""
        return ir.Operation.create(
            "gpu.subgroup_mma_compute", results=[self.matrix_type("COp")], operands=[a, b, c]
        ).result

    def matrix_load_sums(self, buffer: Buffer, start: Scalar, stride: int, transposed: bool = False) -> ir.Value:
        """Sums that lie in a buffer of chunks as :meth:`matrix_store` writes them, or column by column."""
        attributes: dict[str, ir.Attribute] = {"leadDimension": ir.IntegerAttr.get(ir.IndexType.get(), stride)}
        if transposed:
            attributes["transpose"] = ir.Attribute.parse("unit")
        operands = [buffer.value, start.value]
        return ir.Operation.create(
            "gpu.subgroup_mma_load_matrix", results=[self.matrix_type("COp")], operands=operands, attributes=attributes
        ).result

    def matrix_add_scaled(self, a: ir.Value, b: ir.Value, factor: float) -> ir.Value:
        """The sums ``a + factor b``."""
        operands, sums = [self.constant(factor)], self.matrix_type("COp")
        factors = ir.Operation.create("gpu.subgroup_mma_constant_matrix", results=[sums], operands=operands).result
        return self.matrix_add(a, self.matrix_multiply(b, factors))

    def matrix_add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The sums ``a + b``."""
        return self._matrix_elementwise("addf", a, b)

    def matrix_multiply(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The products of the elements of two matrices of sums."""
        return self._matrix_elementwise("mulf", a, b)

    def matrix_add_product(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """The sums and products of elements ``a + b c``; in two steps, as there is no operation for both."""
        return self.matrix_add(a, self.matrix_multiply(b, c))

    def _matrix_elementwise(self, name: str, a: ir.Value, b: ir.Value) -> ir.Value:
        operation = {"opType": ir.Attribute.parse(f"#gpu<mma_element_wise<{name}>>")}
        return ir.Operation.create(
            "gpu.subgroup_mma_elementwise", results=[self.matrix_type("COp")], operands=[a, b], attributes=operation
        ).result

    def matrix_store(self, sums: ir.Value, buffer: Buffer, start: Scalar, stride: int) -> None:
        """Write sums as f32 to a buffer of chunks (see :meth:`matrix_load`), or of f32, which are the unit then."""
        attributes = {"leadDimension": ir.IntegerAttr.get(ir.IndexType.get(), stride)}
        ir.Operation.create(
            "gpu.subgroup_mma_store_matrix", operands=[sums, buffer.value, start.value], attributes=attributes
        )

    def chunk_of_f16(self, values: Sequence[ir.Value]) -> ir.Value:
        """Eight f32 values, rounded to f16, as a chunk of 16 bytes."""
        pairs = [self.join(values[i : i + 2]) for i in range(0, len(values), 2)]
        return self.chunk_of_pairs([arith.TruncFOp(self.type(2, "f16"), pair).result for pair in pairs])

    def pair_of_f16(self, bits: Scalar) -> ir.Value:
        """The two f16 in an i32, the first one in the low half."""
        single = ir.Operation.create(
            "vector.broadcast", results=[ir.Type.parse("vector<1xi32>")], operands=[bits.value]
        ).result
        return ir.Operation.create("vector.bitcast", results=[self.type(2, "f16")], operands=[single]).result

    def chunk_of_pairs(self, pairs: Sequence[ir.Value]) -> ir.Value:
        """Four pairs of f16 as a chunk of 16 bytes."""
        single = ir.Type.parse("vector<1xf32>")
        words = [ir.Operation.create("vector.bitcast", results=[single], operands=[pair]).result for pair in pairs]
        return self.join([vector.ExtractOp(word, [], [0]).result for word in words])

    def matrix_type(self, role: str) -> ir.Type:
        """The type of a factor (AOp, BOp) or of sums (COp)."""
        return ir.Type.parse(f'!gpu.mma_matrix<16x16x{"f32" if role == "COp" else "f16"}, "{role}">')
