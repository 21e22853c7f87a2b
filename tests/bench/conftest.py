"""One small run of each kind, shared by the tests; the numbers themselves are never asserted."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from linattn.runtime.bench.cli import main

SAMPLE = Path(__file__).parents[2] / "samples" / "tiny_hybrid.py"


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import onnx

    spec = importlib.util.spec_from_file_location("sample_hybrid", SAMPLE)  # another test folder has a tiny_hybrid
    assert spec is not None
    assert spec.loader is not None
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    path = tmp_path_factory.mktemp("bench") / "tiny.onnx"
    onnx.save(sample.build(), path)
    return path
