import onnx

from ..dialects.func import FuncOp
from ..ir import Block, Context, Operation, Type, Value

class ContextCache:
    def __init__(self, context: Context) -> None: ...
    def type_proto_to_type(self, tp: onnx.TypeProto) -> Type: ...
    def tensor_proto_to_type(self, tp: onnx.TensorProto) -> Type: ...

class ModuleCache:
    def __init__(self, module_op: Operation, context_cache: ContextCache) -> None: ...

class ModelInfo:
    def __init__(self, model_proto: onnx.ModelProto) -> None: ...

class GraphInfo:
    def __init__(self, model_info: ModelInfo, graph_proto: onnx.GraphProto) -> None: ...

class NodeImporter:
    _b: Block
    _cc: ContextCache
    _nv_map: dict[str, Value]
    def __init__(
        self,
        graph_info: GraphInfo,
        *,
        parent_op: FuncOp,
        block: Block,
        context_cache: ContextCache,
        module_op: Operation,
        module_cache: ModuleCache,
    ) -> None: ...
    def _populate_graph_attrs(self, container_op: FuncOp) -> None: ...
    def import_initializer(self, initializer: onnx.TensorProto, extern_name: str | None = None) -> Value: ...
    def import_node(self, node: onnx.NodeProto) -> None: ...
    def get_none(self) -> Value: ...
