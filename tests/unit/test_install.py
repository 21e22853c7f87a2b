"""Errors that advise `pip install` advise what works: linattn itself lies in no registry, its extras' packages do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from linattn.install import install_hint, requirements

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = [
    path for top in ("frontend", "dialect_patterns", "runtime", "samples") for path in (ROOT / top).rglob("*.py")
]


@pytest.mark.parametrize("extra", [name for name in EXTRAS if name != "test"])
def test_an_extra_is_spelled_out(extra: str) -> None:
    assert sorted(requirements(extra)) == sorted(EXTRAS[extra])
    assert sorted(re.findall(r'"([^"]+)"', install_hint(extra))) == sorted(EXTRAS[extra])


def test_without_an_extra_it_is_what_everybody_needs() -> None:
    assert sorted(requirements()) == sorted(PROJECT["dependencies"])


def test_a_copy_without_metadata_gets_a_hint_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert "text" in install_hint("text")


def test_nobody_is_told_to_install_linattn_from_a_registry() -> None:
    texts = [*SOURCES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "runtime").rglob("*.md")]
    told = [
        path.name for path in texts if re.search(r"pip install (-\S+ )*['\"]?linattn(\[|\b[^-/_.])", path.read_text())
    ]
    assert told == ["install.py"]  # which says so of them


def test_every_hint_names_an_extra() -> None:
    """Of all calls in the sources, so that none fails where it should explain a failure."""
    named: list[str] = []
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            arguments = {"install_hint": call.args[:1], "need": call.args[1:2]}.get(call.func.id, [])
            named += [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
    assert set(named) == {"compile", "cuda", "bench", "text", "state", "completion"}
    assert set(named) <= set(EXTRAS)


@pytest.mark.parametrize(("missing", "advice"), [("onnx", "onnx=="), ("iree", "iree-base-runtime==")])
def test_python_m_linattn_without_a_package(missing: str, advice: str, tmp_path: Path) -> None:
    """What is imported as `iree` is not what pip knows by that name."""
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError(name='{missing}')")
    command = "compile" if missing == "onnx" else "run"
    source = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['linattn', {command!r}, 'm.onnx']\n"
    source += "from linattn.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f'"{advice}' in done.stderr
