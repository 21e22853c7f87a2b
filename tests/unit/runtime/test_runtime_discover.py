"""Devices are listed without a model and without drivers, best first, each other one with the reason why not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest
from linattn.runtime import devices, discover
from linattn.runtime.cli import main
from linattn.runtime.cpu import _LEVELS
from linattn.runtime.discover import SOFTWARE
from linattn.runtime.drivers import Listed, VulkanFacts

from tests.conftest import NO_GPUS

DISCRETE, INTEGRATED = VulkanFacts("discrete-gpu"), VulkanFacts("integrated-gpu")
LAVAPIPE = VulkanFacts("cpu", (), (8, 8))


def machine(
    monkeypatch: pytest.MonkeyPatch, cuda: Sequence[str] | str, vulkan: Mapping[str, VulkanFacts] | str
) -> None:
    """A machine with these devices, or with a driver that ends in this error."""

    def find(driver: str) -> list[Listed]:
        found = {"cuda": cuda, "vulkan": vulkan}[driver]
        if isinstance(found, str):
            raise RuntimeError(f"Error creating driver: c/runtime/src/driver.c:66: UNAVAILABLE; {found}")
        return [Listed(f"{driver}://{name}", name, i + 1) for i, name in enumerate(found)]

    monkeypatch.setattr(discover, "find_devices", find)
    monkeypatch.setattr(discover, "vulkan_facts", lambda device: vulkan[device.name])


RANKINGS = [
    ("nothing", "no libcuda", "no ICD", "cpu", {}),
    ("no devices", [], {}, "cpu", {}),
    ("lavapipe", "no libcuda", {"lava": LAVAPIPE}, "cpu", {"vulkan://lava": SOFTWARE}),
    ("a Vulkan GPU", "no libcuda", {"lava": LAVAPIPE, "gpu": DISCRETE}, "vulkan://gpu", {"vulkan://lava": SOFTWARE}),
    (
        "two Vulkan GPUs",
        [],
        {"intel": INTEGRATED, "amd": DISCRETE},
        "vulkan://amd",
        {"vulkan://intel": "vulkan://amd comes first", "local-task": "vulkan://amd comes first"},
    ),
    (
        "an old Vulkan GPU",
        [],
        {"old": VulkanFacts("discrete-gpu", ("Vulkan API 1.3", "synchronization2"))},
        "cpu",
        {"vulkan://old": "IREE cannot use it, it lacks Vulkan API 1.3, synchronization2"},
    ),
    ("a GPU that says nothing", [], {"gpu": VulkanFacts()}, "vulkan://gpu", {}),
    (
        "a kind that nobody knows",
        [],
        {"new": VulkanFacts("quantum-gpu"), "amd": DISCRETE},
        "vulkan://amd",
        {"vulkan://new": "vulkan://amd comes first"},
    ),
    (
        "NVIDIA",
        ["h100", "second"],
        {"h100": DISCRETE, "lava": LAVAPIPE},
        "cuda://h100",
        {
            "cuda://second": "cuda://h100 comes first",
            "vulkan://h100": "cuda://h100 comes first",
            "vulkan://lava": SOFTWARE,
        },
    ),
]


@pytest.mark.parametrize(("title", "cuda", "vulkan", "best", "others"), RANKINGS, ids=[row[0] for row in RANKINGS])
def test_ranking(
    monkeypatch: pytest.MonkeyPatch,
    title: str,
    cuda: Sequence[str] | str,
    vulkan: Mapping[str, VulkanFacts] | str,
    best: str,
    others: Mapping[str, str],
) -> None:
    machine(monkeypatch, cuda, vulkan)
    found = devices()
    assert found[0].uri == {"cpu": "local-task"}.get(best, best)
    assert [row.why_not for row in found].count(None) == 1
    assert found[0].why_not is None
    reasons = {row.uri: row.why_not for row in found[1:]}
    assert {uri: reasons[uri] for uri in others} == others
    for target, there in (("cuda", cuda), ("vulkan", vulkan)):
        rows = [row for row in found if row.target == target]
        if isinstance(there, str):
            assert [row.uri for row in rows] == [None]
            assert f"no device ({there}); install" in (rows[0].why_not or "")
        else:
            assert len(rows) == max(len(there), 1)


def without_gpus(code: str) -> subprocess.CompletedProcess[str]:
    """In a process that finds no Vulkan driver."""
    environment = os.environ | NO_GPUS
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_a_machine_without_drivers() -> None:
    done = without_gpus("import sys; from linattn.runtime.cli import main; sys.exit(main(['--list-devices']))")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    assert ["*", "cpu"] in lines
    assert "vulkan  no device (" in done.stdout
    assert "install a Vulkan driver" in done.stdout


@pytest.mark.vulkan
def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    """What the driver really says: lavapipe is known for software."""
    assert main(["--list-devices"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("*") for line in lines) == 1
    for row in devices():
        assert row.is_software == ("llvmpipe" in row.name)
        assert row.kind in ("discrete-gpu", "integrated-gpu", "virtual-gpu", "cpu") or row.uri is None
        assert any(f"{row.target:6}  {row.uri or 'no device'}" in line for line in lines)
    cpu = next(row for row in devices() if row.target == "cpu")
    assert f"{os.cpu_count()} threads" in cpu.details
    assert {word.strip(",") for word in cpu.details.split()} & ({"generic", "aarch64"} | set(_LEVELS))
    assert any(SOFTWARE in line for line in lines) == any(row.is_software for row in devices())


def test_no_model_and_nothing_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "linattn-run: error: the following arguments are required: MODEL"
    )
