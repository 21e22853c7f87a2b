"""The SPIR-V of a compiled module, and what Khronos' validator says of it; as a script, for every device and model.

python tests/spirv.py adreno,valhall,xe,rdna3,apple,hopper ../shared/models/*/model.onnx
"""

from __future__ import annotations

import itertools
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from linattn.frontend import CompileOptions, compile_model
from linattn.runtime.errors import LinattnError

_MAGIC = struct.pack("<I", 0x07230203)
_WORD = 4
_LEAST_WORDS = 5


def codes(module: bytes) -> list[bytes]:
    """Each distinct SPIR-V module of a ``.vmfb``: a vector of words in a flatbuffer, its length before it."""
    found: set[bytes] = set()
    at = module.find(_MAGIC)
    while at >= 0:
        words = struct.unpack_from("<I", module, at - _WORD)[0]
        if _LEAST_WORDS <= words <= (len(module) - at) // _WORD:
            found.add(module[at : at + words * _WORD])
        at = module.find(_MAGIC, at + _WORD)
    return sorted(found)


def uses_matrices(code: bytes) -> bool:
    """Whether a kernel declares cooperative matrices, which validators before SPIRV-Tools 2023.5 do not know."""
    words = struct.unpack(f"<{len(code) // _WORD}I", code)
    capability = (2 << 16) | 17  # OpCapability, two words
    return (capability, 6022) in itertools.pairwise(words[_LEAST_WORDS:])


def faults(module: bytes) -> list[str]:
    """What ``spirv-val`` finds wrong with the code of a module, a line for each kernel that is not valid.

    Kernels with cooperative matrices are left out where the validator is too old for them (Debian 12's is).
    """
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="linattn-spirv-") as folder:
        for index, code in enumerate(codes(module)):
            path = Path(folder) / f"{index}.spv"
            path.write_bytes(code)
            command = ["spirv-val", "--target-env", "vulkan1.3", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            too_old = "Invalid capability operand: 6022" in done.stdout + done.stderr and uses_matrices(code)
            if done.returncode and not too_old:
                found.append((done.stdout + done.stderr).strip().splitlines()[0])
    return found


def main(devices: str, *models: str) -> int:
    """Compile every model for every device, with the sizes of prompts that have kernels of their own."""
    bad = 0
    for device in devices.split(","):
        for model in models:
            start = time.monotonic()
            options = CompileOptions(target="vulkan", gpu_target=device, prefill_blocks=(512, 64, 8), max_context=1024)
            try:
                module = compile_model(model, options).module
                wrong = faults(module)
                matrices = sum(map(uses_matrices, codes(module)))
                said = f"{len(codes(module))} kernels ({matrices} with cooperative matrices), {len(wrong)} not valid"
                said += f" {sorted(set(wrong))[:3]}"
            except LinattnError as error:
                wrong, said = [str(error)], f"error: {error}"
            bad += bool(wrong)
            name = Path(model).parent.name
            print(f"{device} {name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
    return min(bad, 1)


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
