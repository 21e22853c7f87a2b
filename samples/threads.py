"""Continues several prompts at once: a session in each thread, the weights there once.

    python samples/threads.py model.vmfb "Once upon" "Long ago" "Tomorrow"

Calls are let in one by one, so threads wait for each other and not for the slowest prompt.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from linattn import Program, TextGenerator


def main() -> None:
    """Prints each answer in the order of the prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", metavar="MODEL.vmfb")
    parser.add_argument("prompts", metavar="PROMPT", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=30)
    options = parser.parse_args()

    with Program.load(options.module) as program, ThreadPoolExecutor(len(options.prompts)) as threads:

        def answer(prompt: str) -> str:
            return "".join(TextGenerator(program).generate(prompt, max_tokens=options.max_tokens))

        for prompt, text in zip(options.prompts, threads.map(answer, options.prompts), strict=True):
            print(f"{prompt!r} -> {text!r}")


if __name__ == "__main__":
    main()
