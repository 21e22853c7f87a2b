"""How far counts may be from what is expected."""

from __future__ import annotations

import numpy as np


def chi_square_bound(degrees: int) -> float:
    """What a chi-square variable exceeds once in 10,000 times (Wilson and Hilferty 1931)."""
    return float(degrees * (1 - 2 / (9 * degrees) + 3.719 * np.sqrt(2 / (9 * degrees))) ** 3)
