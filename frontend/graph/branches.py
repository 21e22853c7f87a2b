"""If: both branches become part of the graph, and one of them goes as soon as sizes tell the condition.

    y = If(condition) { then: f(x), else: g(x) }   ->   y = Choose(condition, f(x), g(x))      once, for the model
    Choose(true, a, b)                             ->   Identity(a)                            for each entry point

So no pass has to look into subgraphs, and each entry point has the branch that its number of tokens chooses. A
condition that more than sizes decide is refused by name, as all other control flow is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from linattn.dialect_patterns.choose import CHOOSE
from linattn.dialect_patterns.op import INTERNAL
from linattn.runtime.errors import UnsupportedModelError
from onnx import numpy_helper

from .drop_unused import drop_unused
from .internal import import_internal
from .names import Names
from .schema import domain_of

_HINT = "export the model without control flow, or with conditions of sizes, and compile with sizes that are known"


def flatten_branches(proto: onnx.ModelProto) -> set[str]:
    """Replace each If, in place, those in branches too.

    Returns:
        The names of the nodes that choose.

    Raises:
        UnsupportedModelError: if an If is not one that ONNX allows, or a branch brings weights in a file.
    """
    flattening = _Flattening(proto.graph)
    if any(_is_if(node) for node in proto.graph.node):
        nodes = flattening.flat(proto.graph, {}, "")
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        import_internal(proto)
    return flattening.choices


def choose_branches(graph: onnx.GraphProto) -> bool:
    """Replace what chooses by a constant condition, in place, and drop the other branch; whether anything was."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    chosen = False
    for node in graph.node:
        if _chooses(node) and node.input[0] in constants:
            taken = bool(np.all(numpy_helper.to_array(constants[node.input[0]])))
            value = node.input[1 if taken else 2]
            node.op_type, node.domain = "Identity", ""
            del node.input[:]
            node.input.append(value)
            chosen = True
    if chosen:
        drop_unused(graph)
    return chosen


def refuse_open_branches(graph: onnx.GraphProto) -> None:
    """Name the first If that is left.

    Raises:
        UnsupportedModelError: if there is one.
    """
    for node in graph.node:
        if _chooses(node):
            raise UnsupportedModelError(
                "its condition depends on more than the sizes that are compiled", where=f"node '{node.name}' (If)",
                got=f"'{node.input[0]}'", hint=_HINT,
            )  # fmt: skip


def _is_if(node: onnx.NodeProto) -> bool:
    return node.op_type == "If" and domain_of(node) == ""


def _chooses(node: onnx.NodeProto) -> bool:
    return node.op_type == CHOOSE and domain_of(node) == INTERNAL


def _inner_names(graph: onnx.GraphProto) -> Iterator[str]:
    """What the bodies of a graph's nodes define."""
    for node in graph.node:
        for body in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            yield from (name for inner in body.node for name in inner.output if name)
            yield from _inner_names(body)


def _rename(body: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give the values that a body reads from around it, in place, the names that they have now."""
    own = {v.name for v in body.input} | {t.name for t in body.initializer}
    own |= {name for node in body.node for name in node.output}
    outer = {old: new for old, new in names.items() if old not in own}
    for node in body.node if outer else ():
        for i, name in enumerate(node.input):
            node.input[i] = outer.get(name, name)
        for attribute in node.attribute:
            _rename(attribute.g, outer)
    for value in body.output:
        value.name = outer.get(value.name, value.name)


class _Flattening:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph, self._names = graph, Names(graph)
        for inner in _inner_names(graph):  # none of ours may hide behind them
            self._names.new(inner)
        self._nodes = {node.name for node in graph.node if not _is_if(node)}
        self._results: list[str] = []
        self.choices: set[str] = set()

    def flat(self, graph: onnx.GraphProto, scope: Mapping[str, str], prefix: str) -> list[onnx.NodeProto]:
        """The nodes of a graph and of the branches in it, by names that hold everywhere.

        Args:
            graph: The graph.
            scope: Name in the graph -> name everywhere, where they differ; completed by what the graph defines.
            prefix: Before the names of its nodes; empty for the model's own.
        """
        known, nodes = dict(scope), list[onnx.NodeProto]()
        if prefix:
            self._take_weights(graph, known, prefix)
        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            del copy.input[:], copy.output[:]
            copy.input.extend(known.get(name, name) for name in node.input)
            for attribute in () if _is_if(node) else copy.attribute:
                _rename(attribute.g, known)
            if prefix:
                known |= {name: self._names.new(f"{prefix}{name}") for name in node.output if name}
                name = f"{prefix}{node.name or node.op_type}"
                copy.name = name if _is_if(node) else self._node_name(name)  # what chooses has its name
            copy.output.extend(known.get(name, name) for name in node.output)
            nodes += self._both(copy, known) if _is_if(node) else [copy]
        if prefix:
            self._results = [known.get(value.name, value.name) for value in graph.output]
        return nodes

    def _both(self, node: onnx.NodeProto, scope: Mapping[str, str]) -> list[onnx.NodeProto]:
        where, branches = f"node '{node.name}' (If)", {a.name: a.g for a in node.attribute if a.HasField("g")}
        nodes, values = list[onnx.NodeProto](), list[list[str]]()
        for what in ("then_branch", "else_branch"):
            branch = branches.get(what)
            if branch is None or branch.input or len(branch.output) != len(node.output) or len(node.input) != 1:
                raise UnsupportedModelError(f"its {what} is not one that ONNX allows", where=where, hint=_HINT)
            nodes += self.flat(branch, scope, f"{node.name}.{what.removesuffix('_branch')}.")
            values.append(self._results)
        for name, then, other in zip(node.output, *values, strict=True):
            if not name:
                continue
            choice = self._node_name(node.name)
            self.choices.add(choice)
            nodes.append(onnx.helper.make_node(CHOOSE, [node.input[0], then, other], [name], choice, domain=INTERNAL))
        return nodes

    def _take_weights(self, branch: onnx.GraphProto, known: dict[str, str], prefix: str) -> None:
        """Make a branch's initializers the graph's."""
        for tensor in branch.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                message = "its values lie in a file, which only those of weights outside of branches may"
                raise UnsupportedModelError(message, where=f"initializer '{tensor.name}'", hint=_HINT)
            added = self._graph.initializer.add()
            added.CopyFrom(tensor)
            added.name = known[tensor.name] = self._names.new(f"{prefix}{tensor.name}")

    def _node_name(self, name: str) -> str:
        while name in self._nodes:
            name += "_"
        self._nodes.add(name)
        return name
