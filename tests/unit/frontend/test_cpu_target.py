"""What the CPU target makes of ``--cpu-features`` and ``--target-triple``, before the compiler sees it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from iree.compiler import ir
from iree.compiler.api import Invocation, Session
from linattn.dialect_patterns.mat_mul_n_bits.simd_dot import dot_instruction
from linattn.dialect_patterns.target import STACK_BYTES
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.lower.iree import execute
from linattn.frontend.targets import TargetOptions, cpu_query, resolve_target
from linattn.frontend.targets.cpu_levels import LEVELS
from linattn.frontend.targets.cpu_names import CPUS, FEATURES
from linattn.frontend.targets.cpu_query import UNCHECKED, enabled, query
from linattn.runtime import Program, TargetError
from linattn.runtime import cpu as runtime_cpu
from linattn.runtime.cpu import INSTRUCTION_SETS, machine_architecture, machine_features
from onnx import TensorProto, helper

from samples.tiny_hybrid import build

ARCHITECTURES = sorted(CPUS)
HERE = machine_architecture()
OTHER_KIND_OF_CODE = re.compile(
    r"\d\dbit-mode|x32|soft-float|all|reserve-.*|call-saved-.*|tpidr.*|retpoline.*|lvi-.*|harden-.*|seses|execute-only"
    r"|no-lfi-.*|tagged-globals|outline-atomics|inline-asm-.*|force-32bit-.*"
)
# What named CPUs have besides: in every CPU of the architecture, for operating systems, or only ever asked for by name.
NOT_IN_OUR_CODE = """
    adx aes cldemote clflushopt clwb clzero cmov crc32 cx8 enqcmd fsgsbase fxsr hreset invpcid kl lwp mmx movdir64b
    movdiri mwaitx pclmul pconfig pku prefetchi prfchw ptwrite rdpid rdpru rdrnd rdseed serialize sgx sha sha512 shstk
    sm3 sm4 sse sse2 tsxldtrk uintr usermsr vaes vpclmulqdq waitpkg wbnoinvd widekl x87 xsave xsavec xsaveopt xsaves
    avx512vp2intersect
    am brbe ccdp ccidx ccpp chk clrbhb crc ete fgt fp-armv8 fpac hbc lor ls64 mec mpam mte neon nmi pan pan-rwv pauth
    perfmon predres rand ras reserve-x18 rme sb sel2 sha2 sme sme-b16b16 sme-f16f16 sme-f64f64 sme-i16i64 sme2 sme2p1
    spe spe-eef specres2 specrestrict ssbs sve-aes sve-bitperm sve-sha3 sve-sm4 tracev8.4 trbe uaops vh wfxt
"""


def compiler_says(architecture: str) -> tuple[set[str], set[str]]:
    """The names of CPUs that IREE takes, and of features, from a compiler in a process of its own: it aborts."""
    flags = [f"--iree-llvmcpu-target-triple={architecture}-linux-gnu", "--iree-llvmcpu-target-cpu=help", "-"]
    compiler = Path(sys.executable).parent / "iree-compile"
    told = subprocess.run([compiler, *flags], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    cpus, _, features = told.stderr.partition("Available features")
    accepted = re.search(r"accepted CPUs: (.*)", cpus)
    names = accepted[1].split(", ") if accepted else re.findall(r"^  (\S+) +- Select", cpus, re.MULTILINE)
    return {*names, "generic"}, set(re.findall(r"^  (\S+) +- ", features, re.MULTILINE))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_are_the_compilers(architecture: str) -> None:
    cpus, features = compiler_says(architecture)
    assert set(CPUS[architecture]) == cpus
    assert set(FEATURES[architecture]) == {name for name in features if not OTHER_KIND_OF_CODE.fullmatch(name)}
    assert INSTRUCTION_SETS[architecture] | UNCHECKED[architecture] <= set(FEATURES[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_cpu(architecture: str) -> None:
    """Each name compiles, for nothing but instruction sets that loads check; no feature is left unsorted."""
    sorted_ = {*INSTRUCTION_SETS[architecture], *UNCHECKED[architecture], *NOT_IN_OUR_CODE.split()}
    for name in CPUS[architecture]:
        cpu = query(architecture, name)
        text = next((flag for flag in cpu.flags if "cpu-features" in flag), "")
        assert cpu.instruction_sets <= INSTRUCTION_SETS[architecture]
        assert set(cpu.left_out) == set(re.findall(r"-(?<=[=,]-)([\w.-]+)", text)) <= UNCHECKED[architecture]
        assert cpu.vector_bits == width(architecture, cpu.instruction_sets)
        _, told, _ = cpu_query._ask(architecture, name, "")
        named = {change[1:] for change in told.split(",") if change and not re.match(r"\+v\d", change)}
        assert named <= sorted_, name


def width(architecture: str, features: Iterable[str]) -> int:
    if architecture == "aarch64":
        return 128
    return 512 if "avx512f" in features else 256 if "avx" in features else 128


def test_features_bring_what_llvm_says() -> None:
    """What each feature brings or takes with it: LLVM's own width of vectors is a witness to that."""
    implying = {*cpu_query._IMPLIED["x86_64"], *INSTRUCTION_SETS["x86_64"]} - UNCHECKED["x86_64"]
    for name in sorted(implying):
        for change in (f"+{name}", f"+avx512vnni,+avx512fp16,+vaes,+xop,-{name}"):
            _, told, bits = cpu_query._ask("x86_64", "generic", change)
            assert told == change
            assert bits == width("x86_64", enabled("x86_64", change.split(","))), change


@pytest.mark.parametrize(
    ("features", "bits", "note"),
    [("+avx2,+fma", 256, "f16c"), ("+avx2,+fma,+f16c", 256, ""), ("x86-64-v3", 256, ""), ("generic", 128, "")],
)
def test_features(features: str, bits: int, note: str) -> None:
    """Width of the vectors; f16 without the instructions for it is said to be slow."""
    target = resolve_target("cpu", TargetOptions(cpu_features=features, target_triple="x86_64-linux-gnu"))
    assert target.capabilities.vector_bits == bits
    assert [note in text for text in target.notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("triple", "cpu", "dot"),
    [
        ("x86_64", "znver5", "llvm.x86.avx512.vpdpbusd.512"),
        ("x86_64", "tigerlake", "llvm.x86.avx512.vpdpbusd.512"),
        ("x86_64", "arrowlake", "llvm.x86.avx512.vpdpbusd.256"),
        ("x86_64", "znver2", ""),
        ("x86_64", "nehalem", ""),
        ("x86_64", "k8", None),
        ("aarch64", "cortex-a76", "llvm.aarch64.neon.sdot.v4i32.v16i8"),
        ("aarch64", "neoverse-v3", "llvm.aarch64.neon.usdot.v4i32.v16i8"),
        ("aarch64", "apple-m4", "llvm.aarch64.neon.usdot.v4i32.v16i8"),
        ("aarch64", "+v8.4a", "llvm.aarch64.neon.sdot.v4i32.v16i8"),
        ("aarch64", "cortex-a72", None),
    ],
)
def test_kernels_follow_the_cpu(triple: str, cpu: str, dot: str | None) -> None:
    """Names that no table of ours lists give kernels their instructions all the same."""
    instruction = dot_instruction(resolve_target("cpu", TargetOptions(cpu, None, triple)).capabilities)
    assert (instruction.dot if instruction else None) == dot


def test_host_is_what_this_machine_has() -> None:
    host = resolve_target("cpu", TargetOptions())
    assert host.architecture == HERE
    assert set(host.instruction_sets) <= machine_features()
    if HERE == "x86_64":
        assert {"avx2", "avx512f", "avx512vnni"} & machine_features() <= set(host.instruction_sets)


def test_host_goes_without_what_the_system_does_not_tell() -> None:
    """LLVM sees more than an old kernel: what loads could not check for is not used."""
    less = machine_features() - {"avx512f", "avx2", "dotprod"}
    cpu = query(HERE, "host", usable=less)
    assert cpu.instruction_sets <= less
    assert cpu.vector_bits == width(HERE, less)


def test_portable_levels_are_as_the_compiler_describes_them() -> None:
    """IREE's text for the machines of a portable module, which is written here: a module has flags for one only."""
    for level in LEVELS:
        told = executable_text("x86_64", level.cpu, level.flags)
        told = told.replace("max_stack_allocation_size = 32768", f"max_stack_allocation_size = {STACK_BYTES}")
        assert without_features(told) == without_features(level.executable)
        assert enabled("x86_64", features_of(told)) & INSTRUCTION_SETS["x86_64"] == {*level.instruction_sets}
        on = enabled("x86_64", level.flags.split(","))
        assert on <= {*level.features}, "what LLVM adds by itself is asked for too"
        assert level.vector_bits == width("x86_64", on)


def features_of(executable: str) -> list[str]:
    found = re.search(r'cpu_features = "([^"]*)"', executable)
    assert found
    return found[1].split(",")


def without_features(executable: str) -> str:
    return re.sub(r'cpu_features = "[^"]*"', "", re.sub(r"\s+", " ", executable))


def executable_text(architecture: str, cpu: str, features: str) -> str:
    session = Session()
    session.set_flags(*cpu_query._flags(architecture, cpu, features))
    module = ir.Module.parse("module {}", session.context)
    invocation = Invocation(session)
    invocation.import_module(module.operation)
    assert execute(invocation, "ToPhase", "preprocessing")
    found = re.search(r"#hal\.executable\.target<.*?\}>", str(module), re.DOTALL)
    assert found
    return found[0]


def test_portable() -> None:
    target = resolve_target("cpu", TargetOptions("portable", None, "x86_64-linux-gnu"))
    assert [level.name for level in target.levels] == ["x86-64-v4+vnni", "x86-64-v3", "x86-64-v2"]
    assert target.instruction_sets == target.levels[-1].instruction_sets
    assert {"sse4.2", "popcnt", "cx16"} <= {*target.instruction_sets} < {*target.levels[1].instruction_sets}
    dots = [dot_instruction(machine) for machine in target.capabilities.levels]
    assert [dot.vector_bits for dot in dots if dot] == [512, 256, 128], "int4 takes the same kernels everywhere"


TRIPLES = {
    "aarch64": "aarch64-linux-gnu aarch64-unknown-linux-gnu arm64-apple-macos arm64-apple-macosx14.0"
    " aarch64-apple-darwin aarch64-pc-windows-msvc aarch64-linux-android34 aarch64-linux-musl aarch64 arm64",
    "x86_64": "x86_64-linux-gnu x86_64-pc-linux-gnu x86_64-apple-darwin23 x86_64-pc-windows-msvc x86_64-w64-windows-gnu"
    " x86_64-linux-android x86_64 amd64",
}


@pytest.mark.parametrize(("triple", "architecture"), [(t, a) for a, names in TRIPLES.items() for t in names.split()])
def test_triples(triple: str, architecture: str) -> None:
    """Of a triple the architecture counts: IREE's own loader makes a module serve every system."""
    target = resolve_target("cpu", TargetOptions(target_triple=triple))
    assert (target.architecture, target.instruction_sets) == (architecture, ())
    assert target.flags == resolve_target("cpu", TargetOptions("generic", None, architecture)).flags


HOSTILE = [
    ("apple-m1", "x86_64", "a CPU of aarch64"),
    ("cortex-a76", "x86_64", "add --target-triple aarch64-linux-gnu"),
    ("znver4", "aarch64", "add --target-triple x86_64-linux-gnu"),
    ("nonsense", "x86_64", "host | portable | generic"),
    ("portable", "aarch64", "name a CPU, or generic"),
    ("portabel", "x86_64", "expected portable"),
    ("zenver4", "x86_64", "znver4"),
    ("Znver4", "x86_64", "znver4"),
    ("cortex-a67", "aarch64", "cortex-a76"),
    ("i686", "x86_64", "no CPU of x86_64"),
    ("help", "x86_64", "no CPU of x86_64"),
    ("", "x86_64", "no CPU of x86_64"),
    ("znver4 --iree-x", "x86_64", "no CPU of x86_64"),
    ("+avx2,+nonsense", "x86_64", "no feature of x86_64 that the compiler knows, got '+nonsense'"),
    ("+avx5l2f", "x86_64", "avx512f"),
    ("+dotprod", "x86_64", "no feature of x86_64"),
    ("+avx2,fma", "x86_64", "begin with + or -"),
    ("+avx2,", "x86_64", "begin with + or -"),
    ("+", "x86_64", "begin with + or -"),
    ("+help", "x86_64", "no feature of x86_64"),
    ("+16bit-mode", "x86_64", "no feature of x86_64"),
    ("+avxvnniint8", "x86_64", "no system tells"),
    ("-sse2", "x86_64", "every x86_64 has it"),
    ("+sve,-neon", "aarch64", "every aarch64 has it"),
    (None, "riscv64-linux-gnu", "x86_64 or aarch64"),
    (None, "", "x86_64 or aarch64"),
    (None, "x86_64-plan9", "x86_64 or aarch64"),
    ("host", {"x86_64": "aarch64", "aarch64": "x86_64"}[HERE], "this machine is no"),
]


@pytest.mark.parametrize(("features", "triple", "words"), HOSTILE)
def test_names_that_the_compiler_would_die_of(features: str | None, triple: str, words: str) -> None:
    with pytest.raises(TargetError) as caught:
        compile_model(build(), CompileOptions(cpu_features=features, target_triple=triple))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", ["cuda", "vulkan"])
def test_gpus_have_no_triple(target: str) -> None:
    with pytest.raises(TargetError, match="--target-triple: a CPU option"):
        resolve_target(target, TargetOptions(target_triple="aarch64-linux-gnu"))


@pytest.mark.parametrize("cpu", ["sapphirerapids", "znver5"])
def test_a_module_for_another_cpu_is_refused(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its name to the machine that lacks it, here one of Zen 2's instruction sets."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    module = compile_model(model, CompileOptions(cpu_features=cpu, target_triple="x86_64-linux-gnu")).module
    zen2 = query("x86_64", "znver2").instruction_sets
    monkeypatch.setattr(runtime_cpu, "machine_features", lambda: zen2)
    monkeypatch.setattr(runtime_cpu, "machine_architecture", lambda: "x86_64")
    with pytest.raises(
        TargetError, match=rf"compiled for x86_64 {cpu}, whose .*without .*avx512f.*or x86-64-v3"
    ) as caught:
        Program.load(module)
    assert "\n" not in str(caught.value)
