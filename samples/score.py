"""Says how likely a model finds texts: log-probability of each, and which continuation of a prompt it prefers.

    python samples/score.py model.vmfb --prompt "The sky is" " blue" " square"

The prompt is read once; each continuation is scored in one call, from the logits of all its positions.
"""

from __future__ import annotations

import argparse

import numpy as np
from linattn import Program, TextGenerator


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def main() -> None:
    """Prints the continuations, the likeliest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", metavar="MODEL.vmfb")
    parser.add_argument("continuations", metavar="TEXT", nargs="+")
    parser.add_argument("--prompt", required=True)
    options = parser.parse_args()

    with Program.load(options.module) as program:
        tokenizer = TextGenerator(program).tokenizer
        (tokens,) = [spec.name for spec in program.inputs if spec.role == "tokens"]
        (output,) = [spec.name for spec in program.outputs if spec.role == "logits"]
        base = program.session()
        before = base.run({tokens: [tokenizer.encode(options.prompt)]}, logits="last")[output]
        scores: dict[str, float] = {}
        for text in options.continuations:
            ids = tokenizer.encode(text, special=False)
            after = base.fork().run({tokens: [ids]})[output]
            logits = np.concatenate([before, after], 1)[0, : len(ids)]  # the row before a token foretells it
            scores[text] = float(log_softmax(logits)[np.arange(len(ids)), ids].sum())
    for text, score in sorted(scores.items(), key=lambda item: -item[1]):
        print(f"{score:10.4f}  {text!r}")


if __name__ == "__main__":
    main()
