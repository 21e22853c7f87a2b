"""Rows of a model's result: rates by the medians, and whether logits and tokens are ONNX Runtime's.

A quantised model has no single right answer: with accuracy_level 4 ONNX Runtime rounds activations to int8, as linattn
does. How far that takes ONNX Runtime's logits from its own at accuracy_level 0 is measured with each model, and is the
noise that a row may differ by, twice: both round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from linattn.runtime.device import HostArray
from linattn.runtime.manifest import Manifest

from .cases import relative_error
from .model_runners import logits_output
from .process import Subject
from .timing import summarize

LOGIT_LIMITS = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}
"""Relative error norm of logits against ONNX Runtime above which a subject counts as wrong."""
NOISES = 2.0
"""Of a quantised model: how many times ONNX Runtime's own noise a subject may differ from it."""
TOKEN_LIMITS = 8.0
"""Another token is right where ONNX Runtime's own is likelier by less than so many limits of the logits."""


@dataclass
class Entrant:
    """A subject: a model on a target, or a peer.

    Attributes:
        name: What rows call it.
        kind: `linattn`, `onnxruntime` or `llama.cpp`.
        target: Where it runs.
        manifest: What linattn found out about the model.
        path: The module or the ONNX model.
        facts: What else a row says of it.
        device: IREE device URI; None: the target's own.
        subject: Its process, once that is started.
        logits: Prompt length -> logits after the prompt and after each given token.
        exact: The same without rounding, of a quantised model in ONNX Runtime.
        repeats: Prompt length -> the timed turns.
    """

    name: str
    kind: str
    target: str
    manifest: Manifest
    path: Path
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    device: str | None = None
    subject: Subject | None = None
    logits: dict[int, HostArray] = field(default_factory=dict[int, HostArray])
    exact: dict[int, HostArray] = field(default_factory=dict[int, HostArray])
    repeats: dict[int, list[dict[str, Any]]] = field(default_factory=dict[int, list[dict[str, Any]]])

    def call(self, method: str, **arguments: Any) -> Any:
        """Calls a method of its runner."""
        assert self.subject is not None, "started first"
        return self.subject.call(method, **arguments)


def row_of(
    entrant: Entrant, reference: Entrant | None, prompt: Sequence[int], warmup: dict[str, int]
) -> dict[str, Any]:
    """A row of the result: a subject with a prompt.

    Args:
        entrant: The subject.
        reference: ONNX Runtime with the same model; None: there is none.
        prompt: The token ids.
        warmup: Untimed `prompts` and `steps` before.
    """
    length, repeats = len(prompt), entrant.repeats[len(prompt)]
    prefill = summarize([repeat["prefill_s"] for repeat in repeats])
    steps = summarize([step for repeat in repeats for step in repeat["steps_s"]])
    overheads = [seconds for repeat in repeats for seconds in repeat["overheads_s"]]
    bare = [seconds for repeat in repeats for seconds in repeat["bare_s"]]
    generated = [seconds for repeat in repeats for seconds in repeat["generated_s"]]
    row: dict[str, Any] = {
        "subject": entrant.name,
        "kind": entrant.kind,
        "target": entrant.target,
        "model_sha256": entrant.manifest.model_sha256,
        "weights": entrant.facts.get("weights"),
        "prompt": length,
        "strategy": entrant.facts.get("strategy"),
        "compile_s": entrant.facts.get("compile_s"),
        "load_s": entrant.facts["load_s"],
        "memory_bytes": {"loaded": entrant.facts["memory_bytes"]["now"], **repeats[-1]["memory_bytes"]},
        "warmup": warmup,
        "load": entrant.call("watched", length=length),
        "first_token_s": prefill,
        "prefill": {"tokens_per_s": length / prefill["median"]},
        "decode": {"tokens_per_s": 1 / steps["median"], "step": steps},
        "overhead": summarize(overheads) if overheads else None,
        "bare_overhead": summarize(bare) if bare else None,
        "generate_overhead": summarize(generated) if generated else None,
        "error": None,
        "greedy": None,
        "status": "ok",
        "reference": None,
    }
    if reference is not None and entrant.kind == "linattn":
        row |= _judged(entrant, reference, prompt)
    return row


def _judged(entrant: Entrant, reference: Entrant, prompt: Sequence[int]) -> dict[str, Any]:
    """What the comparison with ONNX Runtime says."""
    length = len(prompt)
    dtypes = {logits_output(e.manifest).dtype for e in (entrant, reference)} | {
        s.dtype for s in entrant.manifest.states
    }
    limit, noise = max(LOGIT_LIMITS.get(dtype, 0.0) for dtype in dtypes), None
    if length in reference.exact:
        noise = relative_error(reference.logits[length], reference.exact[length])
        limit = max(limit, NOISES * noise)
    logits = entrant.logits[length]
    error = relative_error(logits, reference.logits[length])
    ours, theirs = entrant.repeats[length][0]["tokens"], reference.repeats[length][0]["tokens"]
    equal = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))
    margin = None
    if equal < len(ours):  # up to there both have read the same tokens
        same = {"prompt": list(prompt), "tokens": theirs[:equal], "one": theirs[equal], "other": ours[equal]}
        margin = reference.call("margin", **same)
    tokens_are_right = margin is None or margin <= TOKEN_LIMITS * limit
    return {
        "error": {"logits": error, "limit": limit, "noise": noise, "ok": error <= limit, "positions": len(logits)},
        "greedy": {"equal": equal, "of": len(ours), "margin": margin, "ok": tokens_are_right},
        "status": "ok" if error <= limit and tokens_are_right else "wrong",
        "reference": reference.name,
    }
