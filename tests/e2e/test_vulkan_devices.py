"""Every kernel of real models compiles for the Vulkan devices that people have, and is valid SPIR-V.

Compiling checks each dispatch against the device's limits. `tests/spirv.py` does the same for all exported models and
all sizes of prompts.
"""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 by name
import numpy as np
import pytest
import spirv
from linattn.frontend import CompileOptions, compile_model
from linattn.frontend.targets.vulkan_device import BASELINE, DEVICES
from linattn.runtime import Program
from onnx import TensorProto, helper
from tolerances import BENIGN, error

# One of those that are the same to us, but for those that every operator is compiled for (tests/ir/test_half_types.py)
# and the two that are no family, which most other tests compile for.
OTHERS = (BASELINE, "mobile", "hopper", "valhall")
FAMILIES = list({device: name for name, device in DEVICES.items() if device not in map(DEVICES.get, OTHERS)}.values())
SAID, NAMED = (1, 6), "genai-fp16-cuda"

needs_validator = pytest.mark.skipif(
    shutil.which("spirv-val") is None, reason="spirv-val (Debian: spirv-tools) is not installed"
)


@needs_validator
@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_real_model_is_valid(family: str, shared_models: Path) -> None:
    options = CompileOptions(target="vulkan", gpu_target=family, prefill_blocks=(8,), max_context=256)
    module = compile_model(shared_models / NAMED / "model.onnx", options).module
    assert len(spirv.codes(module)) > 20
    assert spirv.faults(module) == []
    versions = {divmod(struct.unpack_from("<I", code, 4)[0] >> 8, 256) for code in spirv.codes(module)}
    assert versions == {SAID}


@pytest.mark.vulkan
@pytest.mark.parametrize("as_node", [False, True], ids=["initializer", "node"])
@pytest.mark.parametrize("target", ["cpu", "vulkan"])
def test_short_lists_of_bf16(target: str, as_node: bool) -> None:
    """IREE puts them into the kernels, which then were no valid SPIR-V: a norm's scale and a bias of 24 numbers."""
    rng = np.random.default_rng(3)
    x, scale, bias = (rng.standard_normal(shape).astype("bfloat16") for shape in ((1, 3, 24), (24,), (24,)))
    tensors = [helper.make_tensor(name, TensorProto.BFLOAT16, [24], array.tobytes(), raw=True)
               for name, array in (("scale", scale), ("bias", bias))]  # fmt: skip
    nodes = [helper.make_node("Constant", [], [t.name], f"make_{t.name}", value=t) for t in tensors] if as_node else []
    nodes.append(helper.make_node("RMSNormalization", ["x", "scale"], ["n"], "norm", axis=-1, epsilon=1e-5))
    nodes.append(helper.make_node("Add", ["n", "bias"], ["y"], "add"))
    ends = [helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [1, 3, 24]) for name in "xy"]
    graph = helper.make_graph(nodes, "bf16", ends[:1], ends[1:], [] if as_node else tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    found = Program.load(compile_model(proto, CompileOptions(target=target)).module).run({"x": x})["y"]
    wide = x.astype(np.float64)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale.astype(np.float64)
    assert error(found.astype(np.float64), normed + bias.astype(np.float64)) < BENIGN["bfloat16"]
