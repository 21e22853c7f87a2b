"""Operators of a file's tests are compiled together (`tests/together.py`)."""

from __future__ import annotations

import pytest
import together


@pytest.fixture(scope="module", autouse=True)
def _compile_together(request: pytest.FixtureRequest) -> None:
    together.prepare([item for item in request.session.items if item.path == request.path])


@pytest.fixture(autouse=True)
def _together_or_alone(request: pytest.FixtureRequest) -> None:
    together.shared = "monkeypatch" not in request.fixturenames
