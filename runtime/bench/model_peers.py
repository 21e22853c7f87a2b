"""Which peers a model has, and what is to be known of it for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .lazy import need
from .model_rows import Entrant
from .options import ModelOptions


def peers_of(
    options: ModelOptions, prefix: str, path: Path, ours: Sequence[Entrant], facts: Mapping[str, Any]
) -> list[Entrant]:
    """The peers of an ONNX model: ONNX Runtime on the CPU; llama.cpp, of the GGUF beside it, on each of our targets.

    Args:
        options: Which peers.
        prefix: Of their names, which says which model it is.
        path: The ONNX model.
        ours: What linattn made of it.
        facts: What `weights_of` found.
    """
    manifest, found = ours[0].manifest, list[Entrant]()
    if "onnxruntime" in options.peers:
        found.append(Entrant(f"{prefix}onnxruntime", "onnxruntime", "cpu", manifest, path, dict(facts)))
    if "llama.cpp" in options.peers:
        gguf, about = path.with_suffix(".gguf"), {"weights": facts["weights"]}
        for target in dict.fromkeys(entrant.manifest.target.name for entrant in ours):
            found.append(Entrant(f"{prefix}{target}:llama.cpp", "llama.cpp", target, manifest, gguf, dict(about)))
    return found


def weights_of(path: Path) -> tuple[str, bool]:
    """What an ONNX model's weights are, such as `float32` or `int4`, and whether its products may round activations.

    That is where ONNX Runtime may compute products of quantised weights with activations in int8.
    """
    onnx = need("onnx", "compile")
    graph = onnx.load_model(str(path), load_external_data=False).graph
    products = [{a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"]
    if products:
        bits = Counter(int(product.get("bits", 4)) for product in products)
        rounds = any(product.get("accuracy_level", 0) > 0 for product in products)
        return f"int{bits.most_common(1)[0][0]}", rounds
    held = Counter[str]()
    for tensor in graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        held[dtype.name] += math.prod(tensor.dims) * dtype.itemsize
    return held.most_common(1)[0][0] if held else "none", False
