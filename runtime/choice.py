"""Which module of a bundle runs on which device of this machine, and why each other one does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .bundle import Bundle, BundledModule
from .discover import RANK, look_for
from .drivers import CPU_DRIVERS, DEVICE_URIS
from .errors import TargetError

T = TypeVar("T")


@dataclass(frozen=True)
class Passed:
    """What was not taken.

    Attributes:
        what: A target, a device or a module on a device.
        reason: Why not.
        failed: Whether it was tried and did not load, so that something less good was taken.
    """

    what: str
    reason: str
    failed: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.reason}"


@dataclass(frozen=True)
class Choice:
    """What `Program.load` took from a bundle.

    Attributes:
        module: File name of the module.
        device: URI of the device.
        passed: What was not taken, in the order in which it was looked at.
    """

    module: str
    device: str
    passed: tuple[Passed, ...]


def choose(
    bundle: Bundle,
    where: str,
    device: str | None,
    fits: Callable[[BundledModule, str], None],
    attempt: Callable[[BundledModule, str], T],
) -> tuple[T, Choice]:
    """Loads the first module that fits, on the best device there is.

    Args:
        bundle: What there is to choose from.
        where: The bundle's folder, for errors.
        device: The device that it must be; None: the best one, software Vulkan excepted.
        fits: Raises a `TargetError` where a module was compiled for other devices; opens nothing.
        attempt: Loads a module on a device; raises a `TargetError` where it does not load.

    Raises:
        TargetError: Nothing fits; the message has the reasons.
    """
    device = None if device is None else DEVICE_URIS.get(device, device)
    passed: list[Passed] = []
    targets = {module.target.name for module in bundle.modules}
    for target in RANK if device is None else [_target_of(device)]:
        modules = [module for module in bundle.modules if module.target.name == target]
        if not modules:
            passed.append(Passed(target, f"the bundle has modules for {', '.join(sorted(targets))} only"))
            continue
        for uri in [device] if device is not None else _usable(target, passed):
            for module in modules:
                tried = False
                try:
                    fits(module, uri)
                    tried = True
                    loaded = attempt(module, uri)
                except TargetError as error:
                    if device is not None and len(modules) == 1:
                        raise
                    passed.append(Passed(f"{module.file} on {uri}", str(error), tried))
                else:
                    later = RANK[RANK.index(target) + 1 :] if device is None else ()
                    passed += [Passed(other, f"{target} comes first") for other in later]
                    return loaded, Choice(module.file, uri, tuple(passed))
    reasons = "; ".join(str(row) for row in passed)
    raise TargetError(
        "no module of the bundle runs here", where=where, got=f"device {device}" if device else None, hint=reasons
    )


def _usable(target: str, passed: list[Passed]) -> Sequence[str]:
    """The devices of a target that are taken without being asked for."""
    found = look_for(target)
    passed += [Passed(row.uri or target, row.why_not) for row in found if row.why_not is not None]
    return [row.uri for row in found if row.why_not is None and row.uri is not None]


def _target_of(uri: str) -> str:
    """The target that runs on a device."""
    driver = uri.partition("://")[0]
    return "cpu" if driver in CPU_DRIVERS else driver
