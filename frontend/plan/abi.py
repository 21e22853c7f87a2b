"""How each function of a module is called without our runtime: arguments and results in order, for ``--report``.

Types are written as IREE's tools write them: ``1x8xi64``, ``i64`` for a number, ``?`` for an open size.
"""

from __future__ import annotations

from collections.abc import Mapping

from linattn.runtime.manifest import InputSpec, StateSpec

from ..graph.next_token import DRAW_INPUT
from ..graph.schema import spec_of_type
from ..graph.specialize import SpecializedGraph
from ..lower.importer import Signature
from .entry_points import ModulePlan

Value = dict[str, str]


def describe_abi(
    plan: ModulePlan, signatures: Mapping[str, Signature], functions: Mapping[str, SpecializedGraph]
) -> dict[str, dict[str, list[Value]]]:
    """Function -> its ``arguments`` and ``results``, each value with its ``name``, ``type`` and ``role``.

    Roles of arguments are those of the manifest's inputs, ``state`` (empty: zeros), ``position`` (tokens committed),
    ``draw`` (how tokens are drawn), ``memory`` of a result and ``workspace``; of results ``output`` and ``state``, in
    the order of the states.

    Args:
        plan: Inputs, outputs and states.
        signatures: Function -> what it takes and gives.
        functions: Function -> its graph.
    """
    return {symbol: _describe(plan, signatures[symbol], graph) for symbol, graph in functions.items()}


def _describe(plan: ModulePlan, signature: Signature, graph: SpecializedGraph) -> dict[str, list[Value]]:
    def value(name: str, role: str) -> Value:
        return {"name": name, "type": _type_text(graph, name), "role": role}

    specs: list[InputSpec | StateSpec] = [s for s in (*plan.inputs, *plan.states) if s.name in signature.arguments]
    arguments = [value(spec.name, spec.role if isinstance(spec, InputSpec) else "state") for spec in specs]
    arguments += [value(name, "draw") for name in signature.arguments if name == DRAW_INPUT]
    if signature.takes_position:
        arguments.append({"name": "position", "type": "i64", "role": "position"})
    given = [name for name in signature.results if signature.takes_results and name not in signature.tied]
    arguments += [value(name, "memory") for name in given]
    if signature.takes_results:
        arguments.append({"name": "workspace", "type": "?xi8", "role": "workspace"})
    states = {state.output for state in plan.states}
    results = [value(n, "state" if n in states else "output") for n in signature.results if n not in given]
    return {"arguments": arguments, "results": results}


def _type_text(graph: SpecializedGraph, name: str) -> str:
    spec = spec_of_type(graph.types[name])
    assert spec is not None, f"'{name}' has no type"
    return "x".join([*("?" if size is None else str(size) for size in spec.shape), spec.dtype])
