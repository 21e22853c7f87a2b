"""Where tests run: the devices that are there, and the shared models."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

MODELS = ROOT.parent / "shared" / "models"
NO_GPUS = {"VK_DRIVER_FILES": "/nowhere", "VK_ICD_FILENAMES": "/nowhere", "CUDA_VISIBLE_DEVICES": "-1"}
"""Environment in which drivers find no GPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=4.0, help="how long each fuzzer of tests/fuzz runs")
    parser.addoption("--fuzz-seed", type=int, default=0, help="the seed of its cases")


def _vulkan_error() -> str | None:
    import iree.runtime as rt

    try:
        rt.get_driver("vulkan").create_default_device()
    except (RuntimeError, ValueError) as error:
        return str(error).splitlines()[0]
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, saying why; with LINATTN_REQUIRE=vulkan a missing driver is an error."""
    del config
    vulkan = [item for item in items if item.get_closest_marker("vulkan")]
    error = _vulkan_error() if vulkan else None
    if error is None:
        return
    if "vulkan" in os.environ.get("LINATTN_REQUIRE", "").split(","):
        pytest.exit(f"LINATTN_REQUIRE names vulkan but there is no Vulkan device: {error}", returncode=3)
    reason = "no Vulkan device (Debian: apt-get install mesa-vulkan-drivers libvulkan1)"
    for item in vulkan:
        item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lavapipe's threads that spin as long as a device is open (`runtime/opening.py`) get nothing while others test.

    With both workers of two cores busy that is a sixth of the time. Only root may take such a thread back.
    """
    if sys.platform != "linux" or os.geteuid() != 0:
        return
    policy = os.SCHED_OTHER if item.get_closest_marker("vulkan") else os.SCHED_IDLE
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(OSError):  # it has ended
            if os.getpriority(os.PRIO_PROCESS, thread) > os.getpriority(os.PRIO_PROCESS, os.getpid()):
                os.sched_setscheduler(thread, policy, os.sched_param(0))


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The real exported models, kept beside the repository."""
    if not MODELS.is_dir():
        pytest.skip(f"no exported models in {MODELS}")
    return MODELS
