"""The kernels of a module after IREE's phase ``executable-targets``: code in a dialect, not bytes yet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from iree.compiler import ir

_CONSTANTS = re.compile(r"constants = (\d+)")
_BINDING = "#hal.pipeline.binding<"
_SHARED_SPACE = 3  # of NVVM
_ARRAY = re.compile(r"(?:array|vector)<(\d+)\s*x\s*((?:\d+\s*x\s*)*)(.*)>$")
_OF_LAUNCH = "__dynamic_shared_memory__"
_SCALAR = re.compile(r"[a-z]+(\d+)$")
_VERSION = re.compile(r"vce<v(\d+)\.(\d+)")
_CAPABILITIES = re.compile(r"\[([\w, ]*)\]")


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes of a driver.

    Attributes:
        name: Of the dispatch.
        bindings: Buffers.
        constants: 32-bit push constants.
        sizes: Threads of a workgroup along x, y and z; empty where the target has no such.
        declared: Bytes of shared memory in the code itself.
        asked: Those that are asked for at the launch: on CUDA all.
    """

    name: str
    bindings: int
    constants: int
    sizes: tuple[int, ...]
    declared: int
    asked: int

    @property
    def threads(self) -> int:
        """Threads of a workgroup."""
        return math.prod(self.sizes)

    @property
    def memory(self) -> int:
        """Bytes of shared memory."""
        return self.declared + self.asked


def kernels(module: ir.Operation) -> Iterator[Kernel]:
    """The kernels of all executables."""
    for variant in _variants(module):
        code = [op for inner in inside(variant, "builtin.module") for op in _code(inner)]
        for export in inside(variant, "hal.executable.export"):
            attributes, layout = export.attributes, str(export.attributes["layout"])
            constants = _CONSTANTS.search(layout)
            sizes = ir.ArrayAttr(attributes["workgroup_size"]) if "workgroup_size" in attributes else ()
            at_launch = "workgroup_local_memory"
            yield Kernel(
                name=ir.StringAttr(attributes["sym_name"]).value,
                bindings=layout.count(_BINDING),
                constants=int(constants[1]) if constants else 0,
                sizes=tuple(ir.IntegerAttr(size).value for size in sizes),
                declared=_shared_memory(code),
                asked=ir.IntegerAttr(attributes[at_launch]).value if at_launch in attributes else 0,
            )


def state_spirv_versions(module: ir.Operation) -> None:
    """Have SPIR-V say the version that it is written for.

    IREE 3.13 writes for the version of the target (what an entry point lists, which decorations there are) and puts the
    least version that has the instructions at the head; below 1.4 that is not valid.
    """
    for code in spirv_modules(module):
        around = code.parent
        assert around is not None
        wanted = _VERSION.search(str(around.attributes["spirv.target_env"]))
        if wanted and (int(wanted[1]), int(wanted[2])) >= (1, 4):
            text = _VERSION.sub(f"vce<v{wanted[1]}.{wanted[2]}", str(code.attributes["vce_triple"]))
            code.attributes["vce_triple"] = ir.Attribute.parse(text)


def spirv_capabilities(module: ir.Operation) -> set[str]:
    """The capabilities that any SPIR-V of the module asks for."""
    found: set[str] = set()
    for code in spirv_modules(module):
        listed = _CAPABILITIES.search(str(code.attributes["vce_triple"]))
        found.update(word.strip() for word in (listed[1] if listed else "").split(","))
    return found


def spirv_modules(module: ir.Operation) -> list[ir.Operation]:
    """The kernels of all executables as SPIR-V."""
    around = [inner for variant in _variants(module) for inner in inside(variant, "builtin.module")]
    return [code for inner in around for code in inside(inner, "spirv.module")]


def _shared_memory(code: Sequence[ir.Operation]) -> int:
    """Bytes of a workgroup's memory that the globals of a kernel's code declare.

    IREE 3.13 turns those of CUDA kernels into parts of the launch's memory; what it leaves of them is in no PTX.
    """
    total = 0
    if any(
        op.name == "llvm.mlir.global" and ir.StringAttr(op.attributes["sym_name"]).value == _OF_LAUNCH for op in code
    ):
        return total
    for op in code:
        if op.name == "spirv.GlobalVariable":
            pointer = str(op.attributes["type"])  # !spirv.ptr<T, Workgroup>
            if pointer.endswith(", Workgroup>"):
                total += type_bytes(pointer.removeprefix("!spirv.ptr<").removesuffix(", Workgroup>"))
        elif op.name == "llvm.mlir.global" and ir.IntegerAttr(op.attributes["addr_space"]).value == _SHARED_SPACE:
            total += type_bytes(str(op.attributes["global_type"]))
    return total


def type_bytes(text: str) -> int:
    """Size of a type of LLVM's or SPIR-V's dialect: scalars, vectors, arrays, structures of one member.

    >>> type_bytes("!spirv.struct<(!spirv.array<512 x vector<4xf32>>)>")
    8192
    >>> type_bytes("!llvm.array<1 x array<18 x f16>>")
    36
    """
    text = re.sub(r",\s*stride=\d+", "", text.strip()).replace("!spirv.", "").replace("!llvm.", "")
    structure = re.match(r"struct<\((.*?)(?: \[\d+\])?\)(?:, \w+)*>$", text)
    if structure:
        return type_bytes(structure[1])
    array = _ARRAY.match(text)
    if array:
        inner = int(array[1])
        for size in re.findall(r"\d+", array[2]):
            inner *= int(size)
        return inner * type_bytes(array[3])
    scalar = _SCALAR.match(text)
    assert scalar, f"no size known of {text}"
    return -(-int(scalar[1]) // 8)


def _variants(module: ir.Operation) -> Iterator[ir.Operation]:
    for executable in inside(module, "hal.executable"):
        yield from inside(executable, "hal.executable.variant")


def inside(parent: ir.Operation, name: str) -> list[ir.Operation]:
    """The operations of a kind right inside another."""
    return [op for op in operations(parent) if op.name == name]


def _code(module: ir.Operation) -> list[ir.Operation]:
    return [op for one in inside(module, "spirv.module") or [module] for op in operations(one)]


def operations(parent: ir.Operation) -> list[ir.Operation]:
    """What is right inside an operation."""
    return [op.operation for region in parent.regions for block in region.blocks for op in block.operations]
