"""Changed bytes of a compiled module: found by its seal when it is loaded (checked whole), or of no consequence."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from damage import damage_bytes
from linattn.runtime import Program
from tiny_hybrid import Hybrid, reference

IDS = np.array([[1, 5, 2, 7]])


def prepare() -> bytes:
    """The whole module."""
    return Hybrid().compile()


def case(rng: random.Random, folder: Path) -> str:
    """Damage the file; what loads all the same gives the right logits."""
    path = folder / "model.vmfb"
    path.write_bytes(damage_bytes(rng, prepare()))
    with Program.load(path if rng.random() < 0.5 else path.read_bytes(), "local-sync", verify=True) as program:
        found = program.session().run({"input_ids": IDS})["logits"]
    np.testing.assert_allclose(found, reference(IDS)[0])
    return "ran"
