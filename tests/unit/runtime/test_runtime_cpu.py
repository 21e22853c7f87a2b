"""A module's instruction sets against the machine's: what is missing is said before any code runs."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from iree.compiler.tools import compile_str
from linattn.runtime import Program, TargetError, amx, cpu
from linattn.runtime.integrity import sealed
from linattn.runtime.manifest import EntryPoint, InputSpec, Manifest, OutputSpec
from linattn.runtime.manifest_target import CpuLevel, Target
from linattn.runtime.module import Module
from tiny_hybrid import ANY_CPU, FLAGS

HERE = cpu.machine_architecture()
ZEN2 = frozenset({"avx", "avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe", "popcnt", "cx16", "sahf"}) | {
    "sse3", "ssse3", "sse4.1", "sse4.2", "sse4a",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    cpu.machine_features.cache_clear()


def module_for(*instruction_sets: str, architecture: str = HERE) -> bytes:
    """A module that gives back what it is given, and says that it needs this."""
    manifest = Manifest(
        model_name="nothing",
        model_sha256="",
        target=Target("cpu", "local-task", "test", None, architecture, instruction_sets),
        batch=None,
        max_context=None,
        context_limit=None,
        inputs=(InputSpec("x", "float32", (2,)),),
        outputs=(OutputSpec("y", "float32", (2,)),),
        states=(),
        entry_points=(EntryPoint("main", "main", None),),
        dims={},
    )
    text, tensor = manifest.to_json().replace('"', "\\22"), "!torch.vtensor<[2],f32>"
    source = f"""func.func @main(%x: {tensor}) -> {tensor}
        attributes {{iree.reflection = {{linattn.manifest = "{text}"}}}} {{
      return %x : {tensor}
    }}"""
    return sealed(compile_str(source, input_type="torch", extra_args=[*FLAGS["cpu"]]))


def refusal(data: bytes, monkeypatch: pytest.MonkeyPatch) -> str:
    """The error of loading; no code may have been touched."""
    monkeypatch.setattr(Module, "link", lambda *_: pytest.fail("its code was loaded"))
    with pytest.raises(TargetError) as caught:
        Program.load(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_this_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    has = sorted(cpu.machine_features())[:1]
    lacks = [name for name in ("amx-tile", "xop", "dotprod", "a-feature-of-2040") if name not in cpu.machine_features()]
    message = refusal(module_for(*has, *lacks), monkeypatch)
    assert f"a CPU without {', '.join(lacks)}; compile with --cpu-features host" in message


def test_what_another_cpu_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine_features", lambda: ZEN2)
    monkeypatch.setattr(cpu, "machine_architecture", lambda: "x86_64")
    data = module_for("avx2", "avx512f", "avx512vnni", architecture="x86_64")
    message = refusal(data, monkeypatch)
    assert "got a CPU without avx512f, avx512vnni; " in message
    assert "x86-64-v3" in message, "the best level that the machine has is named"


def test_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[HERE]
    target = dataclasses.replace(ANY_CPU, architecture=other)
    assert cpu.missing_instruction_sets(target) == [other]
    message = refusal(module_for(architecture=other), monkeypatch)
    assert f"expected {other}; compile with --target-triple {HERE}" in message


def test_nothing_is_missing() -> None:
    everything = tuple(cpu.machine_features())
    assert cpu.missing_instruction_sets(dataclasses.replace(ANY_CPU, instruction_sets=everything)) == []
    assert cpu.missing_instruction_sets(dataclasses.replace(ANY_CPU, name="cuda", architecture=None)) == []
    assert Program.load(module_for(*everything)).run({"x": np.ones(2, np.float32)})["y"].tolist() == [1, 1]


V2 = ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3")
V3 = (*V2, "avx", "avx2", "f16c", "fma")
V4 = (*V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl", "avx512vnni")
PORTABLE = dataclasses.replace(
    ANY_CPU,
    architecture="x86_64",
    instruction_sets=V2,
    levels=(CpuLevel("v4", V4), CpuLevel("v3", V3), CpuLevel("v2", V2)),
)


@pytest.mark.parametrize(
    ("features", "level"),
    [
        ({*V4, "avxvnni", "amx-tile"}, "v4"),
        (V4, "v4"),
        ({*V4} - {"avx512vnni"}, "v3"),
        ({*V4} - {"avx512vl"}, "v3"),
        (ZEN2, "v3"),
        ({*V4} - {"fma"}, "v2"),
        ({*V2, "avx"}, "v2"),
        (V2, "v2"),
    ],
)
def test_the_level_of_a_portable_module(features: set[str], level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine_features", lambda: frozenset(features))
    monkeypatch.setattr(cpu, "machine_architecture", lambda: "x86_64")
    assert cpu.missing_instruction_sets(PORTABLE) == []
    assert cpu.chosen_level(PORTABLE) == level
    assert cpu.chosen_level(ANY_CPU) is None


def test_a_machine_below_all_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine_features", lambda: frozenset({*V2} - {"sse4.2", "popcnt"}))
    monkeypatch.setattr(cpu, "machine_architecture", lambda: "x86_64")
    with pytest.raises(TargetError) as caught:
        cpu.check_cpu("m.vmfb", PORTABLE)
    assert "got a CPU without popcnt, sse4.2; " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("allowed", [True, False])
def test_the_matrix_unit_needs_permission(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine_architecture", lambda: "x86_64")
    monkeypatch.setattr(cpu, "_linux_x86_64", lambda: {*V4, "amx-tile", "amx-bf16"})
    monkeypatch.setattr(amx, "permitted", lambda: allowed)
    cpu.machine_features.cache_clear()
    needs = dataclasses.replace(ANY_CPU, architecture="x86_64", instruction_sets=("amx-bf16", "amx-tile", "avx2"))
    try:
        assert cpu.machine_features() == {*V4, *(("amx-tile", "amx-bf16") if allowed else ())}
        if allowed:
            cpu.check_cpu("m.vmfb", needs)
            return
        with pytest.raises(TargetError, match="matrix unit the system keeps from this process") as caught:
            cpu.check_cpu("m.vmfb", needs)
        assert "compile with --cpu-features host on this machine" in str(caught.value)
    finally:
        cpu.machine_features.cache_clear()


@pytest.mark.skipif(amx.FEATURES & cpu._linux_x86_64() != frozenset(), reason="this CPU has the unit")
def test_no_permission_where_there_is_no_unit() -> None:
    assert not amx.permitted()


@pytest.mark.skipif(HERE != "x86_64", reason="x86-64's features")
def test_sources_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """What numpy and IREE read from the CPU itself is what Linux tells, and serves where there is no Linux."""
    told = cpu.machine_features()
    assert told, "Linux tells"
    cpu.machine_features.cache_clear()
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert cpu.machine_features() <= told
    assert told - cpu.machine_features() <= {"avxvnni", "tbm", "sse4a"}, "numpy and iree-cpuinfo do not know these"
    monkeypatch.setattr(cpu, "_output", lambda *_: "")  # without iree-cpuinfo
    cpu.machine_features.cache_clear()
    assert told - cpu.machine_features() <= {"avxvnni", "tbm", "sse4a", "amx-tile", "amx-int8", "amx-bf16"}


def test_linux_on_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neoverse N1: the bits that its kernel hands to a process."""
    words = {16: 0x119FFF, 26: 0}

    class Libc:
        @staticmethod
        def getauxval(which: int) -> int:
            return words[which]

    Libc.getauxval = type("Function", (), {"__call__": lambda _, which: words[which]})()  # type: ignore[method-assign]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Libc)
    monkeypatch.setattr(cpu, "machine_architecture", lambda: "aarch64")
    cpu.machine_features.cache_clear()
    n1 = {"lse", "fullfp16", "rdm", "rcpc", "dotprod"}
    assert cpu.machine_features() == n1
    words[26] = 1 << 13
    cpu.machine_features.cache_clear()
    assert cpu.machine_features() == n1 | {"i8mm"}


def test_macos_on_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_FP16: 1\nhw.optional.arm.FEAT_I8MM: 0\n"
    monkeypatch.setattr(cpu, "_output", lambda *command: text if command[0] == "sysctl" else "")
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    monkeypatch.setattr(cpu.platform, "machine", lambda: "arm64")
    cpu.machine_features.cache_clear()
    assert cpu.machine_features() == {"dotprod", "fullfp16"}
