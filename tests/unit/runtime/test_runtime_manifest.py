from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from linattn.runtime import Manifest, TargetError
from linattn.runtime.manifest import EntryPoint, Parameters
from linattn.runtime.manifest_target import DeviceNeeds, Target
from tiny_hybrid import Hybrid, open_form

GOOD = json.loads(Hybrid().manifest().to_json())


NEEDS = {"threads": 1, "shared_memory": 0, "storage_buffers": 0, "push_constants": 0, "features": []}


@pytest.mark.parametrize("hybrid", [Hybrid(), open_form(Hybrid())])
def test_round_trip(hybrid: Hybrid) -> None:
    manifest = replace(
        hybrid.manifest(),
        parameters=Parameters("model", "weights.irpa"),
        nodes=({"name": "la_0", "strategy": "chunked"},),
        producer={"linattn": "0.1.0"},
        target=Target("vulkan", "vulkan", "x", 32, needs=DeviceNeeds(256, 16384, 9, 12, ("shaderInt64",))),
    )
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_position_argument() -> None:
    assert Hybrid().manifest().takes_position
    assert not open_form(Hybrid()).manifest().takes_position
    assert not replace(Hybrid().manifest(), states=Hybrid().manifest().states[:2]).takes_position


def test_token_limit() -> None:
    manifest = Hybrid().manifest()
    assert manifest.token_limit == 24
    assert replace(manifest, context_limit=20).token_limit == 20
    assert replace(manifest, max_context=None, context_limit=20).token_limit == 20


def test_bounds_of_indices() -> None:
    raw = copy.deepcopy(GOOD)
    raw["inputs"][0]["bounds"] = [-(1 << 63), (1 << 63) - 1]
    assert Manifest.from_json(json.dumps(raw)).inputs[0].bounds == (-(1 << 63), (1 << 63) - 1)
    raw["inputs"][0]["dtype"] = "float32"
    with pytest.raises(TargetError, match="input_ids: bounds of values that are no indices, got float32"):
        Manifest.from_json(json.dumps(raw))
    del raw["inputs"][0]["bounds"]
    with pytest.raises(TargetError, match="bounds: missing"):
        Manifest.from_json(json.dumps(raw))


def test_subgroup_size_is_optional() -> None:
    raw = copy.deepcopy(GOOD)
    del raw["target"]["subgroup_size"]
    assert Manifest.from_json(json.dumps(raw)).target.subgroup_size is None


def test_frontend_cannot_write_a_broken_one() -> None:
    with pytest.raises(TargetError, match="not unique"):
        replace(Hybrid().manifest(), entry_points=(EntryPoint("f", "main", None),) * 2).to_json()


HOSTILE: list[tuple[str, Any, str]] = [
    ("format", 1, "unknown manifest format"),
    ("format", True, "whole number"),
    ("format", None, "whole number"),
    ("batch", 0, "manifest.batch"),
    ("batch", 1.5, "manifest.batch"),
    ("batch", 10**30, "manifest.batch"),
    ("max_context", -1, "manifest.max_context"),
    ("inputs", {}, "a list"),
    ("inputs", [3], "an object"),
    ("inputs.0.dtype", "object", "manifest.inputs[0].dtype"),
    ("inputs.0.dtype", ["int64"], "manifest.inputs[0].dtype"),
    ("inputs.0.shape", [1, -1], "manifest.inputs[0].shape"),
    ("inputs.0.shape", [1] * 20, "axes"),
    ("inputs.0.shape", [1 << 31, 1 << 31], "too large"),
    ("inputs.0.shape", ["nobody"], "dims without a role"),
    ("inputs.0.role", "admin", "manifest.inputs[0].role"),
    ("inputs.0.bounds", 7, "a list"),
    ("inputs.0.bounds", [1], "[least, greatest] in 64 bits"),
    ("inputs.0.bounds", [2, 1], "[least, greatest] in 64 bits"),
    ("inputs.0.bounds", [0, True], "[least, greatest] in 64 bits"),
    ("inputs.0.bounds", [0, 1.5], "[least, greatest] in 64 bits"),
    ("inputs.0.bounds", [0, 1 << 63], "[least, greatest] in 64 bits"),
    ("inputs.1.name", "input_ids", "not unique"),
    ("inputs.1.name", "past.1.kv", "not unique"),
    ("inputs.2.role", "attention_mask", "more than one attention_mask"),
    ("outputs.0.token_axis", 3, "token_axis out of range"),
    ("outputs.0.name", "present.0.rec", "not unique"),
    ("outputs.0.name", "x" * 5000, "a string"),
    ("states.0.kind", "kv_cache", "wrong length_axis"),
    ("states.0.length_axis", 1, "wrong length_axis"),
    ("states.0.in_place", True, "in_place without a capacity"),
    ("states.0.in_place", 1, "true | false"),
    ("states.2.length_axis", 9, "length_axis out of range"),
    ("states.2.length_axis", 3, "not a past dim"),
    ("max_context", None, "in_place without a capacity"),
    ("max_context", 1 << 31, None),
    ("entry_points", [], "empty"),
    ("entry_points.0.symbol", "__init", "not a function"),
    ("entry_points.0.symbol", "decode$async", "not a function"),
    ("entry_points.0.tokens", 2, "decode entry"),
    ("entry_points.1.symbol", "decode", "not unique"),
    ("entry_points.1.last", "decode", "not unique"),
    ("entry_points.1.last", "decode$async", "not a function"),
    ("entry_points.1.last", 3, "a string"),
    ("entry_points.1.draw", "decode", "not unique"),
    ("entry_points.1.draw", "decode$async", "not a function"),
    ("entry_points.1.steps", "decode", "not unique"),
    ("entry_points.1.steps", "decode$async", "not a function"),
    ("entry_points.1.steps", "several", "several steps without one that chooses"),
    ("entry_points.1.steps", 3, "a string"),
    ("entry_points.0.packed", "decode", "not unique"),
    ("entry_points.0.packed", "decode$async", "not a function"),
    ("entry_points.0.packed", 3, "a string"),
    ("entry_points.1.packed", "once", "wrong token count of a packed step"),
    ("dims.batch_size", "token", "unknown role"),
    ("dims", [], "an object"),
    ("target.name", "tpu", "cpu | cuda | vulkan"),
    ("target.subgroup_size", 0, "subgroup_size"),
    ("target.architecture", None, "target.architecture"),
    ("target.architecture", 64, "target.architecture"),
    ("target.name", "cuda", "target.architecture"),
    ("target.instruction_sets", None, "a list"),
    ("target.needs", 3, "an object"),
    ("target.needs", {"shared_memory": 0}, "missing"),
    ("target.needs", NEEDS | {"threads": 0}, "1 to"),
    ("target.needs", NEEDS | {"features": [1]}, "a list of strings"),
    ("target.instruction_sets", ["avx2", 2], "a list of strings"),
    ("parameters", {"scope": "model", "file": "../../etc/passwd"}, "plain file name"),
    ("parameters", {"scope": "model", "file": ".."}, "plain file name"),
    ("parameters", {"scope": "model", "file": ""}, "plain file name"),
    ("parameters", {"scope": "model", "file": "a\\b"}, "plain file name"),
    ("parameters", 7, "an object"),
    ("nodes", None, "a list"),
    ("model", None, "an object"),
]


@pytest.mark.parametrize(("path", "value", "words"), HOSTILE)
def test_hostile(path: str, value: Any, words: str | None) -> None:
    raw = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    place: Any = raw
    for key in parents:
        place = place[key]
    place[last] = value
    if words is None:
        Manifest.from_json(json.dumps(raw))
        return
    with pytest.raises(TargetError) as caught:
        Manifest.from_json(json.dumps(raw), "m.vmfb")
    assert words in str(caught.value)
    assert str(caught.value).startswith("m.vmfb: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("key", [key for key in GOOD if key not in ("row_masks", "finite")])
def test_missing_field(key: str) -> None:
    raw = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(TargetError, match=rf"manifest\.{key}: missing"):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"format": NaN}', "\x00"])
def test_not_a_manifest(text: str) -> None:
    with pytest.raises(TargetError) as caught:
        Manifest.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["architecture", "instruction_sets", "needs"])
def test_target_says_what_its_code_needs(key: str) -> None:
    raw = copy.deepcopy(GOOD)
    del raw["target"][key]
    with pytest.raises(TargetError, match=rf"manifest\.target\.{key}: missing"):
        Manifest.from_json(json.dumps(raw))
