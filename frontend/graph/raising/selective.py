"""Whether a step is Mamba-1's, and what plays its parts.

A step is proven to be, with S the state before and N after it,

    N[b,d,n] = exp(step[b,d] * rate[d,n]) S[b,d,n] + value[b,d] key[b,n]
    o[b,d]   = sum_n query[b,n] N[b,d,n] + rest[b,d]

where each part may be a product of several inputs, and the rest a sum of such products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .algebra import Factor, Index, NotProvenError, Tensor, Term, substitute
from .products import ProductAlgebra
from .recurrence import NEXT, STATE


@dataclass(frozen=True)
class Part:
    """A number times a product of inputs."""

    number: float
    factors: tuple[Factor, ...]


@dataclass(frozen=True)
class Selective:
    """A step of Mamba-1.

    Attributes:
        batch: Index of the batch.
        channel: Index of the channels.
        element: Index of the elements of a channel's state.
        order: Places of batch, channel and element among the state's axes.
        parts: ``value``, ``step``, ``rate``, ``key`` and ``query``.
        rest: What the output is besides what it reads of the state.
        output: Index of each of the output's axes.
    """

    batch: Index
    channel: Index
    element: Index
    order: tuple[int, int, int]
    parts: dict[str, Part]
    rest: tuple[Part, ...]
    output: tuple[Index, ...]


def match_selective(algebra: ProductAlgebra, update: Tensor, output: Tensor) -> Selective:
    """Prove that a step is Mamba-1's.

    Args:
        algebra: Of both.
        update: The state after the step, of the inputs and of ``STATE``.
        output: The output, of the inputs and of ``NEXT``.

    Raises:
        NotProvenError: with what is different.
    """
    if len(update.axes) != 3:
        raise NotProvenError(f"carries a state of {len(update.axes)} axes instead of [B, D, N]")
    if update.rounded or output.rounded:
        raise NotProvenError("rounds the state or the output to a smaller type in every step")
    read, rest = _read_term(output)
    (state,) = (f for f in read.factors if f.name == NEXT)
    if len(read.bound) != 1 or (read.bound[0],) not in state.index or len(state.index) != 3:
        raise NotProvenError("computes an output that is no sum over the last axis of [B, D, N]")
    place = state.index.index((read.bound[0],))
    others = [i for i in range(3) if i != place]
    batch, channel, element = update.axes[others[0]], update.axes[others[1]], update.axes[place]
    if len(channel) != 1 or len(element) != 1:
        raise NotProvenError("has channels or states of size 1")
    parts = _match_update(algebra, update, channel, element)
    names = {
        old[0]: new
        for old, new in zip((state.index[i] for i in (*others, place)), (batch, channel, element), strict=True)
        if old
    }

    def renamed(factors: Sequence[Factor]) -> tuple[Factor, ...]:
        term = algebra.rename(Tensor((), (Term(1.0, tuple(factors)),)), names).terms[0]
        return term.factors

    query = renamed([f for f in read.factors if f.name != NEXT])
    if any(set(channel) & f.variables for f in query):
        raise NotProvenError("reads the state with a query for each channel")
    parts["query"] = Part(read.number, query)
    return Selective(
        batch, channel, element, (others[0], others[1], place), parts,
        tuple(Part(term.number, renamed(term.factors)) for term in rest),
        tuple(substitute(axis, names) for axis in output.axes),
    )  # fmt: skip


def _read_term(output: Tensor) -> tuple[Term, list[Term]]:
    """The term of the output that reads the state, and the others."""
    reads = [term for term in output.terms if any(f.name in (NEXT, STATE) for f in term.factors)]
    if len(reads) != 1 or [f.name for f in reads[0].factors if f.name in (NEXT, STATE)] != [NEXT]:
        raise NotProvenError("computes an output that is not one query times the state after the step")
    rest = [term for term in output.terms if term is not reads[0]]
    if any(term.bound for term in rest):
        raise NotProvenError("adds a sum to its output")
    return reads[0], rest


def _match_update(algebra: ProductAlgebra, update: Tensor, channel: Index, element: Index) -> dict[str, Part]:
    kept = [term for term in update.terms if any(f.name == STATE for f in term.factors)]
    written = [term for term in update.terms if term not in kept]
    if len(kept) != 1 or len(written) != 1 or any(term.bound for term in update.terms):
        raise NotProvenError("updates the state by another sum than one of a product with it and one without")
    states = [f for f in kept[0].factors if f.name == STATE]
    decays = [f for f in kept[0].factors if f.name != STATE]
    if len(states) != 1 or states[0].index != update.axes or kept[0].number != 1.0:
        raise NotProvenError("mixes or scales the state from step to step")
    if len(decays) != 1 or not decays[0].is_exp:
        raise NotProvenError("has no decay that is the exponential of a product")
    return match_decay(algebra.exponent(decays[0]), channel, element) | _split(
        written[0], channel, element, ("value", "key"), "writes what is no value of a channel times a key"
    )


def match_decay(exponent: Term, channel: Index, element: Index) -> dict[str, Part]:
    """Step and rate of a decay, whose logarithm is their product."""
    why = "has a decay that is no step of a channel times its rates"
    with_element = [f for f in exponent.factors if set(element) & f.variables]
    others = [f for f in exponent.factors if not set(element) & f.variables]
    allowed = {*channel, *element}
    if not with_element or not others or any(f.is_exp or f.variables - allowed for f in with_element):
        raise NotProvenError(why)
    return {"step": Part(1.0, tuple(others)), "rate": Part(exponent.number, tuple(with_element))}


def _split(term: Term, channel: Index, element: Index, names: tuple[str, str], why: str) -> dict[str, Part]:
    """A product of channels and of elements, without factors that have both."""
    of_element = [f for f in term.factors if set(element) & f.variables]
    others = [f for f in term.factors if not set(element) & f.variables]
    if not of_element or not others or any(set(channel) & f.variables for f in of_element):
        raise NotProvenError(why)
    return {names[0]: Part(term.number, tuple(others)), names[1]: Part(1.0, tuple(of_element))}
