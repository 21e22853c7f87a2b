"""Where tests run: the devices that are there, and the shared models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

MODELS = ROOT.parent / "shared" / "models"
NO_GPUS = {"VK_DRIVER_FILES": "/nowhere", "VK_ICD_FILENAMES": "/nowhere", "CUDA_VISIBLE_DEVICES": "-1"}
"""Environment in which drivers find no GPU."""
NAPS = Path(__file__).with_name("lavapipe_naps.c")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=2.0, help="how long each fuzzer of tests/fuzz runs")
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


def pytest_configure() -> None:
    """What is started from here, xdist's workers among it, does not spin where it uses lavapipe (`NAPS`).

    And it keeps Python's compiled files: hundreds of processes start, and each would compile the packages anew.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    library = ROOT / "build" / "lavapipe_naps.so"
    mine = library.with_suffix(f".{os.getpid()}")  # another run may have the library in use
    library.parent.mkdir(exist_ok=True)
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", mine, NAPS, "-ldl"], check=True)
    mine.replace(library)
    os.environ["LD_PRELOAD"] = str(library)


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The real exported models, kept beside the repository."""
    if not MODELS.is_dir():
        pytest.skip(f"no exported models in {MODELS}")
    return MODELS
