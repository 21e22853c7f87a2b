"""Several targets on one command line: each option goes to the target that it is for, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from linattn.frontend import cli
from linattn.frontend.targets import TARGETS, TargetOptions
from linattn.frontend.targets.lists import read_machines
from linattn.runtime import LinattnError
from linattn.runtime.discover import RANK
from linattn.runtime.drivers import DEVICE_URIS, DRIVERS, INSTALL_HINTS

NONE, V3 = TargetOptions(), TargetOptions(cpu_features="x86-64-v3")


def test_the_runtime_runs_what_is_compiled() -> None:
    """It has a device for each target, a place among the others and, where there is none, what to install."""
    assert set(TARGETS) == set(DEVICE_URIS) == set(RANK) == {"cpu", *INSTALL_HINTS}
    assert set(DEVICE_URIS.values()) <= set(DRIVERS)


def gpu(name: str) -> TargetOptions:
    return TargetOptions(gpu_target=name)


RIGHT = [
    ("cpu", V3, [("cpu", V3)]),
    ("vulkan", gpu("ada"), [("vulkan", gpu("ada"))]),
    ("vulkan", gpu("my,odd:name.json"), [("vulkan", gpu("my,odd:name.json"))]),
    ("vulkan", gpu("vulkan:ada"), [("vulkan", gpu("ada"))]),
    ("vulkan", gpu("vulkan:ada,vulkan:mobile"), [("vulkan", gpu("ada")), ("vulkan", gpu("mobile"))]),
    ("cpu,vulkan,cuda", NONE, [("cpu", NONE), ("vulkan", NONE), ("cuda", NONE)]),
    ("cuda, cpu", V3, [("cuda", NONE), ("cpu", V3)]),
    (
        "cuda,cpu",
        TargetOptions("generic", "sm_89", "aarch64-linux-gnu"),
        [("cuda", gpu("sm_89")), ("cpu", TargetOptions("generic", None, "aarch64-linux-gnu"))],
    ),
    ("cuda,vulkan", gpu("vulkan:ada"), [("cuda", NONE), ("vulkan", gpu("ada"))]),
    ("vulkan,cuda", gpu("cuda:sm_90,vulkan:ada"), [("vulkan", gpu("ada")), ("cuda", gpu("sm_90"))]),
    ("cuda", gpu("sm_80,sm_90"), [("cuda", gpu("sm_80,sm_90"))]),
    ("cuda,vulkan", gpu("cuda:sm_80,sm_90,vulkan:ada"), [("cuda", gpu("sm_80,sm_90")), ("vulkan", gpu("ada"))]),
    (
        "cuda,cpu",
        gpu("cuda:sm_80,sm_89,cuda:sm_90"),
        [("cuda", gpu("sm_80,sm_89")), ("cuda", gpu("sm_90")), ("cpu", NONE)],
    ),
    # What belongs to no target is left to the target, which says so.
    ("cpu", gpu("ada"), [("cpu", gpu("ada"))]),
    ("cuda,vulkan", V3, [("cuda", V3), ("vulkan", V3)]),
]


@pytest.mark.parametrize(("targets", "options", "machines"), RIGHT)
def test_each_its_own(targets: str, options: TargetOptions, machines: list[tuple[str, TargetOptions]]) -> None:
    assert read_machines(targets, options) == machines


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ("", NONE, "unknown target"),
        ("cpu,,cuda", NONE, "unknown target"),
        ("cpu,CUDA", NONE, "unknown target"),
        ("cuda,cpu,cuda", NONE, "given twice, got cuda"),
        ("cuda,vulkan", gpu("sm_89"), "which target is it for"),
        ("cuda,vulkan", gpu("cuda:sm_89,ada"), "which target is it for"),
        ("cuda,cpu", gpu("vulkan:ada"), "not among the targets, got vulkan, expected cuda"),
    ],
)
def test_refused(targets: str, options: TargetOptions, message: str) -> None:
    with pytest.raises(LinattnError, match=message):
        read_machines(targets, options)


FILES = {
    "": "tiny-cpu.vmfb",
    "--cpu-features portable": "tiny-cpu-portable.vmfb",
    "--cpu-features +avx2,+fma": "tiny-cpu-avx2-fma.vmfb",
    "--target-triple aarch64-linux-gnu --cpu-features cortex-a76": "tiny-cpu-aarch64-linux-gnu-cortex-a76.vmfb",
    "--target cuda": "tiny-cuda-sm_80.vmfb",
    "--target cuda --gpu-target sm_89": "tiny-cuda-sm_89.vmfb",
    "--target cuda --gpu-target sm_80,sm_90": "tiny-cuda-sm_80-sm_90.vmfb",
    "--target vulkan": "tiny-vulkan-baseline.vmfb",
    "--target vulkan --gpu-target ada": "tiny-vulkan-ada.vmfb",
    "--target vulkan --gpu-target ../my/phone.json": "tiny-vulkan-phone.vmfb",
    "--target cuda,cpu --gpu-target sm_89": "tiny.linattn",
    "--target cuda -o other.vmfb": "other.vmfb",
}


@pytest.mark.parametrize(("options", "file"), FILES.items())
def test_two_machines_have_two_files(options: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is named: a module for one GPU took the place of another's."""
    outputs: list[Path] = []

    def note(*_: Any, output: Path | None = None, **__: Any) -> None:
        assert output is not None
        outputs.append(output)
        raise LinattnError("enough")

    monkeypatch.setattr(cli, "compile_model", note)
    monkeypatch.setattr(cli, "compile_bundle", lambda *arguments: note(output=arguments[2]))
    assert cli.main(["tiny/model.onnx", *options.split()]) == 2
    assert outputs == [Path(file)]
