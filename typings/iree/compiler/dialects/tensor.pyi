from collections.abc import Sequence

from ..ir import OpView, Type, Value

class EmptyOp(OpView):
    def __init__(self, sizes: Sequence[int | Value], element_type: Type) -> None: ...

class DimOp(OpView):
    def __init__(self, source: Value, index: Value) -> None: ...

class CastOp(OpView):
    def __init__(self, dest: Type, source: Value) -> None: ...

class ExtractOp(OpView):
    def __init__(self, tensor: Value, indices: Sequence[Value]) -> None: ...

class ExpandShapeOp(OpView):
    def __init__(
        self,
        result: Type,
        src: Value,
        reassociation: Sequence[Sequence[int]],
        output_shape: Sequence[Value],
        static_output_shape: Sequence[int],
    ) -> None: ...

class CollapseShapeOp(OpView):
    def __init__(self, result: Type, src: Value, reassociation: Sequence[Sequence[int]]) -> None: ...

class ExtractSliceOp(OpView):
    def __init__(
        self,
        result: Type,
        source: Value,
        offsets: Sequence[Value],
        sizes: Sequence[Value],
        strides: Sequence[Value],
        static_offsets: Sequence[int],
        static_sizes: Sequence[int],
        static_strides: Sequence[int],
    ) -> None: ...

class InsertSliceOp(OpView):
    def __init__(
        self,
        source: Value,
        dest: Value,
        offsets: Sequence[Value],
        sizes: Sequence[Value],
        strides: Sequence[Value],
        static_offsets: Sequence[int],
        static_sizes: Sequence[int],
        static_strides: Sequence[int],
    ) -> None: ...
