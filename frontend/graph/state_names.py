"""States that the graph does not prove: paired by name with equal types, by the user, or refused.

An input that looks like a state and is none would be the caller's to fill; a session would not carry it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from linattn.runtime.errors import UnsupportedModelError

# What exporters put before or behind the rest of a name.
_PAST = re.compile(r"past_key_values|past_states|past|_in\b|\bin_")
_PRESENT = re.compile(r"present_key_values|present_states|present|_out\b|\bout_")
_LOOKS = re.compile(r"(?:^|[._/])(?:past|cache|state|kv_cache|conv_state|ssm_state|recurrent_state)(?:s?[._/\d]|s?$|_)")
_ORDINARY = frozenset({"input_ids", "inputs_embeds", "attention_mask", "position_ids"})


@dataclass(frozen=True)
class Pairing:
    """What the user said of states.

    Attributes:
        pairs: Past -> present, from ``--state PAST=PRESENT``.
        ordinary: Inputs that are no states, from ``--no-state NAME``.
    """

    pairs: Mapping[str, str] = field(default_factory=dict[str, str])
    ordinary: frozenset[str] = frozenset()

    def is_set(self, past: str) -> bool:
        """Whether the user decided about this input."""
        return past in self.pairs or past in self.ordinary


def dims_of(graph: onnx.GraphProto, name: str) -> list[int | str | None]:
    """The declared dims of a graph input or output: sizes, symbols, None where neither is given."""
    value = next(v for v in (*graph.input, *graph.output) if v.name == name)
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims]


def same_sizes(one: Sequence[int | str | None], other: Sequence[int | str | None]) -> bool:
    """Whether two shapes may be the same: of one rank, and sizes that both know agree."""
    return len(one) == len(other) and all(
        a == b for a, b in zip(one, other, strict=True) if isinstance(a, int) and isinstance(b, int)
    )


def add_named_pairs(
    graph: onnx.GraphProto, known: Mapping[str, str], pairing: Pairing, types: Mapping[str, onnx.TypeProto]
) -> Iterator[tuple[str, str, str]]:
    """The pairs that the graph did not prove.

    Args:
        graph: The graph.
        known: Past -> present of the pairs that it did.
        pairing: What the user said.
        types: Inferred types of the outputs.

    Yields:
        Past, present, and ``name`` or ``--state``.

    Raises:
        UnsupportedModelError: if the user's names are not there or do not fit, or an input looks like a state and has
            no partner.
    """
    initializers = {t.name for t in graph.initializer}
    inputs = [v.name for v in graph.input if v.name not in initializers]
    outputs = [v.name for v in graph.output]
    for option, name in [
        *(("--state", past) for past in pairing.pairs),
        *(("--no-state", name) for name in sorted(pairing.ordinary)),
    ]:
        if name not in inputs:
            raise UnsupportedModelError("no such input", where=option, got=repr(name), expected=", ".join(inputs))
    taken = set(known.values())
    for past, present in pairing.pairs.items():
        if present not in outputs or present in taken:
            free = [name for name in outputs if name not in taken]
            raise UnsupportedModelError("no such output", where="--state", got=repr(present), expected=", ".join(free))
        _check_types(graph, past, present, types)
        taken.add(present)
        yield past, present, "--state"
    for past in inputs:
        if past in known or pairing.is_set(past) or past in _ORDINARY:
            continue
        partner = next(
            (name for name in outputs if name not in taken and _rest(past, _PAST) == _rest(name, _PRESENT)), None
        )
        if partner is not None and _PAST.search(past) and _PRESENT.search(partner):
            _check_types(graph, past, partner, types)
            taken.add(partner)
            yield past, partner, "name"
        elif _looks_like_a_state(graph, past, [name for name in outputs if name not in taken]):
            raise UnsupportedModelError(
                "the input looks like a state, but no output is its next value",
                where=f"input '{past}'",
                hint=f"name it with --state {past}=OUTPUT, or take it as an ordinary input with --no-state {past}",
            )


def _rest(name: str, word: re.Pattern[str]) -> str:
    """A name without the word that says which side it is on."""
    return word.sub("", name, count=1)


def _check_types(graph: onnx.GraphProto, past: str, present: str, types: Mapping[str, onnx.TypeProto]) -> None:
    """Refuse a pair whose element types or fixed sizes differ."""
    values = {v.name: v.type for v in (*graph.input, *graph.output)}
    inferred = types.get(present)
    before, after = values[past].tensor_type.elem_type, values[present].tensor_type.elem_type
    one, other = dims_of(graph, past), dims_of(graph, present)
    if inferred is not None and inferred.tensor_type.HasField("shape"):
        dims = inferred.tensor_type.shape.dim
        other = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in dims]
    if before != after or not same_sizes(one, other):
        name = onnx.TensorProto.DataType.Name
        raise UnsupportedModelError(
            f"the output '{present}' cannot be the next value of the state",
            where=f"input '{past}'",
            got=f"{name(after).lower()} {other}",
            expected=f"{name(before).lower()} {one}",
            hint=f"name another output with --state {past}=OUTPUT, or take it as an ordinary input with "
            f"--no-state {past}",
        )


def _looks_like_a_state(graph: onnx.GraphProto, past: str, outputs: list[str]) -> bool:
    """By its name, or by an output that nothing else explains, of the same shape and the same first word."""
    if _LOOKS.search(past):
        return True
    prefix = re.split(r"[._/]", past)[0]
    dims = dims_of(graph, past)
    return len(dims) > 1 and any(re.split(r"[._/]", o)[0] == prefix and dims_of(graph, o) == dims for o in outputs)
