from collections.abc import Sequence

from ..ir import Block, FunctionType, InsertionPoint, OpView, Value

class FuncOp(OpView):
    def __init__(
        self, name: str, type: FunctionType, *, visibility: str | None = None, ip: InsertionPoint | None = None
    ) -> None: ...
    def add_entry_block(self) -> Block: ...

class ReturnOp(OpView):
    def __init__(self, operands: Sequence[Value]) -> None: ...
