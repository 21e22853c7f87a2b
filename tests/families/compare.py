"""The tiny exports of other model families: what ONNX Runtime says of each, and how far a session is from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from linattn.runtime import Program

from tests.conftest import MODELS
from tests.tolerances import MODEL_LOGITS, relative_norm

FAMILIES = MODELS / "families"
LENGTHS = (1, 5, 65)
TOKENS = 16


@dataclass(frozen=True)
class Family:
    """One export; its folder's name says what it is."""

    name: str

    @property
    def model(self) -> Path:
        return FAMILIES / self.name / "model.onnx"

    @property
    def parts(self) -> tuple[str, str, str]:
        """Family, exporter, flavour."""
        family, _, rest = self.name.partition("--")
        exporter, _, flavour = rest.partition("-")
        return family, exporter, flavour

    @property
    def kind(self) -> str:
        """What it computes in, a key of `MODEL_LOGITS`."""
        flavour = f"-{self.parts[2]}-"
        return next((kind for kind in ("int4", "bf16", "f16") if kind in flavour.replace("fp16", "f16")), "f32")

    @property
    def expected(self) -> dict[str, np.ndarray]:
        """ONNX Runtime's logits and tokens of this file, or of its f32 sibling where it cannot run this one."""
        return _expected(FAMILIES / self.name)

    def feed(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """What the model takes for token ids [1, T]."""
        embed = self.expected.get("embed")
        return {"input_ids": ids} if embed is None else {"inputs_embeds": embed[ids]}


@dataclass(frozen=True)
class Comparison:
    """How far a session's logits are from the reference.

    Attributes:
        error: The largest relative norm of a prompt's logits or of one step's.
        worst: Where that is.
        tokens: Greedy tokens that equal the reference's, of all prompts.
        of: How many there are.
    """

    error: float
    worst: str
    tokens: int
    of: int

    def is_right(self, family: Family, limit: float | None = None) -> bool:
        """Within ``limit`` (None: the table's); in f32 every token is the reference's too."""
        limit = MODEL_LOGITS[family.kind] if limit is None else limit
        return self.error < limit and (family.kind != "f32" or self.tokens == self.of)


def families() -> list[str]:
    """The names of all folders."""
    return sorted(path.parent.name for path in FAMILIES.glob("*/model.onnx"))


def compare(program: Program, family: Family, length: int) -> Comparison:
    """Runs a prompt and the reference's greedy tokens in a session.

    The reference's tokens are fed whatever the session's own would be, so that one near tie does not make all that
    follows another text; in f32 they have to be the same.
    """
    want = family.expected
    tokens = want[f"greedy_{length}"].ravel()[:TOKENS]
    session = program.session()
    logits = session.run(family.feed(want[f"ids_{length}"]))["logits"]
    errors = {f"prompt of {length}": relative_norm(logits, want[f"logits_{length}"])}
    same = 0
    for i, token in enumerate(tokens):
        same += int(logits[0, -1].argmax() == token)
        logits = session.run(family.feed(np.array([[token]])))["logits"]
        errors[f"step {i + 1} after {length}"] = relative_norm(logits[0, 0], want[f"steps_{length}"][i])
    worst = max(errors, key=lambda key: np.inf if np.isnan(errors[key]) else errors[key])
    return Comparison(errors[worst], worst, same, len(tokens))


@cache
def _expected(folder: Path) -> dict[str, np.ndarray]:
    own = folder / "ort_expected.npz"
    with np.load(own if own.exists() else folder / "sibling_expected.npz") as arrays:
        return dict(arrays)
