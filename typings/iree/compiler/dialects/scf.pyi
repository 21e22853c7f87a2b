from collections.abc import Sequence

from ..ir import Block, OpView, Type, Value

class ForOp(OpView):
    body: Block
    induction_variable: Value
    inner_iter_args: Sequence[Value]
    def __init__(
        self, lower_bound: Value, upper_bound: Value, step: Value, iter_args: Sequence[Value] | None = None
    ) -> None: ...

class YieldOp(OpView):
    def __init__(self, results: Sequence[Value]) -> None: ...

class IfOp(OpView):
    def __init__(self, condition: Value, results: Sequence[Type] | None = None, *, has_else: bool = False) -> None: ...
    @property
    def then_block(self) -> Block: ...
    @property
    def else_block(self) -> Block: ...
