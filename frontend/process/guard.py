"""The last net: what no check has foreseen ends in one line too, which says that it is ours to mend."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from linattn.runtime.errors import LinattnError, LoweringError

P = ParamSpec("P")
R = TypeVar("R")


def last_net(function: Callable[P, R]) -> Callable[P, R]:
    """Turn exceptions that nobody raised on purpose into a LoweringError.

    The places that an exception has passed (``add_note``) say where: the node, then the stage.
    """

    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (LinattnError, OSError):
            raise
        except Exception as error:
            where = ", ".join(getattr(error, "__notes__", [])) or None
            if isinstance(error, MemoryError):
                hint = "give it more memory, or compile for fewer tokens, rows or a shorter context"
                raise LoweringError("not enough memory", where=where, hint=hint) from error
            message = " ".join(str(error).split())[:200]
            raise LoweringError(
                f"unexpected {type(error).__name__}: {message}",
                where=where,
                hint="this is a bug in linattn: report it with what --debug shows",
            ) from error

    return guarded
