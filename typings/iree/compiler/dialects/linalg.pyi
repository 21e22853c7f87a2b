from collections.abc import Sequence

from ..ir import Attribute, OpView, Type, Value

class GenericOp(OpView):
    def __init__(
        self,
        result_tensors: Sequence[Type],
        inputs: Sequence[Value],
        outputs: Sequence[Value],
        indexing_maps: Attribute,
        iterator_types: Attribute,
    ) -> None: ...

class YieldOp(OpView):
    def __init__(self, values: Sequence[Value]) -> None: ...

class IndexOp(OpView):
    def __init__(self, dim: int) -> None: ...

def fill(value: Value, *, outs: Sequence[Value]) -> Value: ...
