from ..ir import Attribute, OpView, Type, Value

class CmpFPredicate:
    OEQ: CmpFPredicate
    OLT: CmpFPredicate
    OLE: CmpFPredicate
    OGT: CmpFPredicate
    OGE: CmpFPredicate
    UNO: CmpFPredicate

class CmpIPredicate:
    eq: CmpIPredicate
    slt: CmpIPredicate
    sle: CmpIPredicate
    sgt: CmpIPredicate
    ugt: CmpIPredicate
    sge: CmpIPredicate

class ConstantOp(OpView):
    def __init__(self, result: Type, value: Attribute) -> None: ...

class NegFOp(OpView):
    def __init__(self, operand: Value) -> None: ...

class SelectOp(OpView):
    def __init__(self, condition: Value, true_value: Value, false_value: Value) -> None: ...

class CmpFOp(OpView):
    def __init__(self, predicate: CmpFPredicate, lhs: Value, rhs: Value) -> None: ...

class CmpIOp(OpView):
    def __init__(self, predicate: CmpIPredicate, lhs: Value, rhs: Value) -> None: ...

class AddFOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class AddIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class SubFOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class SubIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class MulFOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class MulIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class DivFOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class DivSIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class DivUIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class RemSIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class AndIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class OrIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class XOrIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class ShRUIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class MaximumFOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class MaxSIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class MaxUIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class MinimumFOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class MinSIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class MinUIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class UIToFPOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class SIToFPOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class TruncIOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class TruncFOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class IndexCastOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class IndexCastUIOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class FPToSIOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class ExtUIOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class ExtSIOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class ExtFOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class BitcastOp(OpView):
    def __init__(self, out: Type, in_: Value) -> None: ...

class RemUIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...

class ShLIOp(OpView):
    def __init__(self, lhs: Value, rhs: Value) -> None: ...
