"""Chooses the strategy of an operator and says why, also for each strategy that was not taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from linattn.runtime.errors import LoweringError

from .op import Choice, LoweringOptions
from .target import Target


@dataclass(frozen=True)
class Yes:
    """A strategy can lower a node.

    Attributes:
        reason: Why it would be a good choice, for the report.
    """

    reason: str = ""


@dataclass(frozen=True)
class No:
    """A strategy cannot lower a node.

    Attributes:
        reason: Why not.
    """

    reason: str


@dataclass(frozen=True)
class OtherMachine(No):
    """A strategy is for another kind of machine than the target; the report is about the target and leaves it out."""


Legality = Yes | No


def rows_text(rows: int | None) -> str:
    """A number of rows as a reason says it; None: open."""
    return "any number of rows" if rows is None else f"{rows} row{'s' if rows != 1 else ''}"


@dataclass(frozen=True)
class Strategy:
    """One way to lower an operator.

    Attributes:
        name: The strategy's word.
        is_legal: Whether it can lower a contract for a target.
        preference: Whether to take it (Yes) or why another one is better (No), asked only if it is legal.
    """

    name: str
    is_legal: Callable[[Any, Target], Legality]
    preference: Callable[[Any, Target, LoweringOptions], Legality]


def always(contract: Any, target: Target) -> Legality:
    """Legality of a form that nothing limits."""
    del contract, target
    return Yes()


def wherever_legal(reason: Callable[[Any], str] | str) -> Callable[[Any, Target, LoweringOptions], Legality]:
    """The preference of a strategy that is taken wherever it is legal.

    Args:
        reason: For the report; may depend on the contract.
    """

    def preference(contract: Any, target: Target, options: LoweringOptions) -> Legality:
        del target, options
        return Yes(reason if isinstance(reason, str) else reason(contract))

    return preference


def not_emitted(strategy: str) -> AssertionError:
    """For the end of a ``lower`` that asks for each strategy: one without a call there is not lowered as another."""
    return AssertionError(f"strategy '{strategy}' is in STRATEGIES, and nothing in lower emits it")


def select(
    strategies: Sequence[Strategy], contract: Any, target: Target, options: LoweringOptions, where: str
) -> Choice:
    """The forced strategy, or the first one that is legal and preferred.

    Args:
        strategies: Best first; the last one must always be legal and preferred.
        contract: The operator's contract.
        target: The machine to compile for.
        options: What the user asked for.
        where: The node, as errors name it.

    Returns:
        The choice, with the reason of each better strategy for such a machine that was not taken.

    Raises:
        LoweringError: if the forced strategy does not exist or is not legal.
    """
    names = [strategy.name for strategy in strategies]
    if options.strategy is not None:
        if options.strategy not in names:
            raise LoweringError(
                "unknown strategy", where=where, got=repr(options.strategy), expected=" or ".join(names)
            )
        forced = strategies[names.index(options.strategy)]
        legality = forced.is_legal(contract, target)
        if isinstance(legality, No):
            raise LoweringError(
                f"strategy '{forced.name}' is not possible here: {legality.reason}",
                where=where,
                hint="leave the strategy out to have one chosen",
            )
        return Choice(forced.name, "asked for")
    rejected: dict[str, str] = {}
    for strategy in strategies:
        answer = strategy.is_legal(contract, target)
        if isinstance(answer, Yes):
            answer = strategy.preference(contract, target, options)
        if isinstance(answer, Yes):
            return Choice(strategy.name, answer.reason, rejected)
        if not isinstance(answer, OtherMachine):
            rejected[strategy.name] = answer.reason
    raise AssertionError(f"{where}: no strategy is legal")
