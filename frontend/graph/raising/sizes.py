"""Sizes that are not known yet, as sums of products of symbols: ``batch * sequence_len``, ``sequence_len + 3``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A whole number, perhaps of open symbols.

    Attributes:
        terms: (sorted symbols, factor) of each product, sorted; none for 0.
    """

    terms: tuple[tuple[tuple[str, ...], int], ...]

    @staticmethod
    def of(value: int | str) -> Size:
        """A known size, or a symbol."""
        return _sum({(): value} if isinstance(value, int) else {(value,): 1})

    @property
    def value(self) -> int | None:
        """The number, None if it is open."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    def __add__(self, other: Size) -> Size:
        """The sum."""
        total = dict(self.terms)
        for symbols, factor in other.terms:
            total[symbols] = total.get(symbols, 0) + factor
        return _sum(total)

    def __mul__(self, other: Size) -> Size:
        """The product."""
        total: dict[tuple[str, ...], int] = {}
        for one, a in self.terms:
            for two, b in other.terms:
                symbols = tuple(sorted(one + two))
                total[symbols] = total.get(symbols, 0) + a * b
        return _sum(total)

    def __sub__(self, other: Size) -> Size:
        """The difference."""
        return self + other * Size.of(-1)

    def divided_by(self, other: Size) -> Size | None:
        """The quotient, None where it is not known to be a whole one of positive sizes."""
        if self == other and other != Size.of(0):
            return Size.of(1)
        if len(other.terms) != 1:
            return None
        ((symbols, factor),) = other.terms
        total: dict[tuple[str, ...], int] = {}
        for own, count in self.terms:
            rest = list(own)
            for symbol in symbols:
                if symbol not in rest:
                    return None
                rest.remove(symbol)
            if count % factor:
                return None
            total[tuple(rest)] = count // factor
        return _sum(total)

    def __str__(self) -> str:
        """As ``4*batch + 1``."""
        if not self.terms:
            return "0"
        return " + ".join("*".join([*([str(f)] if f != 1 or not s else []), *s]) for s, f in self.terms)


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes."""
    total = Size.of(1)
    for size in sizes:
        total = total * size
    return total


def _sum(terms: Mapping[tuple[str, ...], int]) -> Size:
    return Size(tuple(sorted((symbols, factor) for symbols, factor in terms.items() if factor)))
