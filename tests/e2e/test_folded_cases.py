"""Values folded for each number of tokens where entry points share weights: as ONNX Runtime has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.runtime import Program

from tests.tolerances import HARD, error


@pytest.mark.parametrize("blocks", [(64, 8), None], ids=["blocks", "open"])
@pytest.mark.parametrize("name", ["folded_shared", "expand_min"])
def test_each_entry_point_has_its_own(shared_models: Path, name: str, blocks: tuple[int, ...] | None) -> None:
    path = shared_models.parent / "cases" / f"{name}.onnx"
    peer = onnxruntime.InferenceSession(path)
    program = Program.load(compile_model(path, CompileOptions(prefill_blocks=blocks)).module)
    for tokens in (1, 8, 64):
        random = np.random.default_rng(tokens)
        sizes = {"batch": 1, "seq": tokens}
        feeds = {
            i.name: 0.1 * random.standard_normal([sizes.get(d, d) for d in i.shape]).astype(np.float32)
            for i in peer.get_inputs()
        }
        got = program.run(feeds)
        for output, want in zip(peer.get_outputs(), peer.run(None, feeds), strict=True):
            assert error(got[output.name], want) <= HARD["float32"], f"{output.name}, {tokens} tokens"
