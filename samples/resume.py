"""Reads a text piece by piece, over as many runs as you like: the session lies in a file between them.

    python samples/resume.py model.vmfb story.state --text "Once upon a time"
    python samples/resume.py model.vmfb story.state --text " there was" --generate 20

The file may go to another machine, and on with a module for another target. It needs the package safetensors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from linattn import Program, Session, TextGenerator, greedy


def main() -> None:
    """Goes on where the file says, or starts; saves, and shows what would follow."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", metavar="MODEL.vmfb")
    parser.add_argument("state", metavar="FILE.state", type=Path)
    parser.add_argument("--text", required=True)
    parser.add_argument("--generate", metavar="N", type=int, default=10)
    options = parser.parse_args()

    with Program.load(options.module) as program:
        tokenizer = TextGenerator(program).tokenizer
        (tokens,) = [spec.name for spec in program.inputs if spec.role == "tokens"]
        is_new = not options.state.exists()
        session = program.session() if is_new else Session.load(program, options.state)
        print(f"{session.position} tokens known")
        *ids, last = tokenizer.encode(options.text, special=is_new)
        session.run({tokens: [ids]}, logits="last")
        following = session.fork()  # what is only shown does not go into the file
        print(repr(tokenizer.decode(list(greedy(following, [last], options.generate)))))
        session.run({tokens: [[last]]}, logits="last")
        session.save(options.state)
        print(f"{session.position} tokens in {options.state}, {options.state.stat().st_size} bytes")


if __name__ == "__main__":
    main()
