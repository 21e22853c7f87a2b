"""Numbers of bytes for people."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size_text(count: int) -> str:
    """Bytes with three digits and the unit that fits, never `0.0 MiB`.

    >>> size_text(512), size_text(40_000), size_text(470 << 20), size_text(3 << 30)
    ('512 B', '39.1 KiB', '470 MiB', '3.00 GiB')
    """
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    digits = 0 if value >= 99.95 or not unit else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"
