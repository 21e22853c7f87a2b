"""Runs IREE's compiler in this process: passes, code generation, and its diagnostics as one line."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iree.compiler import ir
from iree.compiler.api import Invocation, Output, Session, ctypes_dl
from iree.compiler.passmanager import PassManager
from linattn.dialect_patterns.emit.dialect_modules import load_dialects
from linattn.runtime.errors import LoweringError
from linattn.runtime.manifest import REFLECTION_KEY, Manifest
from linattn.runtime.owned import never_free

from ..targets import CompileTarget
from .alone import joins, with_alone
from .cpu_variants import add_conditions, load_before_asking
from .device_needs import device_needs
from .dispatch_limits import DispatchLimits
from .dispatches import attach_dispatches, describe_dispatches, dispatch_nodes
from .empty_ranges import fill_empty_ranges
from .executables import state_spirv_versions
from .in_order import mark_in_order
from .join_dispatches import describe_joined, join_dispatches, joined_rows
from .kept_roundings import keep_roundings
from .kernel_bodies import KernelBodies
from .kernel_loads import load_side_by_side
from .native_cuda import add_native_code
from .packed_steps import add_packed_steps, with_packed_steps
from .reflection import set_reflection
from .step_loops import add_step_loops, with_step_loops

_TORCH_PIPELINE = "builtin.module(func.func(convert-torch-onnx-to-torch),torch-to-iree{externalize-transients=%s})"
_NAMED = re.compile(r'loc\("([^"]*)"')


def execute(invocation: Invocation, *phases: str) -> bool:
    """Run a part of IREE's pipeline: pairs of ``FromPhase`` or ``ToPhase`` and a phase's name.

    IREE 3.13 has no Python name for these two functions of its C API.
    """
    library, handle = _c_api(invocation)
    for which, phase in zip(phases[::2], phases[1::2], strict=True):
        getattr(library, f"ireeCompilerInvocationSetCompile{which}")(handle, phase.encode())
    return invocation.execute()


def verify_between_passes(invocation: Invocation, wanted: bool) -> None:
    """Whether the whole module is verified after each pass, as IREE does by itself; has no Python name either."""
    library, handle = _c_api(invocation)
    library.ireeCompilerInvocationSetVerifyIR(handle, ctypes.c_bool(wanted))


def _c_api(invocation: Invocation) -> tuple[Any, ctypes.c_void_p]:
    return ctypes_dl._dylib, ctypes.c_void_p(invocation._inv_p)  # pyright: ignore


class CompiledCode:
    """A compiled module that is to be written.

    Args:
        invocation: The run of IREE's pipeline that has made it.
        manifest: What the module says about itself.
        joined: A line for people about each function with joined dispatches.
    """

    def __init__(self, invocation: Invocation, manifest: Manifest, joined: list[str]) -> None:
        self._invocation = invocation
        self.manifest = manifest
        self.joined = joined

    def to_bytes(self) -> bytes:
        """The bytes of the ``.vmfb``."""
        memory = Output.open_membuffer()
        self._invocation.output_vm_bytecode(memory)
        return bytes(memory.map_memory())

    def write(self, path: Path) -> None:
        """Write the ``.vmfb`` to a file.

        Raises:
            OSError: if the system does not take all of it.
        """
        file = Output.open_file(str(path))
        try:
            self._invocation.output_vm_bytecode(file)
            file.keep()
        except (ValueError, RuntimeError) as error:
            never_free(file)  # LLVM ends the process when it closes a file that it could not write
            os.truncate(path, 0)
            raise OSError(str(error)) from error
        file.close()


class Compiler:
    """One compilation: a context, a module in it, and IREE's flags.

    Args:
        target: What to compile for.
        dump: Folder for the IR after each stage, or None.
    """

    def __init__(self, target: CompileTarget, dump: Path | None = None) -> None:
        self._target = target
        self._session = Session()
        self._session.set_flags("--iree-input-type=none", *target.flags)
        self.context: ir.Context = self._session.context
        load_dialects(self.context)
        self._dump = dump
        self._dumped = 0
        self._errors: list[tuple[str, str]] = []
        self._handler = self.context.attach_diagnostic_handler(self._on_diagnostic)

    def _on_diagnostic(self, diagnostic: Any) -> bool:
        if diagnostic.severity == ir.DiagnosticSeverity.ERROR:
            self._errors.append((diagnostic.message, str(diagnostic.location)))
        return True

    @contextmanager
    def building(self) -> Generator[None]:
        """Inside: ops can be built in this compiler's context."""
        with self.context, ir.Location.unknown():
            yield

    def dump(self, module: ir.Module, stage: str) -> None:
        """Write the module to the dump folder, weights elided."""
        if self._dump is None:
            return
        self._dump.mkdir(parents=True, exist_ok=True)
        self._dumped += 1
        text = module.operation.get_asm(
            large_elements_limit=16, large_resource_limit=16, enable_debug_info=False, assume_verified=True
        )
        (self._dump / f"{self._dumped:02d}-{stage}.mlir").write_text(text)

    def convert_torch(self, module: ir.Module, takes_workspace: bool = False) -> None:
        """From IREE's ONNX dialect to linalg: IREE's own conversions for what our patterns left.

        Args:
            module: The module, changed in place.
            takes_workspace: Whether every function takes the memory for its intermediate values as a last argument.

        Raises:
            LoweringError: if an operator cannot be converted.
        """
        with self.building():
            bodies = KernelBodies(module.operation)
            passes: Any = PassManager.parse(_TORCH_PIPELINE % str(takes_workspace).lower())
            try:
                passes.run(module.operation)  # verified after each pass: some never end on what is not legal
                bodies.put_back(module.operation)
            except ir.MLIRError as error:
                text = str(error).splitlines()
                first = next((line for line in text if "error:" in line), text[0])
                self._errors.append((first.partition("error:")[2] or first, str(error)))
                raise self._failure("the importer could not convert the model") from error

    def compile(
        self, module: ir.Module, manifest: Manifest, show: Callable[[str], None], *, takes_results: bool
    ) -> CompiledCode:
        """Generate code, and complete the module's manifest with what that code needs of a device.

        The module is verified between IREE's phases: after each pass, as IREE would, takes a third of the time of
        all. With a folder for the IR it is done, to find the pass that is to blame.

        Args:
            module: The module, with its manifest in a reflection attribute.
            manifest: That manifest.
            show: Told what is done.
            takes_results: Whether its functions take the memory of their results.

        Raises:
            LoweringError: if IREE fails, or a dispatch breaks a limit of the target's driver.
        """
        invocation = Invocation(self._session)
        invocation.import_module(module.operation)
        verify_between_passes(invocation, self._dump is not None)
        levels = self._target.capabilities.levels
        self._run(invocation, module, "ToPhase", "global-optimization")
        with self.building():
            bodies = KernelBodies(module.operation)
        self._run(invocation, module, "FromPhase", "global-optimization", "ToPhase", "flow")
        with self.building():
            table = describe_dispatches(module.operation)
            attach_dispatches(module.operation, table)
            by_sizes = not self._target.capabilities.is_gpu and takes_results
            if by_sizes:
                manifest = with_alone(manifest, table)
        nodes = dispatch_nodes(table)
        limits = DispatchLimits(self._target.capabilities, self._target.description, nodes)
        show(f"{len(nodes)} kernels ... ")
        self._run(invocation, module, "FromPhase", "flow", "ToPhase", "executable-sources")
        with self.building():
            bodies.put_back(module.operation)
        show("scheduled ... ")
        self._run(invocation, module, "FromPhase", "executable-sources", "ToPhase", "executable-targets")
        with self.building():
            limits.check_kernels(module.operation)
            state_spirv_versions(module.operation)
            keep_roundings(module.operation)
            joined: dict[str, list[list[str]]] = {}
            if by_sizes:
                limits_of_driver = self._target.capabilities.limits
                joined = join_dispatches(module.operation, joins(manifest, table), limits_of_driver)
                table = joined_rows(table, joined)
                attach_dispatches(module.operation, table)
                manifest = with_packed_steps(with_step_loops(with_alone(manifest, table)))
                set_reflection(module.operation, REFLECTION_KEY, manifest.to_json())
            if self._target.capabilities.is_gpu:
                target = dataclasses.replace(manifest.target, needs=device_needs(module.operation))
                manifest = dataclasses.replace(manifest, target=target)
                set_reflection(module.operation, REFLECTION_KEY, manifest.to_json())
            if levels:
                add_conditions(module.operation, levels)
        show("lowered ... ")
        self._run(invocation, module, "FromPhase", "executable-targets", "ToPhase", "hal")
        limits.check_counts(module.operation)
        if self._target.capabilities.is_gpu:
            with self.building():
                if self._target.name == "vulkan":
                    mark_in_order(module.operation)
                fill_empty_ranges(module.operation)
                if takes_results:  # else whoever calls expects kernels that are loaded with the module
                    load_side_by_side(module.operation)
        with self.building():
            add_step_loops(module.operation, manifest)
            add_packed_steps(module.operation, manifest)
            if levels:
                load_before_asking(module.operation)
        if self._target.native is not None:
            show(f"native code for {', '.join(self._target.native.names)} ... ")
            with self.building():
                add_native_code(module.operation, self._target.native)
        show("assembled ... ")
        self._run(invocation, module, "FromPhase", "hal", "ToPhase", "end")
        return CompiledCode(invocation, manifest, describe_joined(joined))

    def _run(self, invocation: Invocation, module: ir.Module, *phases: str) -> None:
        try:
            is_good = execute(invocation, *phases) and module.operation.verify()
        except ir.MLIRError as error:
            found: Any = error
            self._errors.extend((one.message, str(one.location)) for one in found.error_diagnostics)
            is_good = False
        if not is_good:
            raise self._failure("IREE could not compile the model")

    def _failure(self, what: str) -> LoweringError:
        message, location = self._errors[0] if self._errors else ("no diagnostic", "")
        named = _NAMED.search(location)
        message = " ".join(message.split())[:300]
        return LoweringError(
            f"{what}: {message}",
            where=f"node '{named[1]}'" if named and named[1] else None,
            hint="--dump-ir DIR keeps the IR for a report",
        )
