"""Bundles: bundle.json as hostile input, and what is taken of one on which machine."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from linattn.runtime import LinattnError, Program, TargetError, choice
from linattn.runtime.bundle import Bundle, BundledFile, BundledModule, describe_file, read_bundle
from linattn.runtime.choice import choose
from linattn.runtime.cli import main
from linattn.runtime.discover import SOFTWARE, FoundDevice
from linattn.runtime.integrity import SEAL_BYTES, sealed
from linattn.runtime.manifest_target import Target
from tiny_hybrid import Hybrid, reference

from tests.conftest import NO_GPUS

IDS = np.array([[3, 1, 2]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of modules for the CPU and for Vulkan that have no weights."""
    root = tmp_path / "tiny.linattn"
    root.mkdir()
    (root / "weights.irpa").write_bytes(sealed(b"nothing"))
    modules: list[BundledModule] = []
    for target in ("vulkan", "cpu"):
        (root / f"{target}.vmfb").write_bytes(Hybrid(target).compile())
        modules.append(
            BundledModule(**asdict(describe_file(root / f"{target}.vmfb")), target=Hybrid(target).manifest().target)
        )
    bundle = Bundle("tiny-hybrid", "0" * 64, describe_file(root / "weights.irpa"), tuple(modules), {"linattn": "0.1.0"})
    (root / "bundle.json").write_text(bundle.to_json())
    return root


def test_round_trip(folder: Path) -> None:
    bundle = read_bundle(folder)
    assert [module.file for module in bundle.modules] == ["vulkan.vmfb", "cpu.vmfb"]
    (folder / "bundle.json").write_text(bundle.to_json())
    assert read_bundle(folder) == bundle


MISSING = object()
HOSTILE: list[tuple[str, Any, str]] = [
    ("format", 2, "unknown bundle format, got 2"),
    ("format", True, "whole number"),
    ("format", MISSING, "bundle.format: missing"),
    ("model", [], "bundle.model: wrong kind"),
    ("model.name", 3, "a string"),
    ("model.name", "x" * 5000, "a string"),
    ("producer", None, "bundle.producer"),
    ("modules", {}, "a list"),
    ("modules", [], "modules: empty"),
    ("modules", [3], "bundle.modules[0]: wrong kind"),
    ("modules", [{}] * 200_000, "at most 100000"),
    ("weights", MISSING, "bundle.weights: missing"),
    ("weights.file", "../weights.irpa", "not a plain file name"),
    ("weights.file", "/etc/passwd", "not a plain file name"),
    ("weights.file", "C:weights.irpa", "not a plain file name"),
    ("weights.file", "a\\b", "not a plain file name"),
    ("weights.file", "a\0b", "not a plain file name"),
    ("weights.file", "", "not a plain file name"),
    ("weights.file", ".", "not a plain file name"),
    ("weights.file", "..", "not a plain file name"),
    ("weights.file", "bundle.json", "not unique, got bundle.json"),
    ("weights.file", "cpu.vmfb", "not unique, got cpu.vmfb"),
    ("weights.file", "x" * 256, "not a plain file name"),
    ("weights.file", "é" * 255, "cannot be read"),
    ("weights.file", "\ud800", "cannot be read"),
    ("weights.size", -1, "whole number from 0"),
    ("weights.size", 1.5, "whole number"),
    ("weights.size", 1 << 60, "whole number"),
    ("weights.size", 6, f"damaged, got {SEAL_BYTES + 7} bytes, expected 6 bytes"),
    ("weights.sha256", "0" * 63, "not a SHA-256"),
    ("weights.sha256", "G" * 64, "not a SHA-256"),
    ("weights.sha256", "0" * 64, "another file than bundle.json says"),
    ("modules.0.file", "..", "not a plain file name"),
    ("modules.0.file", "cpu.vmfb", "not unique"),
    ("modules.0.file", "none.vmfb", "damaged, got no such file"),
    ("modules.0.size", 12, "the bundle is damaged"),
    ("modules.0.target", None, "wrong kind"),
    ("modules.0.target.name", "tpu", "cpu | cuda | vulkan"),
    ("modules.0.target.device", 7, "a string"),
    ("modules.0.target.subgroup_size", 0, "whole number"),
    ("modules.0.target.architecture", "x86_64", "target.architecture: wrong for target vulkan"),
    ("modules.1.target.architecture", None, "target.architecture: wrong for target cpu"),
    ("modules.1.target.instruction_sets", "avx2", "a list"),
    ("modules.1.target.instruction_sets", [3], "a list of strings"),
]


@pytest.mark.parametrize(("place", "value", "words"), HOSTILE, ids=[f"{p}-{i}" for i, (p, _, _) in enumerate(HOSTILE)])
def test_hostile_index(folder: Path, place: str, value: Any, words: str) -> None:
    """One line that names the place, whichever way it is loaded; nothing is run."""
    raw = copy.deepcopy(json.loads((folder / "bundle.json").read_text()))
    *parents, last = place.split(".")
    row = raw
    for key in parents:
        row = row[int(key)] if key.isdecimal() else row[key]
    if value is MISSING:
        del row[last]
    else:
        row[last] = value
    (folder / "bundle.json").write_text(json.dumps(raw))
    for load in (read_bundle, Program.load):
        with pytest.raises(LinattnError) as caught:
            load(folder)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"format": NaN}', "whole number"),
        (b" " * (5 << 20), "too large"),
        (None, "not a bundle"),
    ],
)
def test_not_an_index(folder: Path, data: bytes | None, words: str) -> None:
    (folder / "bundle.json").unlink()
    if data is not None:
        (folder / "bundle.json").write_bytes(data)
    with pytest.raises(TargetError, match=words):
        Program.load(folder)


def test_links_stay_inside(folder: Path) -> None:
    outside = folder.parent / "cpu.vmfb"
    (folder / "cpu.vmfb").rename(outside)
    (folder / "cpu.vmfb").symlink_to(outside)
    with pytest.raises(TargetError, match="a link to outside of the bundle"):
        Program.load(folder)
    (folder / "cpu.vmfb").unlink()
    (folder / "cpu.vmfb").symlink_to("cpu.vmfb")
    with pytest.raises(TargetError, match=r"cannot be read|no such file"):  # the latter from Python 3.13 on
        Program.load(folder)


def test_a_file_that_is_not_whole(folder: Path) -> None:
    """Its seal has been cut off: nobody can tell what it is."""
    (folder / "weights.irpa").write_bytes(b"nothing")
    with pytest.raises(TargetError, match="no seal at its end"):
        Program.load(folder)


def test_another_module_than_the_index_says(folder: Path) -> None:
    text = (folder / "bundle.json").read_text()
    (folder / "bundle.json").write_text(text.replace("0" * 64, "1" * 64))
    with pytest.raises(TargetError, match=r"another module than bundle\.json says"):
        Program.load(folder, device="cpu")


def test_weights_are_the_bundles_own(folder: Path) -> None:
    with pytest.raises(TargetError, match="a bundle has its weights inside"):
        Program.load(folder, parameters=folder / "weights.irpa")


def loaded_by(code: str) -> subprocess.CompletedProcess[str]:
    """Runs in a process that finds no Vulkan driver."""
    environment = os.environ | NO_GPUS
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_on_a_machine_without_a_gpu(folder: Path) -> None:
    code = f"""
import numpy as np
from linattn.runtime import Program
program = Program.load({str(folder)!r})
print(program.choice.module, program.choice.device)
print(*program.choice.passed, sep="\\n")
print(program.run({{"input_ids": np.array({IDS.tolist()})}})["logits"].tolist())
"""
    done = loaded_by(code)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "cpu.vmfb local-task"
    assert lines[1] == "cuda: the bundle has modules for cpu, vulkan only"
    assert lines[2].startswith("vulkan: no device (")
    np.testing.assert_allclose(json.loads(lines[3]), reference(IDS)[0], rtol=1e-6)


@pytest.mark.vulkan
def test_with_software_vulkan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lavapipe is not taken for a GPU, and is where it is asked for; both compute the same."""
    if not all(row.is_software for row in choice.look_for("vulkan")):
        pytest.skip("for machines with software Vulkan only")
    best, asked = Program.load(folder), Program.load(folder, device="vulkan")
    assert best.choice is not None
    assert asked.choice is not None
    assert (best.choice.module, asked.choice.module) == ("cpu.vmfb", "vulkan.vmfb")
    assert [row.reason for row in best.choice.passed][1:] == [SOFTWARE]
    assert asked.choice.passed == ()
    for program in (best, asked):
        np.testing.assert_allclose(program.run({"input_ids": IDS})["logits"], reference(IDS)[0], rtol=1e-6)
    assert main([str(folder), "--ids", "3,1,2"]) == 0
    err = capsys.readouterr().err
    assert f"({SOFTWARE})" not in err
    assert SOFTWARE in err
    assert "linattn-run: took cpu.vmfb on local-task (" in err


MODULES = {
    "cuda.vmfb": Target("cuda", "cuda", "sm_89", 32),
    "wide.vmfb": Target("vulkan", "vulkan", "hopper", 32),
    "any.vmfb": Target("vulkan", "vulkan", "baseline"),
    "v4.vmfb": Target("cpu", "local-task", "x86-64-v4"),
    "v2.vmfb": Target("cpu", "local-task", "x86-64-v2"),
}
ALL = tuple(MODULES)
NO_CUDA, NO_GPU = (
    FoundDevice("cuda", None, "", "unknown", "no driver"),
    FoundDevice("vulkan", None, "", "", "no driver"),
)
CUDA = [FoundDevice("cuda", "cuda://0", "H100", "discrete-gpu"), FoundDevice("cuda", "cuda://1", "T4", "discrete-gpu")]
GPU = FoundDevice("vulkan", "vulkan://gpu", "H100", "discrete-gpu")
LAVA = FoundDevice("vulkan", "vulkan://lava", "llvmpipe", "cpu", SOFTWARE)
Machine = Mapping[str, list[FoundDevice]]
BARE: Machine = {"cuda": [NO_CUDA], "vulkan": [NO_GPU]}
FULL: Machine = {"cuda": CUDA, "vulkan": [GPU, LAVA]}

CHOICES: list[tuple[str, Machine, tuple[str, ...], set[str], set[str], str | None, str, list[str]]] = [
    # title, machine, modules, those that do not fit, those that fail to load, device; what is taken, the reasons
    ("no GPU", BARE, ALL, set(), set(), None, "v4.vmfb local-task", ["cuda: no driver", "vulkan: no driver"]),
    (
        "an old CPU",
        BARE,
        ALL,
        {"v4.vmfb"},
        set(),
        None,
        "v2.vmfb local-task",
        ["cuda: no driver", "vulkan: no driver", "v4.vmfb on local-task: v4.vmfb does not fit"],
    ),
    (
        "everything",
        FULL,
        ALL,
        set(),
        set(),
        None,
        "cuda.vmfb cuda://0",
        ["vulkan: cuda comes first", "cpu: cuda comes first"],
    ),
    (
        "CUDA fails",
        FULL,
        ALL,
        set(),
        {"cuda.vmfb"},
        None,
        "wide.vmfb vulkan://gpu",
        [
            "cuda.vmfb on cuda://0: cuda.vmfb does not load!",
            "cuda.vmfb on cuda://1: cuda.vmfb does not load!",
            f"vulkan://lava: {SOFTWARE}",
            "cpu: vulkan comes first",
        ],
    ),
    (
        "another subgroup size",
        {"cuda": [NO_CUDA], "vulkan": [GPU]},
        ALL,
        {"wide.vmfb"},
        set(),
        None,
        "any.vmfb vulkan://gpu",
        ["cuda: no driver", "wide.vmfb on vulkan://gpu: wide.vmfb does not fit", "cpu: vulkan comes first"],
    ),
    (
        "no module for CUDA",
        FULL,
        ALL[1:],
        set(),
        set(),
        None,
        "wide.vmfb vulkan://gpu",
        ["cuda: the bundle has modules for cpu, vulkan only", f"vulkan://lava: {SOFTWARE}", "cpu: vulkan comes first"],
    ),
    ("asked for the CPU", FULL, ALL, set(), set(), "cpu", "v4.vmfb local-task", []),
    ("asked for one worker", FULL, ALL, set(), set(), "local-sync", "v4.vmfb local-sync", []),
    ("asked for lavapipe", FULL, ALL, {"wide.vmfb"}, set(), "vulkan", "any.vmfb vulkan", ["wide.vmfb on vulkan: wide"]),
    ("asked for the second", FULL, ALL, set(), set(), "cuda://1", "cuda.vmfb cuda://1", []),
    ("asked for CUDA, which fails", FULL, ALL, set(), {"cuda.vmfb"}, "cuda", "", ["cuda.vmfb does not load"]),
    (
        "asked for CUDA, no module",
        FULL,
        ALL[1:],
        set(),
        set(),
        "cuda",
        "",
        ["the bundle has modules for cpu, vulkan only"],
    ),
    ("asked for nonsense", FULL, ALL, set(), set(), "tpu", "", ["got device tpu"]),
    ("nothing loads", BARE, ALL, {"v4.vmfb"}, {"v2.vmfb"}, None, "", ["v4.vmfb does not fit", "v2.vmfb does not load"]),
]


@pytest.mark.parametrize("row", CHOICES, ids=[row[0] for row in CHOICES])
def test_choice(row: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated machines: the best device, a device that was named only, and every reason."""
    _, machine, names, unfit, failing, device, taken, reasons = row
    cpu = FoundDevice("cpu", "local-task", "CPU", "cpu")
    monkeypatch.setattr(choice, "look_for", lambda target: {"cpu": [cpu], **machine}[target])
    modules = tuple(BundledModule(name, 1, "0" * 64, MODULES[name]) for name in names)
    bundle = Bundle("model", "0" * 64, BundledFile("weights.irpa", 1, "0" * 64), modules, {})

    def refusing(unwanted: set[str], words: str) -> Callable[[BundledModule, str], str]:
        def check(module: BundledModule, uri: str) -> str:
            if module.file in unwanted:
                raise TargetError(f"{module.file} {words}")
            return f"{module.file} {uri}"

        return check

    fits, attempt = refusing(unfit, "does not fit"), refusing(failing, "does not load")
    if not taken:
        with pytest.raises(TargetError) as caught:
            choose(bundle, "model.linattn", device, fits, attempt)
        assert all(reason in str(caught.value) for reason in reasons)
        return
    loaded, chosen = choose(bundle, "model.linattn", device, fits, attempt)
    assert (loaded, f"{chosen.module} {chosen.device}") == (taken, taken)
    told = [f"{passed}{'!' if passed.failed else ''}" for passed in chosen.passed]
    assert len(told) == len(reasons)
    assert all(line.startswith(reason) for line, reason in zip(told, reasons, strict=True)), told


def test_a_fallback_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is there and does not take its module: what runs instead is told, also to users of the library."""
    gpu = FoundDevice("vulkan", "vulkan://GPU-none", "a GPU", "discrete-gpu")
    cpu = FoundDevice("cpu", "local-task", "CPU", "cpu")
    monkeypatch.setattr(choice, "look_for", lambda target: [{"vulkan": gpu, "cpu": cpu}[target]])
    with pytest.warns(
        RuntimeWarning, match="vulkan.vmfb on vulkan://GPU-none: no such device.*; took cpu.vmfb on local-task"
    ):
        program = Program.load(folder)
    assert program.choice is not None
    assert [passed.failed for passed in program.choice.passed] == [False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Program.load(folder, device="cpu")
