"""Which linear recurrence a step computes: the rule, and what plays the query, the key, the value, the decay and beta.

A step is proven to be, with S the state before and N after it, and every product as LinearAttention has it:

    N[b,h,i,j] = e[b,h(,i)] S[b,h,i,j] + k[b,h,i] beta[b,h] (v[b,h,j] - sum_n k[b,h,n] e[b,h(,n)] S[b,h,n,j])
    o[b,hq,j]  = scale * sum_i q[b,hq,i] N[b,h,i,j],  hq = (h, g)

with e = exp(decay) or 1, and without the last sum and beta in the rules ``linear`` and ``gated``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .algebra import Factor, Index, NotProvenError, Tensor, Term, substitute

STATE = "state before the step"
NEXT = "state after the step"
"""How the state is named in tensors, before the step and after it."""


@dataclass(frozen=True)
class Roles:
    """Where the state's axes are.

    Attributes:
        batch: Place of the batch among the state's axes.
        heads: Of the heads.
        key: Of the axis that keys and queries have.
        value: Of the axis that values and outputs have.
    """

    batch: int
    heads: int
    key: int
    value: int

    @property
    def order(self) -> tuple[int, int, int, int]:
        """Places in the operator's order."""
        return self.batch, self.heads, self.key, self.value


@dataclass(frozen=True)
class Operand:
    """An input of the step.

    Attributes:
        name: Which.
        index: Index of each of its axes, of the variables of ``Recurrence``.
        is_exp: Whether the input is the exponential of the operand, instead of the operand.
    """

    name: str
    index: tuple[Index, ...]
    is_exp: bool = False


@dataclass(frozen=True)
class Recurrence:
    """A step of LinearAttention.

    Attributes:
        rule: ``linear``, ``gated``, ``delta`` or ``gated_delta``.
        roles: Where the state's axes are.
        batch: Index of the batch.
        heads: Index of the state's heads.
        group: Index of the query heads that read one head of the state.
        key: Index of keys.
        value: Index of values.
        operands: ``query``, ``key``, ``value``, and ``decay`` and ``beta`` where the rule has them.
        scale: Factor of the output.
        output: Index of each of the output's axes.
    """

    rule: str
    roles: Roles
    batch: Index
    heads: Index
    group: Index
    key: Index
    value: Index
    operands: dict[str, Operand]
    scale: float
    output: tuple[Index, ...]


def match_recurrence(update: Tensor, output: Tensor) -> Recurrence:
    """Prove that a step is one of LinearAttention.

    Args:
        update: The state after the step, of the inputs and of ``STATE``.
        output: The output, of the inputs and of ``NEXT``.

    Raises:
        NotProvenError: with what is different.
    """
    if len(update.axes) != 4:
        raise NotProvenError(f"carries a state of {len(update.axes)} axes instead of [B, H, dk, dv]")
    if update.rounded:
        raise NotProvenError("rounds the state to a smaller type in every step")
    roles, query, scale, read = _match_output(output)
    batch, heads = update.axes[roles.batch], update.axes[roles.heads]
    key, value = update.axes[roles.key], update.axes[roles.value]
    operands, rule = _match_update(update, batch, heads, key, value)
    # The output's variables become those of the update, but for the query heads of a group.
    names = dict(zip((*read[:4],), (batch, heads, key, value), strict=True))
    renames = {old[0]: new for old, new in names.items() if old}
    index = tuple(substitute(i, renames) for i in query.index)
    axes = tuple(substitute(i, renames) for i in output.axes)
    return Recurrence(
        rule, roles, batch, heads, read[4], key, value, operands | {"query": Operand(query.name, index)}, scale, axes
    )


def _match_output(output: Tensor) -> tuple[Roles, Factor, float, tuple[Index, Index, Index, Index, Index]]:
    """Roles, query, scale, and the indices of batch, heads, key, value and group in the output."""
    names = {factor.name for term in output.terms for factor in term.factors}
    if STATE in names:
        raise NotProvenError("computes an output from the state before the update")
    if NEXT not in names:
        raise NotProvenError("computes an output without the state")
    if len(output.terms) != 1:
        raise NotProvenError("computes an output that is a sum of several products")
    (term,) = output.terms
    states = [f for f in term.factors if f.name == NEXT]
    others = [f for f in term.factors if f.name != NEXT]
    if len(states) != 1 or len(others) != 1 or others[0].is_exp:
        raise NotProvenError("computes an output that is not one query times the state")
    (state,), (query,) = states, others
    if len(term.bound) != 1:
        raise NotProvenError("computes an output that does not sum over the keys alone (or their size is 1)")
    key = (term.bound[0],)
    if key not in state.index or key not in query.index:
        raise NotProvenError("computes an output that does not sum over the keys of query and state")
    key_place = state.index.index(key)
    value_places = [i for i, index in enumerate(state.index) if i > 1 and index and not set(index) & query.variables]
    if key_place < 2 or len(value_places) != 1:
        raise NotProvenError("computes an output over other axes than [B, H, dk, dv] (or the values' size is 1)")
    value = state.index[value_places[0]]
    batch, heads = state.index[:2]
    if any(len(index) > 1 for index in state.index):
        raise NotProvenError("reads the state with its axes merged")
    group: Index = ()
    for index in query.index:
        if index in ((), key, batch):
            continue
        if index[: len(heads)] != heads:
            raise NotProvenError("reads the state's heads in another order than the queries'")
        group = index[len(heads) :]
    wanted = {batch, heads + group, value} - {()}
    if {i for i in output.axes if i} != wanted or len([i for i in output.axes if i]) != len(wanted):
        raise NotProvenError("computes an output of other axes than [B, H, dv]")
    return Roles(0, 1, key_place, value_places[0]), query, term.number, (batch, heads, key, value, group)


def _match_update(
    update: Tensor, batch: Index, heads: Index, key: Index, value: Index
) -> tuple[dict[str, Operand], str]:
    """The operands of the update, and its rule."""
    kept = [t for t in update.terms if STATE in _names(t) and not t.bound]
    written = [t for t in update.terms if STATE not in _names(t)]
    removed = [t for t in update.terms if STATE in _names(t) and t.bound]
    if not key or not value:
        raise NotProvenError("has keys or values of size 1")
    if len(kept) != 1 or len(written) != 1 or len(removed) > 1:
        raise NotProvenError(
            "updates the state by another sum: "
            f"{len(kept)} products with the state, {len(written)} without it, {len(removed)} summed over it"
        )
    decay = _match_kept(kept[0], update, batch, heads, key)
    operands = _match_written(written[0], batch, heads, key, value)
    if decay is not None:
        operands["decay"] = Operand(decay.name, decay.index, is_exp=not decay.is_exp)
    if not removed:
        if "beta" in operands:
            raise NotProvenError(
                f"multiplies the update by '{operands['beta'].name}' and takes nothing away, which no rule does"
            )
        return operands, "linear" if decay is None else "gated"
    if "beta" not in operands:
        raise NotProvenError("takes away what the key finds, without a beta")
    _check_removed(removed[0], update, operands, key, decay)
    return operands, "delta" if decay is None else "gated_delta"


def _match_kept(term: Term, update: Tensor, batch: Index, heads: Index, key: Index) -> Factor | None:
    """The decay of ``e S``."""
    if term.number != 1.0:
        raise NotProvenError(f"scales the state by {term.number:g} in every step")
    (state, *more), others = _parted(term, STATE)
    if more or state.index != update.axes:
        raise NotProvenError("mixes the state's axes from step to step")
    if not others:
        return None
    if len(others) != 1 or others[0].name == NEXT:
        raise NotProvenError("scales the state by more than one input")
    (decay,) = others
    if not _reads(decay, (batch, heads), (batch, heads, key)):
        raise NotProvenError("has a decay that is neither per head nor per key")
    return decay


def _match_written(term: Term, batch: Index, heads: Index, key: Index, value: Index) -> dict[str, Operand]:
    """Key, value and beta of ``k beta v``."""
    if term.number != 1.0 or term.bound:
        raise NotProvenError(f"scales what it writes by {term.number:g}, or sums over it")
    keys = [f for f in term.factors if key[0] in f.variables]
    values = [f for f in term.factors if value[0] in f.variables]
    rest = [f for f in term.factors if not f.variables & {key[0], value[0]}]
    if len(keys) != 1 or len(values) != 1 or keys == values or len(rest) > 1 or any(f.is_exp for f in term.factors):
        raise NotProvenError("writes something else than key times value (times beta)")
    if not _reads(keys[0], (batch, heads, key), (batch, key)) or not _reads(values[0], (batch, heads, value)):
        raise NotProvenError("writes a key or a value of other axes than [B, H, d]")
    operands = {name: Operand(f.name, f.index) for name, f in (("key", keys[0]), ("value", values[0]))}
    if rest:
        if not _reads(rest[0], (batch, heads), (batch,)):
            raise NotProvenError("has a beta of other axes than [B, H]")
        operands["beta"] = Operand(rest[0].name, rest[0].index)
    return operands


def _check_removed(
    term: Term,
    update: Tensor,
    operands: dict[str, Operand],
    key: Index,
    decay: Factor | None,
) -> None:
    """That what is taken away is ``k beta sum_n k[n] e[n] S[n]``."""
    if term.number != -1.0:
        raise NotProvenError(f"takes away {-term.number:g} times what the key finds")
    if len(term.bound) != 1:
        raise NotProvenError("sums over more than the keys in what it takes away")
    found = {key[0]: (term.bound[0],)}

    def summed(factor: Factor) -> Factor:
        return replace(factor, index=tuple(substitute(index, found) for index in factor.index))

    keys, beta = Factor(operands["key"].name, operands["key"].index), operands["beta"]
    want = [keys, Factor(beta.name, beta.index), summed(keys), summed(Factor(STATE, update.axes))]
    without_decay = sorted(want, key=_order)
    if decay is not None:
        want.append(summed(decay))
    have = sorted(term.factors, key=_order)
    if have != sorted(want, key=_order):
        if decay is not None and have == without_decay:
            raise NotProvenError("takes away what the key finds before the decay, not after it")
        raise NotProvenError("takes away something else than what the key finds in the decayed state")


def _parted(term: Term, name: str) -> tuple[list[Factor], list[Factor]]:
    return [f for f in term.factors if f.name == name], [f for f in term.factors if f.name != name]


def _reads(factor: Factor, *layouts: Sequence[Index]) -> bool:
    """Whether a factor's axes are those of one of the layouts, in any order, besides axes of size 1."""
    found = sorted(index for index in factor.index if index)
    return any(found == sorted(index for index in layout if index) for layout in layouts)


def _names(term: Term) -> set[str]:
    return {factor.name for factor in term.factors}


def _order(factor: Factor) -> tuple[str, bool, tuple[Index, ...]]:
    return factor.name, factor.is_exp, factor.index
