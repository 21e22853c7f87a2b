"""LinearAttentionGate against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from comparing import DTYPES, MICROSOFT, assert_matches, normal
from harness import lowered, node_for, run_op, spec
from linattn.dialect_patterns.linear_attention import gate as linear_attention_gate
from linattn.runtime.errors import UnsupportedModelError


def operands(dtype: Any = np.float32) -> list[np.ndarray]:
    # far from zero on both sides: softplus must not overflow, nor lose its small end
    a, b = 30 * normal(2, 5, 4), 10 * normal(2, 5, 5)[..., 1:]
    return [a.astype(dtype), normal(4), -np.exp(normal(5)[:4]), b.astype(dtype)]


def check(inputs: list[np.ndarray], **run: Any) -> None:
    assert_matches("LinearAttentionGate", inputs, domain=MICROSOFT, version=1, **run)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_with_open_tokens(dtype: Any):
    check(operands(dtype), num_outputs=2, open_axes={0: (0, 1), 3: (0, 1)})


def test_decay_alone():
    check(operands()[:3])
    check(operands(), num_outputs=2, used=[True, False])


def test_both_outputs_are_one_loop():
    """IREE makes a kernel of each; two of a layer took 9 us of a prompt by Vulkan, one takes 5."""
    text = str(lowered(MICROSOFT, "LinearAttentionGate", 1, [spec(array) for array in operands()], {}, 2, "cpu"))
    assert text.count("linalg.generic") == 1


def test_small_end_of_softplus():
    # ONNX Runtime returns 0 from about -17 on
    inputs = [np.full((1, 1, 4), -40.0, np.float32), np.zeros(4, np.float32), np.ones(4, np.float32)]
    (decay,) = run_op("LinearAttentionGate", inputs, domain=MICROSOFT, version=1)
    np.testing.assert_allclose(decay, np.exp(-40.0), rtol=1e-5)


@pytest.mark.vulkan
def test_vulkan():
    check(operands(), num_outputs=2, target="vulkan")


def test_invalid():
    inputs = [spec(array) for array in operands()]
    with pytest.raises(UnsupportedModelError, match="input 'b' is missing; output 'beta' needs it"):
        linear_attention_gate.parse(node_for(MICROSOFT, "LinearAttentionGate", 1, inputs[:3], {}, 2))
    inputs[1] = spec(normal(4).astype(np.float16))
    with pytest.raises(UnsupportedModelError, match="input 'dt_bias' has an unsupported type, got f16, expected f32"):
        linear_attention_gate.parse(node_for(MICROSOFT, "LinearAttentionGate", 1, inputs, {}, 2))
