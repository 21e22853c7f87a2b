"""Typed access to untrusted JSON, with errors that name the place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from .errors import TargetError

_MAX_WHOLE = 1 << 31
_INT64 = 1 << 63
_MAX_ROWS = 100_000
_MAX_RANK = 16


def bad(where: str, place: str, message: str, got: object = None, expected: object = None) -> TargetError:
    """The error for a broken rule of the manifest."""
    text = None if got is None else str(got)[:80]
    return TargetError(f"manifest: {place}: {message}", where=where, got=text, expected=expected)


class Reader:
    """One JSON object, read field by field.

    Args:
        value: The parsed JSON value.
        where: The file, for errors.
        place: The path inside the manifest, for errors.

    Raises:
        TargetError: From the constructor and every method, where the value is of another kind.
    """

    def __init__(self, value: Any, where: str, place: str) -> None:
        if not isinstance(value, dict):
            raise bad(where, place, "wrong kind", type(value).__name__, "an object")
        self._fields = cast(dict[str, Any], value)
        self._where = where
        self._place = place

    def get(self, key: str) -> Any:
        """A field of any kind; it must be there."""
        if key not in self._fields:
            raise bad(self._where, f"{self._place}.{key}", "missing")
        return self._fields[key]

    def text(self, key: str) -> str:
        """A string of at most 4096 characters."""
        value = self.get(key)
        if not isinstance(value, str) or len(value) > 4096:
            raise self._wrong(key, value, "a string")
        return value

    def optional_text(self, key: str) -> str | None:
        """A text, None where the field is missing or null."""
        return None if self._fields.get(key) is None else self.text(key)

    def texts(self, key: str, *, missing_ok: bool = False) -> tuple[str, ...]:
        """A list of strings."""
        values = [] if missing_ok and key not in self._fields else self.array(key)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, values, "a list of strings")
        return tuple(str(value) for value in values)

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """One of some words."""
        value = self.get(key)
        if value not in choices:
            raise self._wrong(key, value, " | ".join(choices))
        return str(value)

    def flag(self, key: str, *, missing_ok: bool = False) -> bool:
        """A truth value."""
        value = self._fields.get(key, False) if missing_ok else self.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true | false")
        return value

    def whole(self, key: str, least: int, most: int = _MAX_WHOLE) -> int:
        """A whole number from `least` to `most`."""
        return self._whole(key, self.get(key), least, most)

    def optional_whole(self, key: str, least: int, *, missing_ok: bool = False) -> int | None:
        """A whole number or null."""
        value = self._fields.get(key) if missing_ok else self.get(key)
        return None if value is None else self._whole(key, value, least)

    def optional_interval(self, key: str) -> tuple[int, int] | None:
        """Two whole numbers of 64 bits, the first not the larger one, or null."""
        if self.get(key) is None:
            return None
        numbers = self.array(key)
        if [type(n) for n in numbers] != [int, int] or not -_INT64 <= numbers[0] <= numbers[1] < _INT64:
            raise self._wrong(key, numbers, "[least, greatest] in 64 bits, or null")
        return numbers[0], numbers[1]

    def shape(self, key: str) -> tuple[int | str, ...]:
        """A list of whole numbers and symbolic names."""
        values = self.array(key)
        if len(values) > _MAX_RANK:
            raise self._wrong(key, f"{len(values)} axes", f"at most {_MAX_RANK}")
        return tuple(value if isinstance(value, str) and value else self._whole(key, value, 0) for value in values)

    def array(self, key: str) -> list[Any]:
        """A list of anything."""
        value = self.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list")
        values = cast(list[Any], value)
        if len(values) > _MAX_ROWS:
            raise self._wrong(key, f"{len(values)} rows", f"at most {_MAX_ROWS}")
        return values

    def rows(self, key: str) -> list[Reader]:
        """A list of objects."""
        place = f"{self._place}.{key}"
        return [Reader(value, self._where, f"{place}[{i}]") for i, value in enumerate(self.array(key))]

    def child(self, key: str) -> Reader:
        """An object."""
        return Reader(self.get(key), self._where, f"{self._place}.{key}")

    def raw_object(self, key: str) -> dict[str, Any]:
        """An object with names of its own choice."""
        return dict(self.child(key)._fields)

    def _whole(self, key: str, value: Any, least: int, most: int = _MAX_WHOLE) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(key, value, f"a whole number from {least} to {most}")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> TargetError:
        return bad(self._where, f"{self._place}.{key}", "wrong value", repr(value), expected)
