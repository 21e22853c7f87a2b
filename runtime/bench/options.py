"""What can be asked of the bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import Case
from .op_models import MICROSOFT
from .subjects import TargetChoice

OP_PEERS = ("onnxruntime", "onnxruntime-std", "fla")
MODEL_PEERS = ("onnxruntime", "llama.cpp")
DEFAULT = "default"
"""The strategy that linattn chooses itself."""


@dataclass(frozen=True)
class OpOptions:
    """What to measure.

    Attributes:
        cases: One for each dtype and token count.
        domain: Of linattn's operator, `com.microsoft` or `ai.onnx`.
        targets: Where linattn shall run.
        strategies: Its strategies, `default` for its own choice.
        peers: Some of `OP_PEERS`.
        rounds: How often the subjects take turns.
        seconds: Timed seconds of a subject in a case, over all rounds.
        warmup: Untimed calls before the first round; the others have one.
        chain: Nodes in the chain that tells a GPU's kernel time; 0 for none.
        threads: CPU threads of every subject; None: each one's own default.
        ceilings: Whether to measure the machine's ceilings.
    """

    cases: Sequence[Case]
    domain: str = MICROSOFT
    targets: Sequence[TargetChoice] = (TargetChoice("cpu"),)
    strategies: Sequence[str] = (DEFAULT,)
    peers: Sequence[str] = ("onnxruntime",)
    rounds: int = 5
    seconds: float = 1.0
    warmup: int = 3
    chain: int = 8
    threads: int | None = None
    ceilings: bool = True


@dataclass(frozen=True)
class ModelOptions:
    """What to measure.

    Attributes:
        models: `.onnx` files, compiled for each target and strategy, `.vmfb` files, run as they are, and bundles, of
            which every module is run whose device is there.
        prefill: Tokens of each prompt, ascending.
        decode: Tokens generated after the first.
        repeats: How often the subjects take turns.
        warmup: Untimed prompts, each with some steps, before the first turn.
        targets: What to compile `.onnx` files for.
        strategies: Strategies to force, `default` for linattn's choice.
        peers: Some of `MODEL_PEERS`.
        threads: CPU threads of every subject; None: each one's own default.
        seed: Of the prompt.
        ceilings: Whether to measure the machine's ceilings.
        all_logits: Whether a prompt gives the logits of all positions, as in ONNX Runtime; else of the last one only.
        profile: Instead of timing whole calls, show what each dispatch takes.
    """

    models: Sequence[Path]
    prefill: Sequence[int] = (512,)
    decode: int = 128
    repeats: int = 3
    warmup: int = 1
    targets: Sequence[TargetChoice] = (TargetChoice("cpu"),)
    strategies: Sequence[str] = (DEFAULT,)
    peers: Sequence[str] = ("onnxruntime",)
    threads: int | None = None
    seed: int = 0
    ceilings: bool = True
    all_logits: bool = False
    profile: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(self.prefill)
