"""A tokenizer for the tiny model: a token a byte, of the same id, as the byte-level tokenizers of real models begin.

python samples/byte_tokenizer.py FOLDER    # writes tokenizer.json, tokenizer_config.json, generation_config.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TEMPLATE = "{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def byte_characters() -> list[str]:
    """The character that stands for each byte, by GPT-2's table: its own where it is printable, else one after 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def tokenizer_json() -> dict[str, Any]:
    """The content of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(byte_characters())}, "merges": []},
    }


def write(folder: Path, *, template: str | None = TEMPLATE, **generation: Any) -> Path:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    write(parser.parse_args().folder)
