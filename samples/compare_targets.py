"""Compiles a model for every target that this machine has a device for, and compares speed and results.

    python samples/compare_targets.py model.onnx
    python samples/compare_targets.py model.onnx --targets cpu,vulkan

A first look; linattn-bench measures with more care, beside other programs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from linattn import CompileOptions, Program, compile, devices


def main() -> None:
    """A line a target: seconds to compile and to load, tokens per second, difference of the logits from the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL.onnx", type=Path)
    found = list(dict.fromkeys(row.target for row in devices() if row.uri))
    parser.add_argument("--targets", default=",".join(sorted(found)), help="default: %(default)s, what is here")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()

    print(f"{'target':8}{'compile s':>11}{'load s':>9}{'prefill/s':>11}{'decode/s':>10}{'difference':>12}")
    reference = None
    for target in options.targets.split(","):
        with tempfile.TemporaryDirectory() as folder:
            module, start = Path(folder) / f"{target}.vmfb", time.perf_counter()
            sizes = CompileOptions(target, max_context=2 * options.tokens, prefill_blocks=(options.tokens,))
            compile(options.model, sizes, output=module)
            compiled = time.perf_counter()
            with Program.load(module, device=target) as program:
                loaded = time.perf_counter()
                logits, prefill, decode = measure(program, options.tokens)
        reference = logits if reference is None else reference
        difference = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
        print(
            f"{target:8}{compiled - start:11.1f}{loaded - compiled:9.2f}{prefill:11.0f}{decode:10.0f}{difference:12.1e}"
        )


def measure(program: Program, tokens: int) -> tuple[np.ndarray, float, float]:
    """Logits of a prompt, and tokens per second of its second reading and of the steps after it."""
    (ids,) = [spec for spec in program.inputs if spec.role == "tokens"]
    (output,) = [spec.name for spec in program.outputs if spec.role == "logits"]
    highest = ids.bounds[1] if ids.bounds else 1
    prompt = np.random.default_rng(0).integers(0, highest + 1, (1, tokens))
    session = program.session()
    session.run({ids.name: prompt})
    session.run({ids.name: prompt[:, :1]})  # both kinds of call have run once
    session.reset()
    start = time.perf_counter()
    logits = session.run({ids.name: prompt})[output]
    read = time.perf_counter()
    for _ in range(tokens):
        session.run({ids.name: prompt[:, :1]})
    return logits, tokens / (read - start), tokens / (time.perf_counter() - read)


if __name__ == "__main__":
    main()
