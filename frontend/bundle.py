"""A bundle: one folder with a module for each of several machines and one copy of their weights.

The targets are compiled one after another. What a target packs for itself is put into a file as soon as it is compiled,
so that the memory of one compile is all that is needed.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from linattn.runtime.bundle import INDEX, Bundle, BundledModule, describe_file, read_bundle
from linattn.runtime.errors import InputError, LinattnError, TargetError
from linattn.runtime.outputs import check_outputs, partial_folder

from .compile import compile_model
from .lower.parameters import write_parameters
from .model import load_model
from .options import CompiledModel, CompileOptions
from .plan.report import BUNDLE_WEIGHTS, BundleReport, CompileReport, Progress, write_report
from .process.guard import last_net
from .targets import resolve_target
from .targets.names import machine_name


@dataclass
class _Weights:
    """The union of the modules' weights, by content.

    Attributes:
        where: The bundle, for errors.
        spill: Where to put those that lie in memory.
        mapped: Key -> values that lie in a file of the model.
        spilled: Key -> place in ``spill``, in bytes, and number of bytes.
        readers: Key -> the modules that read it.
    """

    where: str
    spill: BinaryIO
    mapped: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict[str, "np.ndarray[Any, Any]"])
    spilled: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    readers: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, module: str, archive: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take in the weights of a module."""
        for key, array in archive.items():
            if key in self.readers:
                self.readers[key].append(module)
                continue
            self.readers[key] = [module]
            if _is_mapped(array):
                self.mapped[key] = array
            else:
                self.spilled[key] = self.spill.tell(), array.nbytes
                self._write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _write(self, data: memoryview) -> None:
        try:
            self.spill.write(data)
            self.spill.flush()
        except OSError as error:
            raise LinattnError("the weights cannot be written", where=self.where, got=error.strerror) from error

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Key -> values, all of them in files."""
        whole = np.memmap(self.spill, np.uint8, "r") if self.spill.tell() else np.zeros(0, np.uint8)
        return self.mapped | {key: whole[start : start + size] for key, (start, size) in self.spilled.items()}

    def bytes_of(self, chosen: Callable[[list[str]], bool]) -> int:
        """Bytes of the weights with such readers."""
        keys = [key for key, readers in self.readers.items() if chosen(readers)]
        return sum(self.mapped[key].nbytes if key in self.mapped else self.spilled[key][1] for key in keys)


def _is_mapped(array: np.ndarray[Any, Any]) -> bool:
    """Whether its bytes lie in a file: a weight of the model as it is."""
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    return isinstance(base, np.memmap)


@last_net
def compile_bundle(
    source: str | Path,
    machines: Sequence[CompileOptions],
    output: str | Path,
    progress: Callable[[str], Progress] | None = None,
) -> BundleReport:
    """Compile an ONNX model for several machines, into one folder with one copy of the weights.

    Args:
        source: Path of the model.
        machines: What to compile for; of several for one target the better one first.
        output: The folder to write; it appears whole or not at all. Another bundle of that name is replaced.
        progress: Makes what is told of the stages of a module, by its file name.

    Raises:
        UnsupportedModelError: if the model is damaged or cannot be compiled.
        TargetError: if a target or one of its options is not known.
        LoweringError: if a forced strategy is not legal or IREE fails.
        InputError: if there is something else at ``output``.
    """
    folder, report_file = Path(output), machines[0].report
    check_output(folder)
    new = {} if folder.is_dir() else {"-o": folder}
    descriptions = [options.gpu_target for options in machines if options.gpu_target is not None]
    check_outputs({**new, "--report": report_file}, [*load_model(source).files, *descriptions])
    for options in machines:
        resolve_target(options.target, options.machine)
    if machines[0].dry_run:
        return _dry_run(source, machines, folder, progress)
    reports: dict[str, CompileReport] = {}
    compiled: dict[str, CompiledModel] = {}
    with _new_folder(folder) as building:
        with tempfile.TemporaryFile(dir=building) as spill:
            weights = _Weights(str(folder), spill)
            for file, options in _named(machines).items():
                dump = options.dump_ir / file.removesuffix(".vmfb") if options.dump_ir else None
                each = dataclasses.replace(options, parameters=building / BUNDLE_WEIGHTS, dump_ir=dump, report=None)
                compiled[file] = compile_model(
                    source,
                    each,
                    output=building / file,
                    progress=progress(file) if progress else None,
                    take_weights=lambda archive, file=file: weights.add(file, archive),
                )
                reports[file] = compiled[file].report
                reports[file].output = str(folder / file)
            write_parameters(building / BUNDLE_WEIGHTS, weights.arrays())
            report = BundleReport(
                str(folder),
                reports,
                weight_bytes=weights.bytes_of(bool),
                shared_bytes=weights.bytes_of(lambda readers: len(readers) > 1),
                own_bytes={file: weights.bytes_of(lambda readers, file=file: readers == [file]) for file in reports},
            )
        manifest = next(iter(compiled.values())).manifest
        bundle = Bundle(
            model_name=manifest.model_name,
            model_sha256=manifest.model_sha256,
            weights=describe_file(building / BUNDLE_WEIGHTS),
            modules=tuple(
                BundledModule(**dataclasses.asdict(describe_file(building / file)), target=result.manifest.target)
                for file, result in compiled.items()
            ),
            producer=manifest.producer or {},
        )
        (building / INDEX).write_text(bundle.to_json())
    if report_file is not None:
        write_report(report_file, report.to_dict())
    return report


def _dry_run(
    source: str | Path, machines: Sequence[CompileOptions], folder: Path, progress: Callable[[str], Progress] | None
) -> BundleReport:
    """What would be compiled for each machine; of the bundle nothing is written."""
    reports: dict[str, CompileReport] = {}
    for file, options in _named(machines).items():
        each = dataclasses.replace(options, report=None)
        reports[file] = compile_model(source, each, progress=progress(file) if progress else None).report
    report = BundleReport(str(folder), reports)
    if machines[0].report is not None:
        write_report(machines[0].report, report.to_dict())
    return report


def check_output(folder: Path) -> None:
    """Refuse to put a bundle where something else is.

    Raises:
        InputError: if there is a file, or a folder that is not a bundle or holds other things too.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    hint = "choose another name, or remove it first"
    if folder.is_symlink() or not folder.is_dir():
        raise InputError("not a folder to put a bundle in the place of", where=str(folder), hint=hint)
    if not (folder / INDEX).is_file():
        raise InputError("a folder that is not a bundle is not replaced", where=str(folder), hint=hint)
    try:
        known = {INDEX, *read_bundle(folder).names}
    except TargetError as error:
        raise InputError("a damaged bundle is not replaced", where=str(folder), got=error, hint=hint) from error
    others = sorted(path.name for path in folder.iterdir() if path.name not in known)
    if others:
        got = f"{', '.join(others[:3])} beside it"
        raise InputError("only a bundle is replaced", where=str(folder), got=got, hint=hint)


@contextmanager
def _new_folder(folder: Path) -> Generator[Path]:
    """Inside: an empty folder beside the named one, which it becomes in the end; gone after an error."""
    with partial_folder(folder) as building:
        yield building
        if folder.exists():
            check_output(folder)
            old = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.old")  # no partial one: nobody may remove it
            os.rename(folder, old)
            try:
                os.rename(building, folder)
            except BaseException:
                os.rename(old, folder)
                raise
            shutil.rmtree(old)
        else:
            os.rename(building, folder)


def _named(machines: Sequence[CompileOptions]) -> dict[str, CompileOptions]:
    """A file name for each module: the target, and what tells it from another one of that target."""
    names: dict[str, CompileOptions] = {}
    for options in machines:
        name = options.target
        if sum(other.target == name for other in machines) > 1:
            name = machine_name(name, options.machine)
        while f"{name}.vmfb" in names:
            name += "x"
        names[f"{name}.vmfb"] = options
    return names
