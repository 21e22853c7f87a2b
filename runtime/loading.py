"""From files to a module on a device: the checks before, and what is taken of a bundle."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from .bundle import INDEX, BundledModule, read_bundle
from .choice import Choice, choose
from .cpu import check_cpu
from .device import Device
from .drivers import CPU_DRIVERS, DEVICE_URIS, has_worker_threads
from .errors import TargetError
from .gpu import check_gpu
from .manifest import REFLECTION_KEY, STEPS_KEY, Manifest
from .manifest_target import Target
from .module import Module
from .opening import open_device

_log = logging.getLogger("linattn.runtime")
WAITING = "%s: loading on %s; %s"
"""What the log says before a load that may take seconds; afterwards nothing could be said until it is over."""


@dataclass(frozen=True)
class Loaded:
    """A module on a device.

    Attributes:
        module: It.
        manifest: What it says about itself.
        choice: Why it was taken, if it is one of a bundle.
    """

    module: Module
    manifest: Manifest
    choice: Choice | None = None


def load(
    source: str | os.PathLike[str] | bytes,
    device: str | None,
    parameters: str | os.PathLike[str] | None,
    threads: int | None,
    verify: bool,
) -> Loaded:
    """See `Program.load`."""
    path = None if isinstance(source, (bytes, bytearray, memoryview)) else Path(source)
    if path is not None and path.is_dir():
        if parameters is not None:
            got = f"parameters {os.fspath(parameters)}"
            raise TargetError("a bundle has its weights inside", where=str(path), got=got)
        return _load_bundle(path, device, threads, verify)
    if path is not None and not path.is_file():
        raise TargetError("no such file", where=str(path))
    blob = path if path is not None else bytes(source)  # pyright: ignore[reportArgumentType]
    module = Module(blob, verify=verify)
    manifest = read_manifest(module)
    opened = open_device(device or manifest.target.device, threads)
    check_target(module.where, manifest.target, opened.uri)
    found = _find_parameters(module.where, manifest, path, parameters)
    if opened.driver not in CPU_DRIVERS:
        _log.info(WAITING, module.where, opened.uri, _compiled_first(manifest.target))
    module.link(opened, found, device_alone(manifest, device))
    return Loaded(module, manifest)


def _compiled_first(target: Target) -> str:
    """What a GPU's driver does while its user waits."""
    compiling = "driver compiles the kernels, which takes seconds the first time"
    if target.native:
        return f"native code for {', '.join(target.native)}: on another GPU the {compiling}"
    return f"the {compiling}"


def device_alone(manifest: Manifest, device: str | None) -> Device | None:
    """The device of those calls that the calling thread runs by itself (`EntryPoint.alone`); None: there are none.

    Args:
        manifest: Of the module.
        device: What the user has named: `local-task` is workers for every call, `local-sync` none.
    """
    is_open = device is None or device in DEVICE_URIS
    small = manifest.target.name == "cpu" and any(entry.alone for entry in manifest.entry_points)
    return open_device("local-sync") if is_open and small else None


def _load_bundle(folder: Path, device: str | None, threads: int | None, verify: bool) -> Loaded:
    bundle = read_bundle(folder)

    def fits(entry: BundledModule, uri: str) -> None:
        check_target(entry.file, entry.target, uri)

    def attempt(entry: BundledModule, uri: str) -> Loaded:
        takes_threads = device is not None or has_worker_threads(uri)
        name = "cpu" if uri == DEVICE_URIS["cpu"] and device != uri else uri
        return load(folder / entry.file, name, None, threads if takes_threads else None, verify)

    loaded, choice = choose(bundle, str(folder), device, fits, attempt)
    entry = next(entry for entry in bundle.modules if entry.file == choice.module)
    told, found = (entry.target, bundle.model_sha256), (loaded.manifest.target, loaded.manifest.model_sha256)
    if told != found:
        message = f"another module than {INDEX} says"
        raise TargetError(message, where=str(folder / entry.file), got=found, expected=told, hint="compile it again")
    _log.info("%s: took %s on %s%s", folder, choice.module, choice.device, "".join(f"; {row}" for row in choice.passed))
    for row in choice.passed:
        if row.failed:
            warnings.warn(f"{folder}: {row}; took {choice.module} on {choice.device}", RuntimeWarning, stacklevel=4)
    return Loaded(loaded.module, loaded.manifest, choice)


def read_manifest(module: Module) -> Manifest:
    """Finds and checks the manifest of a module.

    Raises:
        TargetError: There is none, it is broken, or it names a function that the module does not have.
    """
    texts = [module.reflection(name).get(REFLECTION_KEY) for name in module.functions]
    text = next((text for text in texts if text), None)
    if text is None:
        hint = "compile the model with linattn-compile"
        raise TargetError("an IREE module without a linattn manifest", where=module.where, hint=hint)
    manifest = Manifest.from_json(text, module.where)
    entries = [name for one in manifest.entry_points for name in (*one.symbols, one.steps, one.packed)]
    callers = {one.steps: one.draw or one.token for one in manifest.entry_points}
    callers |= {one.packed: one.symbol for one in manifest.entry_points}
    for symbol in (name for name in (*entries, manifest.finite) if name):
        if symbol not in module.functions:
            expected = ", ".join(name for name in module.functions if "$" not in name and name != "__init")
            raise TargetError("missing entry point", where=module.where, got=symbol, expected=expected)
        called = callers.get(symbol)
        if called is not None and module.reflection(symbol).get(STEPS_KEY) != called:
            got = module.reflection(symbol).get(STEPS_KEY, "none")
            raise TargetError(f"'{symbol}' calls another function", where=module.where, got=got, expected=called)
        specs, results = module.result_specs(symbol), len(manifest.outputs) + len(manifest.states)
        if symbol == manifest.finite:
            results = sum("float" in spec.dtype for spec in manifest.states)
            if specs is None:
                raise TargetError(f"'{symbol}' takes no memory for its results", where=module.where)
        if specs is not None and (len(specs) != results or f"{symbol}$async" not in module.functions):
            message = f"the results of '{symbol}' are not those of the manifest"
            raise TargetError(message, where=module.where, got=len(specs), expected=results)
    return manifest


def check_target(where: str, target: Target, uri: str) -> None:
    """Refuses a module on a device that it was not compiled for; opens nothing.

    Args:
        where: The module, for errors.
        target: What it was compiled for.
        uri: The device.

    Raises:
        TargetError: It would not load there, or compute wrong numbers.
    """
    wanted, driver = target.device.partition("://")[0], uri.partition("://")[0]
    if wanted != driver and not (wanted in CPU_DRIVERS and driver in CPU_DRIVERS):
        hint = "leave the device out, or compile with --target for this one"
        got = f"device {uri}"
        raise TargetError(f"compiled for {target.name}", where=where, got=got, expected=wanted, hint=hint)
    check_cpu(where, target)
    check_gpu(where, target, uri)


def _find_parameters(
    where: str, manifest: Manifest, path: Path | None, given: str | os.PathLike[str] | None
) -> tuple[str, Path] | None:
    if manifest.parameters is None:
        if given is not None:
            raise TargetError("the module has its weights inside", where=where, got=f"parameters {os.fspath(given)}")
        return None
    if given is None and path is None:
        raise TargetError("weights are in a file of their own", where=where, hint="pass parameters=FILE.irpa")
    file = Path(given) if given is not None else path.parent / manifest.parameters.file  # pyright: ignore[reportOptionalMemberAccess]
    if not file.is_file():
        raise TargetError("no such parameter file", where=str(file), hint="put it beside the module or pass parameters")
    return manifest.parameters.scope, file
