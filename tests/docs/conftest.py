"""One compiled model for everything that the pages and samples show."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from linattn.frontend import CompileOptions, compile_model

from samples import byte_tokenizer
from samples.tiny_hybrid import build


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny hybrid: model.onnx, its tokenizer, and model.vmfb, which generates text, of any batch."""
    folder = byte_tokenizer.write(tmp_path_factory.mktemp("tiny"))
    onnx.save(build(), folder / "model.onnx")
    options = CompileOptions(batch=None, max_context=256, prefill_blocks=(8,))
    compile_model(folder / "model.onnx", options, output=folder / "model.vmfb")
    return folder
