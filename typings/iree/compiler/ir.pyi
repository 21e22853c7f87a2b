from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, overload

class MLIRError(Exception): ...

class _Manager:
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

class Context(_Manager):
    def load_all_available_dialects(self) -> None: ...
    def attach_diagnostic_handler(self, handler: Callable[[Any], bool]) -> object: ...

class Location(_Manager):
    current: Location
    @staticmethod
    def unknown(context: Context | None = None) -> Location: ...
    @staticmethod
    def name(name: str, childLoc: Location | None = None, context: Context | None = None) -> Location: ...

class DiagnosticSeverity:
    ERROR: DiagnosticSeverity

class InsertionPoint(_Manager):
    current: InsertionPoint
    block: Block
    def __init__(self, beforeOperation: Block | Operation | OpView) -> None: ...
    def insert(self, operation: Operation | OpView) -> None: ...
    @staticmethod
    def at_block_begin(block: Block) -> InsertionPoint: ...
    @staticmethod
    def at_block_terminator(block: Block) -> InsertionPoint: ...

class Attribute:
    type: Type
    @staticmethod
    def parse(asm: str, context: Context | None = None) -> Attribute: ...

class NamedAttribute:
    name: str
    attr: Attribute

class StringAttr(Attribute):
    value: str
    def __init__(self, cast_from: Attribute) -> None: ...
    @staticmethod
    def get(value: str, context: Context | None = None) -> StringAttr: ...

class IntegerAttr(Attribute):
    value: int
    def __init__(self, cast_from: Attribute) -> None: ...
    @staticmethod
    def get(type: Type, value: int) -> IntegerAttr: ...

class FloatAttr(Attribute):
    value: float
    def __init__(self, cast_from: Attribute) -> None: ...
    @staticmethod
    def get(type: Type, value: float, loc: Location | None = None) -> FloatAttr: ...

class ArrayAttr(Attribute):
    def __init__(self, cast_from: Attribute) -> None: ...
    @staticmethod
    def get(attributes: Sequence[Attribute], context: Context | None = None) -> ArrayAttr: ...
    def __iter__(self) -> Iterator[Attribute]: ...
    def __getitem__(self, index: int) -> Attribute: ...
    def __len__(self) -> int: ...

class DictAttr(Attribute):
    def __init__(self, cast_from: Attribute) -> None: ...
    def __getitem__(self, index: int) -> NamedAttribute: ...
    def __len__(self) -> int: ...
    @staticmethod
    def get(value: Mapping[str, Attribute] = ..., context: Context | None = None) -> DictAttr: ...

class TypeAttr(Attribute):
    @staticmethod
    def get(value: Type, context: Context | None = None) -> TypeAttr: ...

class FlatSymbolRefAttr(Attribute):
    value: str
    def __init__(self, cast_from: Attribute) -> None: ...
    @staticmethod
    def get(value: str, context: Context | None = None) -> FlatSymbolRefAttr: ...
    def __init__(self, attribute: Attribute) -> None: ...
    @property
    def value(self) -> str: ...

class AffineMapAttr(Attribute):
    @staticmethod
    def get(affine_map: AffineMap) -> AffineMapAttr: ...

class DenseI32ArrayAttr(Attribute):
    @staticmethod
    def get(values: Sequence[int], context: Context | None = None) -> DenseI32ArrayAttr: ...

class DenseI64ArrayAttr(Attribute):
    def __init__(self, cast_from: Attribute) -> None: ...
    def __iter__(self) -> Iterator[int]: ...
    @staticmethod
    def get(values: Sequence[int], context: Context | None = None) -> DenseI64ArrayAttr: ...

class DenseElementsAttr(Attribute):
    @staticmethod
    def get(
        array: Any,
        signless: bool = True,
        type: Type | None = None,
        shape: Sequence[int] | None = None,
        context: Context | None = None,
    ) -> DenseElementsAttr: ...

class DenseResourceElementsAttr(Attribute):
    @staticmethod
    def get_from_buffer(
        array: Any,
        name: str,
        type: Type,
        alignment: int | None = None,
        is_mutable: bool = False,
        context: Context | None = None,
    ) -> DenseResourceElementsAttr: ...

class Type:
    def __init__(self, cast_from: Type) -> None: ...
    @staticmethod
    def parse(asm: str, context: Context | None = None) -> Type: ...

class IndexType(Type):
    @staticmethod
    def get(context: Context | None = None) -> IndexType: ...

class IntegerType(Type):
    @staticmethod
    def get_signless(width: int, context: Context | None = None) -> IntegerType: ...

class FunctionType(Type):
    @staticmethod
    def get(inputs: Sequence[Type], results: Sequence[Type], context: Context | None = None) -> FunctionType: ...

class ShapedType(Type):
    @staticmethod
    def get_dynamic_size() -> int: ...
    def __init__(self, cast_from: Type) -> None: ...
    def get_dim_size(self, dim: int) -> int: ...

class RankedTensorType(Type):
    rank: int
    shape: list[int]
    element_type: Type
    def __init__(self, cast_from: Type) -> None: ...
    @staticmethod
    def get(
        shape: Sequence[int], element_type: Type, encoding: Attribute | None = None, loc: Location | None = None
    ) -> RankedTensorType: ...
    has_static_shape: bool
    def is_dynamic_dim(self, dim: int) -> bool: ...
    def get_dim_size(self, dim: int) -> int: ...

class AffineExpr: ...

class AffineDimExpr(AffineExpr):
    @staticmethod
    def get(position: int, context: Context | None = None) -> AffineDimExpr: ...

class AffineConstantExpr(AffineExpr):
    @staticmethod
    def get(value: int, context: Context | None = None) -> AffineConstantExpr: ...

class AffineMap:
    @staticmethod
    def get(
        dim_count: int, symbol_count: int, exprs: Sequence[AffineExpr], context: Context | None = None
    ) -> AffineMap: ...

class OpOperand:
    owner: Operation
    operand_number: int

class Value:
    type: Type
    uses: Iterator[OpOperand]
    owner: Operation | Block

class BlockArgument(Value):
    arg_number: int
    def __init__(self, value: Value) -> None: ...

class _Attributes:
    @overload
    def __getitem__(self, name: str) -> Attribute: ...
    @overload
    def __getitem__(self, name: int) -> NamedAttribute: ...
    def __setitem__(self, name: str, attribute: Attribute) -> None: ...
    def __delitem__(self, name: str) -> None: ...
    def __contains__(self, name: str) -> bool: ...
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[str]: ...

class WalkResult:
    ADVANCE: WalkResult

class _Operations(Sequence[OpView]): ...

class _Operands(Sequence[Value]):
    def __setitem__(self, index: int, value: Value) -> None: ...

class Block:
    arguments: Sequence[Value]
    operations: _Operations
    owner: OpView
    @staticmethod
    def create_at_start(
        parent: Region, arg_types: Sequence[Type] = ..., arg_locs: Sequence[Location] | None = None
    ) -> Block: ...

class Region:
    blocks: Sequence[Block]

class OpView:
    operation: Operation
    name: str
    attributes: _Attributes
    regions: Sequence[Region]
    results: Sequence[Value]
    result: Value
    context: Context
    def verify(self) -> bool: ...

class Operation:
    name: str
    attributes: _Attributes
    operands: _Operands
    operation: Operation
    results: Sequence[Value]
    result: Value
    regions: Sequence[Region]
    location: Location
    context: Context
    parent: Operation | None
    def move_before(self, other: Operation) -> None: ...
    def walk(self, callback: Callable[[Operation], WalkResult]) -> None: ...
    @staticmethod
    def create(
        name: str,
        results: Sequence[Type] | None = None,
        operands: Sequence[Value] | None = None,
        attributes: Mapping[str, Attribute] | None = None,
        successors: Sequence[Block] | None = None,
        regions: int = 0,
        loc: Location | None = None,
        ip: InsertionPoint | None = None,
        infer_type: bool = False,
    ) -> Operation: ...
    @staticmethod
    def parse(source: str, *, source_name: str = "", context: Context | None = None) -> OpView: ...
    def get_asm(
        self,
        *,
        large_elements_limit: int | None = None,
        large_resource_limit: int | None = None,
        enable_debug_info: bool = False,
        assume_verified: bool = False,
    ) -> str: ...
    def verify(self) -> bool: ...
    def erase(self) -> None: ...
    def clone(self, ip: InsertionPoint | None = None) -> Operation: ...

class Module:
    body: Block
    operation: Operation
    context: Context
    @staticmethod
    def create(loc: Location | None = None) -> Module: ...
    @staticmethod
    def parse(asm: str | bytes, context: Context | None = None) -> Module: ...

class SymbolTable:
    def __init__(self, operation: Operation | OpView) -> None: ...
    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> OpView: ...
