"""One module for x86-64-v2, v3 and v4: each level's code runs where it belongs and gives what the model says."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.targets.cpu_levels import LEVELS
from linattn.runtime import Program
from onnx import numpy_helper

from tests import bytes_and_pairs
from tests.conftest import MODELS
from tests.cpu_levels import NAMES, forced, level_named
from tests.e2e.test_exported_models import check, prefill
from tests.numeric import test_mat_mul as products

FOLDER = Path(mkdtemp(prefix="linattn-portable-"))


@cache
def compiled(name: str) -> tuple[bytes, Path]:
    """The module of an exported model, and the file with its weights."""
    file = FOLDER / f"{name}.irpa"
    options = CompileOptions(cpu_features="portable", prefill_blocks=(64,), max_context=256, parameters=file)
    return compile_model(MODELS / name / "model.onnx", options).module, file


def load(name: str, level: str) -> Program:
    module, weights = compiled(name)
    return Program.load(forced(module, level_named(level)), parameters=weights)


@pytest.mark.usefixtures("shared_models")
class TestExportedModels:
    @pytest.mark.parametrize("level", NAMES)
    def test_f32(self, level: str) -> None:
        for length in (5, 65):
            check("genai-fp32-cpu", load("genai-fp32-cpu", level), length, 32)

    def test_each_level_has_code_of_its_own(self) -> None:
        """In f32, where only the order of sums differs: so the three are really taken."""
        levels = [prefill(load("genai-fp32-cpu", name), 65) for name in NAMES]
        for i, logits in enumerate(levels):
            for other in levels[:i]:
                assert not np.array_equal(logits, other)

    def test_weights_are_stored_once(self) -> None:
        module, weights = compiled("genai-fp32-cpu")
        model = onnx.load(MODELS / "genai-fp32-cpu" / "model.onnx")
        size = sum(numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)
        assert weights.stat().st_size < 1.1 * size
        assert len(module) < 3_000_000


SHAPES = (
    *((rows, 256, 48) for rows in (1, 2, 3, 6, 7, 8, 12, 13, 64)),
    *((7, depth, 96) for depth in (255, 1030)),
    *((rows, 300, columns) for rows in (1, 7, 40) for columns in (9, 17, 33, 72)),
)


@pytest.fixture(scope="module", params=[np.float32, np.float16], ids=["f32", "f16"])
def many(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, bytes, type]:
    """Products of all shapes: the model, its module, the type."""
    model = products.build([*SHAPES], request.param)
    return model, compile_model(model, CompileOptions(cpu_features="portable")).module, request.param


class TestProducts:
    """The layout that all levels share, at the edges of tiles, blocks and panels."""

    @pytest.mark.parametrize("level", NAMES)
    def test_products(self, many: tuple[onnx.ModelProto, bytes, type], level: str) -> None:
        proto, module, dtype = many
        products.check(Program.load(forced(module, level_named(level))), proto, [*SHAPES], dtype)

    @pytest.mark.parametrize("level", NAMES)
    def test_quantised(self, level: str) -> None:
        """Of 2, 4 and 8 bits, by bytes; and of bf16, whose units levels have or not."""
        model, module = quantised()
        feeds = bytes_and_pairs.feeds_of(model)
        found = Program.load(forced(module, level_named(level))).run(feeds)
        bytes_and_pairs.check(found, model, feeds)

    @pytest.mark.parametrize("level", NAMES)
    def test_open_rows(self, level: str) -> None:
        kinds = [(0, 300, 33), (0, 520, 64)]
        model = products.build(kinds, np.float32, "rows")
        run = Program.load(forced(open_rows(model.SerializeToString()), level_named(level)))
        for rows in (1, 5, 6, 13, 200):
            products.check(run, model, [(rows, *kind[1:]) for kind in kinds], np.float32)


@cache
def quantised() -> tuple[onnx.ModelProto, bytes]:
    model = bytes_and_pairs.products()
    return model, compile_model(model, CompileOptions(cpu_features="portable")).module


@cache
def open_rows(model: bytes) -> bytes:
    return compile_model(onnx.load_from_string(model), CompileOptions(cpu_features="portable")).module


def test_levels_are_whole() -> None:
    """Each level has what those below it have, so that the first whose condition holds is the best."""
    for better, lesser in pairwise(LEVELS):
        assert set(lesser.features) < set(better.features)
        assert lesser.vector_bits < better.vector_bits
