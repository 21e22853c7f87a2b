"""Which subjects a run has: linattn's targets and strategies, and the peers; what is absent, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linattn.runtime.bundle import read_bundle
from linattn.runtime.drivers import DEVICE_URIS
from linattn.runtime.errors import InputError, LinattnError
from linattn.runtime.loading import read_manifest
from linattn.runtime.module import Module

from .lazy import compiler_side
from .machine import missing_device
from .op_models import COPY, MATMUL, build_copy, build_matmul
from .process import Subject

Note = Callable[[str], None]
TARGETS = tuple(DEVICE_URIS)


@dataclass(frozen=True)
class TargetChoice:
    """One of `--targets`: `cpu`, `cuda:sm_89` (what to compile for), `cpu@local-sync` (which device runs it).

    Attributes:
        name: `cpu`, `cuda` or `vulkan`.
        gpu: The GPU architecture to compile for, None for the default.
        device: IREE device URI, None for the default.
    """

    name: str
    gpu: str | None = None
    device: str | None = None

    @property
    def label(self) -> str:
        """What its subjects are called: the target, and the device where one was named."""
        return f"{self.name}@{self.device}" if self.device else self.name


@dataclass
class Absences:
    """What could not be measured, each with its reason."""

    rows: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(self, name: str, reason: object, **where: Any) -> None:
        """Notes a subject (and in which case: `tokens=64`) that is missing."""
        row = {"name": name, **where, "reason": " ".join(str(reason).split())}
        if row not in self.rows:
            self.rows.append(row)


def parse_targets(text: str) -> list[TargetChoice]:
    """Reads `cpu,cpu@local-sync,cuda:sm_89`.

    Raises:
        InputError: An unknown or repeated target.
    """
    choices: list[TargetChoice] = []
    for part in split(text, "--targets"):
        compiled, _, device = part.partition("@")
        name, _, gpu = compiled.partition(":")
        if name not in TARGETS:
            raise InputError("unknown target", where="--targets", got=repr(name), expected=" | ".join(TARGETS))
        choice = TargetChoice(name, gpu or None, device or None)
        if any(other.label == choice.label for other in choices):
            raise InputError("given twice", where="--targets", got=choice.label)
        choices.append(choice)
    return choices


def split(text: str, option: str) -> list[str]:
    """A comma list without its empty parts.

    Raises:
        InputError: Nothing in it.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError("nothing given", where=option, got=repr(text))
    return parts


def file_name(name: str) -> str:
    """A subject's name as a file name."""
    return "".join(char if char.isalnum() or char in "._-" else "-" for char in name)


def files_of(model: Path) -> list[Path]:
    """The files that a model is read from; what is wrong with it, if anything, is said where it is measured."""
    if model.is_dir():
        return [model / name for name in read_bundle(model).names]
    if model.suffix == ".vmfb" and model.is_file():
        parameters = read_manifest(Module(model)).parameters
        return [model, *([model.parent / parameters.file] if parameters else [])]
    if model.suffix == ".onnx" and model.is_file():
        with compiler_side():
            from linattn.frontend.model import load_model
        return list(load_model(model).files)
    return [model]


def compile_file(model: str | Path, output: Path, target: TargetChoice, strategy: str | None, **options: Any) -> Any:
    """Compiles a model; returns frontend's `CompiledModel`, the module in `output`.

    Args:
        model: Path of the ONNX model.
        output: Module to write.
        target: What to compile for.
        strategy: Forces a strategy; None: as linattn chooses.
        **options: Further fields of `CompileOptions`.

    Raises:
        LinattnError: The model does not compile so, or the compiler is not installed.
    """
    with compiler_side():
        from linattn.frontend import CompileOptions, compile_model
    asked = CompileOptions(target=target.name, gpu_target=target.gpu, strategy=strategy, **options)
    return compile_model(Path(model), asked, output=output)


def start(name: str, factory: str, arguments: Mapping[str, Any]) -> Subject:
    """Starts a subject of this package: `factory` is `module:Class` inside it."""
    return Subject(name, f"{__package__}.{factory}", arguments)


def open_targets(
    choices: Sequence[TargetChoice], folder: Path, ceilings: bool, absent: Absences, note: Note
) -> dict[str, dict[str, Any]]:
    """Looks at the device of each target, in a process of its own.

    Args:
        choices: The targets.
        folder: Where the probes' modules may lie.
        ceilings: Whether to measure the copy bandwidth and the FMA rate.
        absent: Takes the targets that cannot run here.
        note: Told what happens.

    Returns:
        Target -> name, driver, version, ceilings; only those that are there.
    """
    devices: dict[str, dict[str, Any]] = {}
    for choice in choices:
        reason = missing_device(choice.name)
        if reason is not None:
            absent.add(choice.label, reason)
            continue
        note(f"look at {choice.label}" + (" and measure its ceilings" if ceilings else ""))
        try:
            devices[choice.label] = _look(choice, folder, ceilings)
        except LinattnError as error:
            absent.add(choice.label, error)
    return devices


def raise_ceilings(
    choices: Sequence[TargetChoice], devices: Mapping[str, dict[str, Any]], folder: Path, note: Note
) -> None:
    """Measures the ceilings once more, after the subjects, and keeps the higher ones: it may have been busy."""
    for choice in choices:
        if choice.label not in devices:
            continue
        note(f"measure the ceilings of {choice.label} again")
        with suppress(LinattnError):  # what was found before stays
            again, first = _look(choice, folder, True)["ceilings"], devices[choice.label]["ceilings"]
            for key in ("copy_bytes_per_s", "fma_flop_per_s", "matrix_flop_per_s"):
                first[key] = max(first[key], again[key]) if first[key] else again[key]


def _look(choice: TargetChoice, folder: Path, ceilings: bool) -> dict[str, Any]:
    probe = start(choice.label, "machine:Probe", {"target": choice.name, "device": choice.device})
    try:
        found: dict[str, Any] = probe.call("describe")
        found["gpu_target"] = choice.gpu
        if ceilings:
            found["ceilings"] = probe.call("ceilings", models=_probe_models(choice, folder))
        return found
    finally:
        probe.close()


def _probe_models(choice: TargetChoice, folder: Path) -> dict[str, str]:
    if choice.name == "cpu":
        return {}
    models = {f"copy_{n}": build_copy(n) for n in COPY} | {f"matmul_{n}": build_matmul(n) for n in MATMUL}
    paths: dict[str, str] = {}
    for name, data in models.items():
        onnx, module = folder / f"{name}.onnx", folder / f"{name}-{choice.name}.vmfb"
        if not module.exists():
            onnx.write_bytes(data)
            compile_file(onnx, module, choice, None)
        paths[name] = str(module)
    return paths


def close_all(subjects: Sequence[Subject]) -> None:
    """Ends every subject's process."""
    for subject in subjects:
        with suppress(LinattnError, OSError):
            subject.close()
