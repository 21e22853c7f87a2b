"""Damaged manifests in a real module: loaded, and run with whatever inputs they ask for."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from linattn.runtime import Program
from linattn.runtime.device import numpy_dtype
from linattn.runtime.integrity import SEAL_BYTES, sealed
from tiny_hybrid import Hybrid

ROOM = 6000
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 8, 24, 1 << 20, 1 << 31, 1 << 62, 1.5, float("inf"), "", "x", "batch", "tokens",
    "past", "total", "open", "float32", "int64", "bool", "bfloat16", "cpu", "decode", "main", "kv_cache", [], {}, [1],
    {"a": 1}, "a" * 5000, "\0", "prefill_3", "past.0.rec", "logits", "local-task", "cuda", "__init", "decode$async",
]  # fmt: skip


@functools.cache
def prepare() -> tuple[bytes, int, str]:
    """The module's bytes, where its manifest starts, and the manifest; ROOM bytes of it are spaces."""
    text = Hybrid().manifest().to_json()
    data = Hybrid().compile(text + " " * ROOM)[:-SEAL_BYTES]
    return data, data.index(text.encode()), text


def _damage(rng: random.Random, value: Any) -> Any:
    """One field somewhere inside set to something else, taken out or doubled."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, inner in items:
            places.append((node, key))
            collect(inner)

    collect(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        node, key = rng.choice(places)
        if (isinstance(node, list) and key >= len(node)) or (isinstance(node, dict) and key not in node):
            continue
        kind = rng.randrange(5)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, list):
            node.insert(key, node[key])
        elif kind == 2:
            other, at = rng.choice(places)
            node[key] = other[at] if (at in other if isinstance(other, dict) else at < len(other)) else None
        else:
            node[key] = rng.choice(ODD)
    return value


def case(rng: random.Random, folder: Path) -> str:
    """Damage the manifest, load the module, and drive what loads."""
    data, start, text = prepare()
    try:
        changed = json.dumps(_damage(rng, json.loads(text))).encode()
    except (ValueError, RecursionError):  # put into itself
        return "skipped"
    if rng.random() < 0.1:
        changed = changed.replace(rng.choice(b'",:{}[]0123456789').to_bytes(), rng.randbytes(1), 1)
    room = len(text.encode()) + ROOM
    if len(changed) > room:
        changed = changed[:room]
    (folder / "manifest.json").write_bytes(changed)
    module = sealed(data[:start] + changed.ljust(room) + data[start + room :])
    (folder / "model.vmfb").write_bytes(module)
    with Program.load(
        module if rng.random() < 0.5 else folder / "model.vmfb", rng.choice([None, "local-sync"])
    ) as program:
        for _ in range(3):
            feeds = {spec.name: _array(rng, spec.dtype, spec.shape) for spec in program.inputs if rng.random() < 0.7}
            if rng.random() < 0.5:
                feeds |= {spec.name: _array(rng, spec.dtype, spec.shape) for spec in program.states}
                program.run(feeds)
            else:
                session = program.session()
                session.run(feeds)
                session.states.numpy()
    return "ran"


def _array(rng: random.Random, dtype: str, shape: tuple[int | str, ...]) -> np.ndarray:
    known = {"batch_size": 1, "sequence_length": 3, "total_sequence_length": 3, "past_sequence_length": 0}
    sizes = [min(dim, 64) if isinstance(dim, int) else known.get(dim, rng.choice([1, 2, 3])) for dim in shape]
    return np.ones(sizes[:8], numpy_dtype(dtype))
