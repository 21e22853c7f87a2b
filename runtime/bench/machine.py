"""What the figures were measured on: machine, devices, drivers, versions, and the ceilings that a kernel can reach."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import iree.runtime as _untyped_rt  # pyright: ignore[reportMissingTypeStubs]
import numpy as np
from linattn.runtime.device import Device, DeviceArray
from linattn.runtime.discover import look_for
from linattn.runtime.drivers import list_devices
from linattn.runtime.errors import TargetError
from linattn.runtime.loading import read_manifest
from linattn.runtime.module import Module
from linattn.runtime.opening import open_device

from .lazy import need
from .op_models import COPY, MATMUL
from .timing import timed

_rt: Any = cast(Any, _untyped_rt)

PACKAGES = (
    "linattn", "iree-base-runtime", "iree-base-compiler", "numpy", "onnx", "onnxruntime", "torch", "triton",
    "flash-linear-attention",
)  # fmt: skip
_PROBE_SECONDS = 0.3
_FAST = 2e-3


def versions() -> dict[str, str]:
    """Version of each package that plays a part and is installed, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of linattn that is measured, `-dirty` if its code was changed since; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    changed = [*git, "diff", "--name-only", "HEAD", "--", ":(top)", ":(top,exclude)docs", ":(top,exclude)*.md"]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        found = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            for command in ([*git, "describe", "--always"], changed)
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{found[0]}-dirty" if found[1] else found[0]


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory (bytes), system, and how busy the machine was before (load over 1, 5 and 15 minutes)."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "cpu": match[1] if match else platform.processor() or platform.machine(),
        "cores": core_count(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }


def core_count() -> int:
    """CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def resident_bytes() -> dict[str, int | None]:
    """Memory of this process now and at its peak, in bytes; None where the system does not tell."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = {key: re.search(rf"{field}:\s*(\d+) kB", text) for key, field in (("now", "VmRSS"), ("peak", "VmHWM"))}
    return {key: int(match[1]) * 1024 if match else None for key, match in found.items()}


class Probe:
    """Runs in a process of its own: looks at one device and measures its ceilings.

    Args:
        target: `cpu`, `cuda` or `vulkan`.
        device: IREE device URI; None: the target's default.

    Raises:
        TargetError: No such device; the message says what to install.
    """

    def __init__(self, target: str, device: str | None = None) -> None:
        self._target = target
        self._device = open_device(device or target)

    def describe(self) -> dict[str, Any]:
        """Name, driver and driver version of the device, and whether it is a GPU's driver in `software`."""
        device = self._device
        name = describe_machine()["cpu"] if self._target == "cpu" else device.description
        name = re.sub(r"\(.*\(.*\)\)$", "", name).strip()  # llvmpipe says its driver twice
        found = {"uri": device.uri, "name": name, "driver": device.driver, "driver_version": _driver_version(device)}
        return found | {"software": self._target == "vulkan" and _is_software(device)}

    def ceilings(self, models: Mapping[str, str]) -> dict[str, Any]:
        """Bytes per second of a large copy (read and written) and FLOP per second of large matrix products.

        Args:
            models: For GPUs: `copy_N` (negates N floats) and `matmul_N` -> path of the compiled module.

        Returns:
            `copy_bytes_per_s`, `fma_flop_per_s` (f32), `matrix_flop_per_s` (f16; None where nobody tells) and `how`.
        """
        if self._target == "cpu":
            return _cpu_ceilings() | {"matrix_flop_per_s": None}
        found = _module_ceilings(self._device, models) | {"matrix_flop_per_s": None}
        known = _torch_ceilings(self._device.description)
        rates = {key: max(rate, found[key] or 0.0) for key, rate in known.items()}
        how = (
            f"{found['how']}; the same card in PyTorch where that is faster, and f16 products"
            if known
            else found["how"]
        )
        return found | rates | {"how": how}


def _is_software(device: Device) -> bool:
    """Whether a Vulkan device computes on the CPU, as lavapipe does; the default device may be any of them."""
    found = [row for row in look_for("vulkan") if row.uri is not None]
    same = [row for row in found if row.uri == device.uri] or [row for row in found if row.name in device.description]
    return any(row.is_software for row in same or found)


def _driver_version(device: Device) -> str:
    if device.driver == "cuda":
        file = Path("/proc/driver/nvidia/version")
        match = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.exists() else None
        return match[0] if match else "unknown"
    if device.driver == "vulkan":
        infos = cast(list[dict[str, Any]], _rt.get_driver("vulkan").query_available_devices())
        text = str(_rt.get_driver("vulkan").dump_device_info(infos[0]["device_id"]))
        found = [re.search(rf"^{key}: (.*)$", text, re.M) for key in ("driver", "driver_info")]
        return ", ".join(match[1] for match in found if match) or "unknown"
    return f"iree {metadata.version('iree-base-runtime')}"


def _cpu_ceilings() -> dict[str, Any]:
    threads = core_count()
    blocks = [(np.ones(1 << 24, np.float32), np.zeros(1 << 24, np.float32)) for _ in range(threads)]

    def copy_one(block: tuple[Any, Any]) -> None:
        np.copyto(block[1], block[0])

    with ThreadPoolExecutor(threads) as pool:
        copy = min(timed(lambda: list(pool.map(copy_one, blocks)), _PROBE_SECONDS, 2))
    size = 1024
    left = right = np.ones((size, size), np.float32)
    product = min(timed(lambda: left @ right, _PROBE_SECONDS, 2))
    return {
        "copy_bytes_per_s": threads * 2 * blocks[0][0].nbytes / copy,
        "fma_flop_per_s": 2 * size**3 / product,
        "how": f"numpy: copy of {threads} x {blocks[0][0].nbytes >> 20} MiB in {threads} threads, "
        f"f32 matmul of {size}; best of {_PROBE_SECONDS} s",
    }


def _module_ceilings(device: Device, models: Mapping[str, str]) -> dict[str, Any]:
    copy_size, copy = _first_slow(device, models, "copy", COPY, lambda n: [(n,)])
    size, product = _first_slow(device, models, "matmul", MATMUL, lambda n: [(n, n), (n, n)])
    return {
        "copy_bytes_per_s": 8 * copy_size / copy,
        "fma_flop_per_s": 2 * size**3 / product,
        "how": f"IREE modules: negation of {copy_size >> 18} MiB, f32 matmul of {size}; best of {_PROBE_SECONDS} s, "
        "call overhead included",
    }


def _torch_ceilings(description: str) -> dict[str, float]:
    """What the card reaches in PyTorch; nothing where PyTorch is not installed or sees another card."""
    if importlib.util.find_spec("torch") is None:
        return {}
    torch = need("torch", package="torch")
    if not torch.cuda.is_available() or torch.cuda.get_device_name(0) not in description:
        return {}

    def rate(amount: float, call: Callable[[], Any]) -> float:
        def wait() -> None:
            call()
            torch.cuda.synchronize()

        return amount / min(timed(wait, _PROBE_SECONDS, 2))

    data, size = torch.ones(1 << 28, device="cuda"), 8192
    copy = torch.empty_like(data)
    single = torch.ones(size, size, device="cuda")
    half = torch.randn(size, size, device="cuda").half()  # zeros and ones take less power, and so less time
    return {
        "copy_bytes_per_s": rate(8 * data.numel(), lambda: copy.copy_(data)),
        "fma_flop_per_s": rate(2 * size**3, lambda: single @ single),
        "matrix_flop_per_s": rate(2 * size**3, lambda: half @ half),
    }


def _first_slow(
    device: Device,
    models: Mapping[str, str],
    kind: str,
    sizes: tuple[int, ...],
    shapes: Callable[[int], list[tuple[int, ...]]],
) -> tuple[int, float]:
    """Size and least seconds of the first call that takes milliseconds, so that its overhead does not count."""
    best = (0, float("inf"))
    for size in sizes:
        module = Module(Path(models[f"{kind}_{size}"]))
        manifest = read_manifest(module)
        module.link(device, None)
        arrays: list[DeviceArray | int] = [device.zeros(shape, "float32") for shape in shapes(size)]
        start = time.perf_counter()
        module.call("main", arrays, ["float32"] * len(manifest.outputs))
        first = time.perf_counter() - start

        into = module.new_results("main")

        def call(
            module: Module = module,
            arrays: list[DeviceArray | int] = arrays,
            into: list[DeviceArray | None] | None = into,
        ) -> None:
            module.call("main", arrays, ["float32"], into)

        best = (size, min(timed(call, _PROBE_SECONDS, 0 if first > 1 else 2)))
        if best[1] > _FAST:
            break
    return best


def missing_device(target: str) -> str | None:
    """Why a target cannot run here, None if a device is listed; starts no device."""
    if target == "cpu" or list_devices(target):
        return None
    try:
        open_device(target)
    except TargetError as error:
        return str(error)
    return None
