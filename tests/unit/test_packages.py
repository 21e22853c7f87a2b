"""What a wheel holds: each folder with code is named in pyproject.toml; an editable install hides a missing one."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_folder_with_code_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    mapped = settings["package-dir"]
    folders: set[str] = set()
    for package in settings["packages"]:
        parent = next(name for name in sorted(mapped, reverse=True) if f"{package}.".startswith(f"{name}."))
        folders.add(mapped[parent] + package.removeprefix(parent).replace(".", "/"))
    code = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("frontend", "dialect_patterns", "runtime")
        for path in (ROOT / top).rglob("*.py")
    }
    assert sorted(code - folders) == []
    assert sorted(folders - code) == []
    for name, folder in mapped.items():
        assert (ROOT / folder / "py.typed").is_file(), f"type checkers ignore {name} without it"
