"""Asks several questions about one text, which is read once; each answer goes on from a fork of the session.

    python samples/prefixes.py model.vmfb --text "A long text." "What?" "Who?"

For pages of text this is the difference between seconds and milliseconds for every question but the first.
"""

from __future__ import annotations

import argparse
import time

from linattn import Program, TextGenerator, greedy


def main() -> None:
    """Reads the text, then answers each question and says how long that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", metavar="MODEL.vmfb")
    parser.add_argument("questions", metavar="QUESTION", nargs="+")
    parser.add_argument("--text", required=True)
    parser.add_argument("--max-tokens", type=int, default=20)
    options = parser.parse_args()

    with Program.load(options.module) as program:
        tokenizer = TextGenerator(program).tokenizer
        (tokens,) = [spec.name for spec in program.inputs if spec.role == "tokens"]
        base = program.session()
        start = time.perf_counter()
        base.run({tokens: [tokenizer.encode(options.text)]}, logits="last")
        print(f"read {base.position} tokens in {time.perf_counter() - start:.3f} s")
        for question in options.questions:
            start = time.perf_counter()
            ids = tokenizer.encode(question, special=False)
            answer = tokenizer.decode(list(greedy(base.fork(), ids, options.max_tokens)))
            print(f"{question!r} -> {answer!r} in {time.perf_counter() - start:.3f} s")


if __name__ == "__main__":
    main()
