"""What to install where a package is missing: linattn is in no registry, `pip install linattn[...]` would not work."""

from __future__ import annotations

import re
from importlib import metadata


def install_hint(extra: str = "") -> str:
    """A `pip install` with the packages that an extra of linattn stands for, as its own metadata has them.

    Args:
        extra: Such as `compile`; nothing: what linattn needs wherever it runs.
    """
    try:
        wanted = requirements(extra)
    except metadata.PackageNotFoundError:  # a copy of the folder, not an installed package
        return f"install linattn's packages ({extra or 'dependencies'}), its pyproject.toml names them"
    return "pip install " + " ".join(f'"{requirement}"' for requirement in wanted)


def requirements(extra: str = "") -> list[str]:
    """The packages of an extra with their versions, as pip takes them; see `install_hint`."""
    found: list[str] = []
    for line in metadata.requires("linattn") or []:
        requirement, _, marker = line.partition(";")
        of = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if (of[1] if of else "") == extra:
            found.append(requirement.strip())
    assert found, f"linattn has no extra '{extra}'"
    return found
