"""Runs one compiled export and prints one line of JSON: how far its logits are from the reference.

python -m tests.families.one FAMILY MODULE.vmfb
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from linattn.runtime import Program
from linattn.runtime.command import run_command

from tests.families.compare import LENGTHS, Comparison, Family, compare
from tests.families.noise import INT4_FACTOR, own_noise
from tests.tolerances import MODEL_LOGITS


def main() -> int:
    family, module = Family(sys.argv[1]), Path(sys.argv[2])
    with Program.load(module) as program:
        found = [compare(program, family, length) for length in LENGTHS]
        noise = own_noise(family, program) if family.kind == "int4" else None
    worst = max(found, key=lambda one: one.error if one.error == one.error else float("inf"))
    whole = Comparison(worst.error, worst.worst, sum(one.tokens for one in found), sum(one.of for one in found))
    limit = MODEL_LOGITS[family.kind] if noise is None else INT4_FACTOR * noise
    verdict = "right" if whole.is_right(family, limit) else "wrong"
    print(json.dumps({"verdict": verdict, "limit": limit, **vars(whole)}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command("run", main, debug=False))
