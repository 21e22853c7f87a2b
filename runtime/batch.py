"""Prompts of different lengths in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .arrays import token_ids
from .device import HostArray
from .engine import engine_of
from .errors import InputError, require_list
from .rows import Row, check_lengths, gather
from .session import Session
from .snapshot import Snapshot, parts_of

if TYPE_CHECKING:
    from .program import Program


class Batch(NamedTuple):
    """A batch that has read its prompts.

    Attributes:
        session: It, at the position of the longest prompt.
        logits: Of the last token of each prompt, [B, 1, vocabulary].
    """

    session: Session
    logits: HostArray


def read_prompts(program: Program, prompts: Sequence[ArrayLike]) -> Batch:
    """See `Program.batch`."""
    manifest = program.manifest
    names = [spec.name for spec in manifest.inputs if spec.role == "tokens"]
    outputs = [spec.name for spec in manifest.outputs if spec.role == "logits"]
    if len(names) != 1 or len(outputs) != 1:
        got = f"inputs {', '.join(names) or 'none'}, outputs {', '.join(outputs) or 'none'}"
        raise InputError("not a model of token ids and logits", got=got, expected="one of each")
    spec = next(spec for spec in manifest.inputs if spec.name == names[0])
    require_list(prompts, "prompts", "a list of prompts")
    ids = [token_ids(spec, prompt) for prompt in prompts]
    wrong = [list(row.shape) for row in ids if row.shape[0] != 1 or row.size == 0]
    if wrong or not ids:
        raise InputError("a prompt is a list of tokens", where="prompts", got=wrong[0] if wrong else "none")
    if manifest.batch not in (None, len(ids)):
        hint = "compile with --batch open for any number"
        raise InputError("wrong batch", where="prompts", got=len(ids), expected=manifest.batch, hint=hint)
    if len({row.shape[1] for row in ids}) > 1:
        check_lengths(manifest)
    read = _by_row if manifest.batch is None else _by_length
    rows, logits = read(program, ids, names[0], outputs[0])
    together = gather(manifest, engine_of(program).pool, rows, max(row.shape[1] for row in ids))
    return Batch(program.session(Snapshot(engine_of(program), together)), np.concatenate(logits))


def _by_row(program: Program, ids: Sequence[HostArray], name: str, output: str) -> tuple[list[Row], list[HostArray]]:
    """Each prompt in a session of its own."""
    rows: list[Row] = []
    logits: list[HostArray] = []
    for row in ids:
        session = program.session(batch=1)
        logits.append(session.run({name: row}, logits="last")[output])
        rows.append((parts_of(session.snapshot())[1], 0))
    return rows, logits


def _by_length(program: Program, ids: Sequence[HostArray], name: str, output: str) -> tuple[list[Row], list[HostArray]]:
    """All prompts in a batch of fixed size, up to the end of each; one that has ended is fed its last token on."""
    longest = max(row.shape[1] for row in ids)
    filled = np.concatenate([np.pad(row, ((0, 0), (0, longest - row.shape[1])), "edge") for row in ids])
    session, start = program.session(), 0
    rows: dict[int, Row] = {}
    logits: dict[int, HostArray] = {}
    for stop in sorted({row.shape[1] for row in ids}):
        last = session.run({name: filled[:, start:stop]}, logits="last")[output]
        held, start = parts_of(session.snapshot())[1], stop
        for index, row in enumerate(ids):
            if row.shape[1] == stop:
                rows[index], logits[index] = (held, index), last[index : index + 1]
    return [rows[index] for index in range(len(ids))], [logits[index] for index in range(len(ids))]
