"""Steps that are queued on a GPU without waiting for the host between them."""

from __future__ import annotations

from typing import Any

import pytest
from linattn.runtime import generate
from linattn.runtime.engine import engine_of
from linattn.runtime.submissions import Submissions

from tests.stepped import IDS, program


@pytest.mark.vulkan
def test_a_queued_step_waits_for_no_semaphore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the prompt, and the tokens are those of calls that do."""
    one = program("vulkan")
    module, steps, free = engine_of(one).module, 24, list[bool]()
    submit, nothing = Submissions.submit, Submissions._nothing  # pyright: ignore[reportPrivateUsage]

    def counted(self: Submissions, *args: Any) -> Any:
        free.append(False)
        return submit(self, *args)

    def noted(self: Submissions) -> Any:
        free[-1] = True
        return nothing(self)

    monkeypatch.setattr(Submissions, "submit", counted)
    monkeypatch.setattr(Submissions, "_nothing", noted)
    found = list(generate(one.session(), IDS[0, :9].tolist(), steps))
    assert len(free) > steps
    assert all(free)
    asynchronous = [name.removesuffix("$async") for name in module.functions if name.endswith("$async")]
    monkeypatch.setattr(module, "_in_order", dict.fromkeys(asynchronous, False))
    free.clear()
    assert list(generate(one.session(), IDS[0, :9].tolist(), steps)) == found
    assert not any(free)
