"""linattn.runtime: run compiled modules and carry their state; needs only numpy and iree-base-runtime.

`Program.load("model.vmfb").session().run({"input_ids": ids})["logits"]` is the short form; README.md has the rest.
"""

from .choice import Choice
from .discover import FoundDevice, devices
from .errors import InputError, LinattnError, StateError, TargetError
from .generate import greedy
from .manifest import Manifest
from .program import Program
from .session import Session

__all__ = [
    "Choice",
    "FoundDevice",
    "InputError",
    "LinattnError",
    "Manifest",
    "Program",
    "Session",
    "StateError",
    "TargetError",
    "devices",
    "greedy",
]
