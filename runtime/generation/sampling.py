"""How the next token is chosen from logits: the largest, or drawn from what top-k, top-p and min-p leave.

Order and meaning of the settings are those of transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real

import numpy as np

from ..device import HostArray
from ..errors import InputError, StateError, require, require_whole

_INFINITY = 0x7C00
"""The bits of an f16 that is infinite; NaN have larger ones."""

_SEEDS = 1 << 64
_SORTED = 1024

_REACH = 87.0
"""How far below the largest logit, by the temperature, f32 still has probabilities."""

_REACH_OF_TOP_K = 12.0
"""Where the module looks first; k are nearer than this as a rule, and where they are not it looks at all."""

_SLACK = 0.01
_LEAST_TEMPERATURE = 1e-30
_MOST_TOP_K = 1 << 24
_BELOW_ONE = 1 - 2**-24
_AT_ONCE = 64
_pack_settings = struct.Struct("=8f").pack


@dataclass(frozen=True)
class Sampling:
    """What a token is drawn by; checked when it is made.

    Attributes:
        temperature: Logits are divided by it; 0 takes the largest logit and leaves the settings below it unread.
        top_k: Only that many of the largest logits, and what equals the last of them; 0: all.
        top_p: Of those the likeliest ones whose probabilities add up to this much; 1: all.
        min_p: And no token that is less likely than this part of the likeliest one; 0: all.
        repeat_penalty: Logits of tokens that the sequence has already are divided by it if positive, else multiplied
            (Keskar et al. 2019, CTRL); 1: none. It holds at temperature 0 too.
        seed: Of the random numbers, 0 to 2^64 - 1; equal seeds draw equal tokens from equal logits, on any device.
            None: another one each time.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 1e3),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repeat_penalty", self.repeat_penalty, 1e-3, 1e3),
        ):
            require(value, Real, name, "a number")
            if not low <= value <= high:
                raise InputError("out of range", where=name, got=value, expected=f"{low:g} to {high:g}")
        require_whole(self.top_k, "top_k")
        if self.top_k < 0:
            raise InputError("out of range", where="top_k", got=self.top_k, expected="0 (all) or more")
        if self.seed is not None:
            require_whole(self.seed, "seed")
        if self.seed is not None and not 0 <= self.seed < _SEEDS:
            raise InputError("out of range", where="seed", got=self.seed, expected="0 to 2^64 - 1")


class Sampler:
    """Chooses the tokens of one sequence, one after the other.

    Args:
        sampling: How.
        seen: Tokens that the sequence has already, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, seen: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._seen = set(seen)
        self._random = np.random.Generator(np.random.Philox(sampling.seed))
        self._upcoming: deque[float] = deque()  # random numbers before their turn
        self._is_greedy, self._is_plain = not sampling.temperature, sampling.repeat_penalty == 1.0
        self._drawn: tuple[int, list[float]] = 0, []

    @property
    def is_plain(self) -> bool:
        """Whether it depends on the logits alone, so that a module can choose."""
        return self._is_plain

    @property
    def is_greedy(self) -> bool:
        """Whether it takes the largest logit."""
        return self._is_greedy

    def settings(self, vocabulary: int, later: int) -> bytes:
        """What a module draws the next token by, or one so many later: `draw_settings` as bytes."""
        known, values = self._drawn
        if known != vocabulary:
            values = draw_settings(self._sampling, 0.0, vocabulary).tolist()
            self._drawn = vocabulary, values
        if len(self._upcoming) <= later:
            self._draw_ahead()
        return _pack_settings(*values[:5], min(self._upcoming[later], _BELOW_ONE), 0.0, 0.0)

    def _draw_ahead(self) -> None:
        """Many numbers at once: the same as one after the other, and a step pays for the generator's code."""
        self._upcoming.extend(self._random.random(_AT_ONCE).tolist())

    def take(self, token: int) -> int:
        """Goes on behind a token that a module has chosen.

        Raises:
            StateError: The module says that there was none to choose.
        """
        if token < 0:
            raise nan_logits() if token == -1 else no_finite_logit()
        if not self._is_greedy:
            self._next_number()
        if not self._is_plain:
            self._seen.add(token)
        return token

    def choose(self, logits: HostArray) -> int:
        """The next token; it counts as seen from here on.

        Args:
            logits: Of one position, [V], any float dtype.

        Raises:
            StateError: A NaN among them, or no finite one to choose.
        """
        token = self._draw(logits) if self._sampling.temperature else self._largest(logits)
        self._seen.add(token)
        return token

    def _largest(self, logits: HostArray) -> int:
        row = logits if self._sampling.repeat_penalty == 1.0 else self._penalized(logits)
        token = index_of_largest(row)
        if row[token] != row[token]:
            raise nan_logits()
        return token

    def _draw(self, logits: HostArray) -> int:
        row = self._penalized(logits)
        if np.isnan(row.max()):  # which a NaN anywhere is
            raise nan_logits()
        kept, weights = likely(row, self._sampling)
        sums = np.cumsum(weights)
        place = int(np.count_nonzero(sums <= self._next_number() * sums[-1]))
        return int(kept[min(place, kept.size - 1)])

    def _next_number(self) -> float:
        if not self._upcoming:
            self._draw_ahead()
        return self._upcoming.popleft()

    def _penalized(self, logits: HostArray) -> HostArray:
        row = logits.astype(np.float32)
        penalty = self._sampling.repeat_penalty
        if penalty != 1.0 and self._seen:
            seen = np.fromiter((token for token in self._seen if token < row.size), np.int64)
            row[seen] = np.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
        return row


def likely(logits: HostArray, sampling: Sampling) -> tuple[HostArray, HostArray]:
    """The tokens that may be drawn, ascending, and their probabilities up to a common factor.

    Args:
        logits: Of one position, [V], float32 or float64, without NaN.
        sampling: A temperature above 0.

    Raises:
        StateError: No logit is finite.
    """
    kept = np.arange(logits.size)
    if 0 < sampling.top_k < logits.size:
        least = np.partition(logits, -sampling.top_k)[-sampling.top_k]
        kept = np.flatnonzero(logits >= least)
    values = logits[kept].astype(np.float64)
    largest = float(values.max(initial=-math.inf))
    if not math.isfinite(largest):
        raise no_finite_logit()
    weights: HostArray = np.exp((values - largest) / sampling.temperature)
    if sampling.top_p < 1.0:
        chosen = _likeliest(weights, sampling.top_p)
        kept, weights = kept[chosen], weights[chosen]
    if sampling.min_p > 0.0:
        enough = weights >= sampling.min_p * weights.max()
        kept, weights = kept[enough], weights[enough]
    return kept, weights


def _likeliest(weights: HostArray, share: float) -> HostArray:
    """Indices, ascending, of the fewest weights that make up a share of all; of equal ones the first."""
    wanted = share * weights.sum()
    places = np.arange(weights.size)
    if weights.size > _SORTED:  # sorting a whole vocabulary takes tens of milliseconds, a few tokens have most of it
        few = np.flatnonzero(weights >= np.partition(weights, -_SORTED)[-_SORTED])
        if weights[few].sum() > wanted:
            places = few
    order = places[np.argsort(-weights[places], kind="stable")]
    before = np.cumsum(weights[order]) - weights[order]
    return np.sort(order[: max(int(np.count_nonzero(before < wanted)), 1)])


def draw_settings(sampling: Sampling, number: float, vocabulary: int) -> HostArray:
    """What a module that draws tokens takes for one row, [8] f32: see `draw` in the manifest's format.

    Args:
        sampling: How; the repetition penalty is not a module's.
        number: The random number, 0 to 1.
        vocabulary: How many logits there are.
    """
    top_k, temperature = min(sampling.top_k, _MOST_TOP_K), sampling.temperature
    reach = _REACH
    if 0 < top_k < vocabulary:
        reach = _REACH_OF_TOP_K
    elif sampling.top_p < 1.0:  # all that is further makes up less than top-p leaves out
        reach = min(_REACH, math.log(vocabulary / (1.0 - sampling.top_p)) + _SLACK)
    elif sampling.min_p > 0.0:
        reach = min(_REACH, _SLACK - math.log(sampling.min_p))
    temperature = max(temperature, _LEAST_TEMPERATURE) if temperature else 0.0
    kept = top_k if top_k < vocabulary else 0
    values = [temperature, kept, sampling.top_p, sampling.min_p, reach, min(number, _BELOW_ONE), 0, 0]
    return np.array(values, np.float32)


def index_of_largest(logits: HostArray) -> int:
    """Index of the largest element of a vector, as numpy's `argmax` finds it: the first of equals, or the first NaN.

    NumPy takes f16 one by one, 0.2 ms for 32,000; the bits of numbers order like integers, and those are compared
    many at a time.
    """
    if logits.dtype != np.float16 or not logits.size:
        return int(logits.argmax())
    bits = np.ascontiguousarray(logits).view(np.int16)
    keys = bits ^ ((bits >> 15) & 0x7FFF)
    best = int(keys.argmax())
    if keys[best] == 0 or keys[best] > _INFINITY or keys.min() < ~_INFINITY:  # two zeros are equal; or there are NaN
        return int(logits.argmax())
    return best


def nan_logits() -> StateError:
    """The error for a model that has lost its numbers."""
    return StateError("the logits are NaN", hint="reset the session and check the inputs")


def no_finite_logit() -> StateError:
    """The error for logits that are all infinite, or of which one is infinitely likely."""
    return StateError("no logit is finite", hint="reset the session and check the inputs")
