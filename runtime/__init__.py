"""linattn.runtime: run compiled modules and carry their state; needs only numpy and iree-base-runtime.

`Program.load("model.vmfb").session().run({"input_ids": ids})["logits"]` is the short form; README.md has the rest.
"""

from .choice import Choice
from .discover import FoundDevice, devices
from .dlpack import DeviceTensor
from .errors import InputError, LinattnError, StateError, TargetError
from .generation.loop import generate, greedy, greedy_rows
from .generation.sampling import Sampling
from .manifest import Manifest
from .program import Program
from .session import Session
from .snapshot import Snapshot
from .text.generator import TextGenerator, TextStream
from .usage import MemoryUse

__all__ = [
    "Choice",
    "DeviceTensor",
    "FoundDevice",
    "InputError",
    "LinattnError",
    "Manifest",
    "MemoryUse",
    "Program",
    "Sampling",
    "Session",
    "Snapshot",
    "StateError",
    "TargetError",
    "TextGenerator",
    "TextStream",
    "devices",
    "generate",
    "greedy",
    "greedy_rows",
]
