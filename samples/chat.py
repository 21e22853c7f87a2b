"""Chats in the terminal; /reset forgets, Ctrl-D ends.

python samples/chat.py model.vmfb --temperature 0.7
"""

from __future__ import annotations

import argparse

from linattn import Program, Sampling, TextGenerator


def main() -> None:
    """Reads a line, answers it, and keeps both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", metavar="MODEL.vmfb")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=200)
    options = parser.parse_args()

    generator = TextGenerator(Program.load(options.module))
    sampling = Sampling(temperature=options.temperature)
    messages: list[dict[str, str]] = []
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line == "/reset":
            messages.clear()
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        for piece in generator.chat(messages, max_tokens=options.max_tokens, sampling=sampling):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
