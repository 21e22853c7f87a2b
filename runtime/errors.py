"""The errors a user can cause, in one small tree shared by the compiler side and the runtime.

Every error is one line: where, what, got, expected, what to do next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from numbers import Integral


class LinattnError(Exception):
    """Base of all errors that linattn raises on purpose.

    Args:
        message: What is wrong, without a full stop.
        where: The node, argument, file or option it is about.
        got: What was found.
        expected: What would have been right.
        hint: What the user can do next.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.where = where
        self.got = got
        self.expected = expected
        self.hint = hint
        text = f"{where}: {message}" if where else message
        if got is not None:
            text += f", got {got}"
        if expected is not None:
            text += f", expected {expected}"
        if hint:
            text += f"; {hint}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[Callable[..., LinattnError], tuple[object, ...]]:
        """Errors go from process to process whole; what was found and expected goes as text."""
        texts = [None if value is None else str(value) for value in (self.got, self.expected)]
        return _restored, (type(self), self.message, self.where, *texts, self.hint)


def _restored(
    kind: type[LinattnError], message: str, where: str | None, got: str | None, expected: str | None, hint: str | None
) -> LinattnError:
    return kind(message, where=where, got=got, expected=expected, hint=hint)


class UnsupportedModelError(LinattnError):
    """The model is damaged, breaks an operator's contract or uses something we do not compile."""


class LoweringError(LinattnError):
    """The compiler failed on a model that had passed the checks."""


class TargetError(LinattnError):
    """An unknown target, an impossible target option, or a device that is not there."""


class StateError(LinattnError):
    """A state that does not fit: wrong model, shape or dtype, or a full context."""


class InputError(LinattnError, ValueError):
    """A wrong argument of a runtime call: name, dtype, shape, index."""


def require(value: object, kind: type | tuple[type, ...], where: str, expected: str) -> None:
    """Refuses an argument of another kind at the entrance, before something inside fails on it.

    Raises:
        InputError: It is another kind; a bool is no number.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError("not what goes here", where=where, got=type(value).__name__, expected=expected)


def require_whole(value: object, where: str) -> None:
    """The same for a whole number, numpy's too.

    Raises:
        InputError: It is none.
    """
    require(value, Integral, where, "a whole number")


def require_list(value: object, where: str, expected: str) -> None:
    """The same for several things, in whatever holds them; a text is one.

    Raises:
        InputError: It is none.
    """
    if not isinstance(value, Collection) or isinstance(value, (str, bytes)):
        raise InputError("not what goes here", where=where, got=type(value).__name__, expected=expected)
