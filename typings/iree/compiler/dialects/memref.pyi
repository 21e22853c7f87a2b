from collections.abc import Sequence

from ..ir import OpView, Value

class LoadOp(OpView):
    def __init__(self, memref: Value, indices: Sequence[Value]) -> None: ...

class StoreOp(OpView):
    def __init__(self, value: Value, memref: Value, indices: Sequence[Value]) -> None: ...
