"""Runs a model of a signal sample by sample: no tokens, no text, only the two operators and their states.

    python samples/stream_sensor.py

Builds a small model of 8 channels (a causal convolution, then gated linear attention, then a score for each sample),
compiles it, and feeds it a signal as a microphone would: one sample a call. A long call gives the same scores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from linattn import CompileOptions, Program, compile
from onnx import TensorProto, helper, numpy_helper

CHANNELS, TAPS = 8, 4


def build() -> onnx.ModelProto:
    """Signal [B, T, 8] -> score [B, T, 1], with the states of both operators beside them."""
    random = np.random.default_rng(0)
    weights = {
        "conv.weight": random.standard_normal((CHANNELS, 1, TAPS)) / 2,
        "qkv.weight": random.standard_normal((CHANNELS, 3 * CHANNELS)) / 3,
        "decay.weight": random.standard_normal((CHANNELS, 1)) / 3,
        "score.weight": random.standard_normal((CHANNELS, 1)),
    }
    node = helper.make_node
    nodes = [
        node("Transpose", ["signal"], ["columns"], perm=[0, 2, 1]),
        node(
            "CausalConvWithState",
            ["columns", "conv.weight", "", "past.conv"],
            ["filtered", "present.conv"],
            activation="silu",
        ),
        node("Transpose", ["filtered"], ["rows"], perm=[0, 2, 1]),
        node("MatMul", ["rows", "qkv.weight"], ["qkv"]),
        node("Split", ["qkv"], ["q", "k", "v"], axis=-1, num_outputs=3),
        node("MatMul", ["rows", "decay.weight"], ["raw_decay"]),
        node("Softplus", ["raw_decay"], ["positive_decay"]),
        node("Neg", ["positive_decay"], ["decay"]),
        node(
            "LinearAttention",
            ["q", "k", "v", "past.memory", "decay"],
            ["mixed", "present.memory"],
            q_num_heads=1,
            kv_num_heads=1,
            update_rule="gated",
        ),
        node("MatMul", ["mixed", "score.weight"], ["score"]),
    ]
    states = {"conv": ["batch", CHANNELS, TAPS - 1], "memory": ["batch", 1, CHANNELS, CHANNELS]}

    def value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "sensor",
        [value("signal", ["batch", "time", CHANNELS]), *(value(f"past.{n}", s) for n, s in states.items())],
        [value("score", ["batch", "time", 1]), *(value(f"present.{n}", s) for n, s in states.items())],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)], ir_version=13)


def main() -> None:
    """Builds, compiles, streams, and compares with one long call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    signal = np.random.default_rng(1).standard_normal((1, options.samples, CHANNELS)).astype(np.float32)

    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "sensor.vmfb"
        compile(build(), CompileOptions(prefill_blocks=(64,)), output=module)  # one sample or 64 a call
        with Program.load(module) as program:
            session, times = program.session(), []
            scores: list[float] = []
            for sample in signal[0]:
                start = time.perf_counter()
                scores.append(float(session.run({"signal": sample[None, None]})["score"][0, 0, 0]))
                times.append(time.perf_counter() - start)
            whole = program.session().run({"signal": signal})["score"][0, :, 0]
            print(f"{len(scores)} samples, {np.median(times) * 1e6:.0f} us each; position {session.position}")
            difference = np.linalg.norm(whole - scores) / np.linalg.norm(whole)
            print(f"relative difference from one long call: {difference:.1e}")


if __name__ == "__main__":
    main()
